"""PolarQuant (arXiv:2502.02617): angles of a recursive polar transform.

After a random rotation, neighbouring coordinates are taken as points of a plane: a radius and an angle in [0, 2 pi).
Neighbouring radii are taken so again, with an angle in [0, pi/2], level by level (Definition 1). All angles are
independent; those of level l >= 2 have the density ~ sin(2 psi)^(2^(l-1) - 1) (Lemma 2), so each level has one
codebook, Lloyd-Max for that density, and only the last radii are stored.

The paper's setting (section 4) is 4 levels with 4, 2, 2 and 2 bits and one binary16 radius for 16 coordinates:
(8*4 + 4*2 + 2*2 + 2 + 16) / 16 = 3.875 bits a coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ggml_tq.codebook import lloyd_max
from ggml_tq.reference.protocol import Array, Coder, vectors
from ggml_tq.reference.rotation import Kind, Rotation
from ggml_tq.reference.rounding import lookup, nearest
from ggml_tq.signs import ROTATION_SEED


class PolarCode(NamedTuple):
    codes: tuple[Array, ...]  # for each level l = 1, 2, ...: (..., dim/2^l), uint8
    radius: Array  # (..., dim/2^levels)


@cache
def angles(level: int, bits: int) -> NDArray[np.float64]:
    """The 2^bits angles of a level, ascending: at level 1 the midpoints of equal parts of the circle."""
    if level == 1:
        return np.asarray((np.arange(2**bits) + 0.5) * (2 * np.pi / 2**bits))
    if bits == 0:
        return np.array([np.pi / 4])
    # The density in phi = psi - pi/4 is symmetric.
    positive, _ = lloyd_max(bits, lambda phi: np.cos(2 * phi) ** (2 ** (level - 1) - 1), np.pi / 4)
    return np.asarray(np.pi / 4 + np.concatenate([-positive[::-1], positive]))


def polar_transform(x: Array, levels: int) -> tuple[list[Array], Array]:
    """Angles of each level, (..., dim/2), (..., dim/4), ..., in radians, and the last radii of vectors (..., dim)."""
    xp = array_namespace(x)
    result = []
    for level in range(1, levels + 1):
        a, b = x[..., 0::2], x[..., 1::2]
        angle = xp.atan2(b, a)
        result.append(xp.where(angle < 0, angle + 2 * np.pi, angle) if level == 1 else angle)
        x = xp.sqrt(a * a + b * b)
    return result, x


def polar_inverse(angles_of_levels: list[Array], radius: Array) -> Array:
    """Vectors (..., dim) of what ``polar_transform`` returns."""
    xp = array_namespace(radius)
    for angle in reversed(angles_of_levels):
        pairs = xp.stack([radius * xp.cos(angle), radius * xp.sin(angle)], axis=-1)
        radius = xp.reshape(pairs, (*radius.shape[:-1], 2 * radius.shape[-1]))
    return radius


@dataclass(frozen=True)
class PolarQuant(Coder):
    """PolarQuant with ``angle_bits`` for levels 1, 2, ...; 2^levels must divide ``dim``."""

    dim: int
    angle_bits: tuple[int, ...] = (4, 2, 2, 2)
    rotation: Kind = "hadamard"
    seed: int = ROTATION_SEED

    def __post_init__(self) -> None:
        if not self.angle_bits or self.dim % 2 ** len(self.angle_bits):
            raise ValueError(f"dimension {self.dim}: want a multiple of {2 ** len(self.angle_bits)}")
        if not all(0 <= b <= 8 for b in self.angle_bits):
            raise ValueError(f"{self.angle_bits} bits: want 0 to 8 for each level")

    @property
    def name(self) -> str:
        return f"polarquant-{''.join(map(str, self.angle_bits))}"

    @property
    def bits(self) -> float:
        group = 1 << len(self.angle_bits)  # coordinates that share a radius
        return (16 + sum(b * (group >> level) for level, b in enumerate(self.angle_bits, 1))) / group

    def encode(self, x: Array) -> PolarCode:
        y = Rotation(self.dim, self.rotation, self.seed).forward(vectors(x, self.dim))
        found, radius = polar_transform(y, len(self.angle_bits))
        codes = []
        for level, (angle, bits) in enumerate(zip(found, self.angle_bits, strict=True), 1):
            book = angles(level, bits)
            codes.append(nearest(angle, (book[:-1] + book[1:]) / 2))
        return PolarCode(tuple(codes), radius)

    def decode(self, code: PolarCode) -> Array:
        found = [
            lookup(angles(level, bits), codes, code.radius)
            for level, (codes, bits) in enumerate(zip(code.codes, self.angle_bits, strict=True), 1)
        ]
        return Rotation(self.dim, self.rotation, self.seed).inverse(polar_inverse(found, code.radius))
