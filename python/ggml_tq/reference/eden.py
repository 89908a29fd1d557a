"""DRIVE (arXiv:2105.08339) and EDEN (arXiv:2108.08842): rotate, round to a codebook, scale.

With R a random rotation, y = sqrt(d) R x / |x| has coordinates close to N(0, 1). Q is y rounded coordinate by
coordinate to the Lloyd-Max codebook of b bits, and the estimate is S R^T Q. The scales:

- biased: S = <Rx, Q> / |Q|^2, of least squared error (DRIVE section 3, EDEN section 3);
- unbiased: S = |x|^2 / <Rx, Q>, which gives the estimate exactly x's own component along x (DRIVE section 4.2,
  EDEN section 3). Its squared error is D / (1 - D) where the biased one's is D;
- matched: S = |x| / |Q|, which keeps the norm. Of neither paper; caches in the field use it.

DRIVE is b = 1: Q = sign(Rx), so S = |Rx|_1 / d (biased) or |x|^2 / |Rx|_1 (unbiased).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from array_api_compat import array_namespace

from ggml_tq.codebook import solve
from ggml_tq.reference.protocol import Array, Coder, divide, dot, norm
from ggml_tq.reference.rotation import Kind, Rotation
from ggml_tq.reference.rounding import lookup, nearest
from ggml_tq.signs import ROTATION_SEED

Scale = Literal["biased", "unbiased", "matched"]


class EdenCode(NamedTuple):
    codes: Array  # (..., dim), uint8
    scale: Array  # (..., 1): S


@dataclass(frozen=True)
class Eden(Coder):
    """EDEN with b bits, 1 to 8. ``codebook_dim`` None is the paper's codebook for N(0, 1)."""

    dim: int
    b: int
    scale: Scale = "biased"
    rotation: Kind = "hadamard"
    codebook_dim: int | None = None
    seed: int = ROTATION_SEED

    @property
    def name(self) -> str:
        return f"eden_{self.scale}-{self.b}b"

    @property
    def bits(self) -> float:
        return self.b + 16 / self.dim

    def encode(self, x: Array) -> EdenCode:
        y = Rotation(self.dim, self.rotation, self.seed).forward(x)
        book = solve(self.b, self.codebook_dim)
        index = nearest(divide(y, norm(y)) * self.dim**0.5, book.thresholds)
        q = lookup(book.centroids, index, y)
        if self.scale == "biased":
            s = dot(y, q) / dot(q, q)
        elif self.scale == "unbiased":
            s = divide(dot(y, y), dot(y, q))
        else:
            s = norm(y) / norm(q)
        return EdenCode(index, s)

    def decode(self, code: EdenCode) -> Array:
        q = lookup(solve(self.b, self.codebook_dim).centroids, code.codes, code.scale)
        return Rotation(self.dim, self.rotation, self.seed).inverse(code.scale * q)


class DriveCode(NamedTuple):
    sign: Array  # (..., dim), -1 or 1
    scale: Array  # (..., 1): S


@dataclass(frozen=True)
class Drive(Coder):
    """DRIVE: one bit a coordinate. The same values as ``Eden`` of one bit, by the paper's own formulas."""

    dim: int
    scale: Scale = "biased"
    rotation: Kind = "hadamard"
    seed: int = ROTATION_SEED

    @property
    def name(self) -> str:
        return f"drive_{self.scale}"

    @property
    def bits(self) -> float:
        return 1 + 16 / self.dim

    def encode(self, x: Array) -> DriveCode:
        xp = array_namespace(x)
        y = Rotation(self.dim, self.rotation, self.seed).forward(x)
        l1 = xp.sum(xp.abs(y), axis=-1, keepdims=True)
        if self.scale == "biased":
            s = l1 / self.dim
        elif self.scale == "unbiased":
            s = divide(dot(y, y), l1)
        else:
            s = norm(y) / self.dim**0.5
        return DriveCode(xp.where(y > 0, xp.ones_like(y), -xp.ones_like(y)), s)

    def decode(self, code: DriveCode) -> Array:
        return Rotation(self.dim, self.rotation, self.seed).inverse(code.scale * code.sign)
