"""QJL (arXiv:2406.03482): one bit a coordinate, for inner products.

With a projection S of m rows, a key k is stored as sign(S k) and |k|. A query's estimator (Definition 3.1) is

    <q, k> ~ w/m |k| <S q, sign(S k)>

which is the inner product of q with the vector w/m |k| S^T sign(S k). For S of independent N(0, 1) entries the paper's
weight w = sqrt(pi/2) makes it unbiased, with the variance (pi/2 |q|^2 |k|^2 - <q, k>^2) / m.

The paper's code also makes the rows orthogonal, of norm sqrt(dim), by groups of at most dim of them: as a dense random
matrix or as a randomized Hadamard transform. A coordinate of S k/|k| is then distributed as ``codebook.marginal(dim)``,
whose mean magnitude mu is 0.2 % above sqrt(2/pi) at dim = 128: the paper's weight overestimates by so much.

The least-error weight minimises the expected squared error of the vector. With z = S^T sign(S k) / m for |k| = 1 it is
<z, k> / E|z|^2. Here E<z, k> = mu, and E|z|^2 = (m dim + mu^2 (m^2 - sum of m_i^2)) / m^2, for the signs of orthogonal
rows are uncorrelated and two of m rows in different groups of m_i contribute mu^2 (independent rows: m_i = 1).
The error left, 1 - mu^2 / E|z|^2, is 1 - 2/pi = 0.363 for m = dim orthogonal rows and 1/(1 + 2/pi) = 0.611 for Gaussian
ones; the paper's weight leaves pi/2 - 1 = 0.571 and pi/2 = 1.571. (Figures for large dim.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from ggml_tq.codebook import solve
from ggml_tq.reference.protocol import Array, Coder, constant, dot, norm, vectors
from ggml_tq.reference.rotation import Rotation, gaussian
from ggml_tq.signs import SKETCH_SEED

Projection = Literal["gaussian", "orthogonal", "hadamard"]
Weight = Literal["paper", "least-error"]


class QjlCode(NamedTuple):
    sign: Array  # (..., m), -1 or 1
    norm: Array  # (..., 1): |k|


@dataclass(frozen=True)
class Qjl(Coder):
    """QJL with ``m`` signs (0: dim of them)."""

    dim: int
    m: int = 0
    projection: Projection = "gaussian"
    weight: Weight = "paper"
    seed: int = SKETCH_SEED

    def __post_init__(self) -> None:
        if self.projection not in ("gaussian", "orthogonal", "hadamard") or self.weight not in ("paper", "least-error"):
            raise ValueError(f"no projection {self.projection!r} or weight {self.weight!r}")

    @property
    def rows(self) -> int:
        return self.m or self.dim

    @property
    def name(self) -> str:
        return f"qjl_{self.projection}_{self.weight}" + (f"-m{self.m}" if self.m else "")

    @property
    def bits(self) -> float:
        return (self.rows + 16) / self.dim

    @property
    def mean_magnitude(self) -> float:
        """mu: the mean magnitude of a coordinate of S k for a unit vector k, which is the one-bit centroid."""
        return float(solve(1, None if self.projection == "gaussian" else self.dim).centroids[1])

    @property
    def factor(self) -> float:
        """w: 1 / <z, k> or <z, k> / E|z|^2."""
        if self.weight == "paper":
            return float(np.sqrt(np.pi / 2))
        m, mu = self.rows, self.mean_magnitude
        groups = [1] * m if self.projection == "gaussian" else self._groups()
        square = (m * self.dim + mu**2 * (m**2 - sum(g * g for g in groups))) / m**2
        return mu / square

    def _groups(self) -> list[int]:
        """Sizes of the groups of orthogonal rows."""
        full, rest = divmod(self.rows, self.dim)
        return [self.dim] * full + [rest] * (rest > 0)

    def project(self, x: Array) -> Array:
        """S x for vectors (..., dim), as (..., m)."""
        x = vectors(x, self.dim)
        xp = array_namespace(x)
        if self.projection == "gaussian":
            return x @ constant(gaussian(self.rows, self.dim, self.seed).T, x)
        return xp.concat([r.forward(x)[..., :g] for r, g in self._rotations()], axis=-1) * self.dim**0.5

    def project_back(self, v: Array) -> Array:
        """S^T v for vectors (..., m), as (..., dim)."""
        v = vectors(v, self.rows)
        xp = array_namespace(v)
        if self.projection == "gaussian":
            return v @ constant(gaussian(self.rows, self.dim, self.seed), v)
        total, start = 0, 0
        for rotation, size in self._rotations():
            part = v[..., start : start + size]
            zeros = xp.zeros_like(v[..., :1]) + constant(np.zeros(self.dim - size), v)
            total, start = total + rotation.inverse(xp.concat([part, zeros], axis=-1)), start + size
        return total * self.dim**0.5

    def _rotations(self) -> list[tuple[Rotation, int]]:
        kind = "hadamard" if self.projection == "hadamard" else "dense"
        return [(Rotation(self.dim, kind, self.seed + i), size) for i, size in enumerate(self._groups())]  # type: ignore[arg-type]

    def encode(self, x: Array) -> QjlCode:
        xp = array_namespace(x)
        v = self.project(x)
        return QjlCode(xp.where(v < 0, -xp.ones_like(v), xp.ones_like(v)), norm(vectors(x)))

    def decode(self, code: QjlCode) -> Array:
        return self.project_back(code.sign) * (code.norm * (self.factor / self.rows))

    def inner(self, q: Array, code: QjlCode) -> Array:
        """The estimator of <q, k> for queries (..., dim) and codes whose leading axes broadcast with theirs."""
        return (dot(self.project(q), code.sign) * code.norm * (self.factor / self.rows))[..., 0]
