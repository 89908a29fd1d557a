"""Random rotations: dense ones, and randomized Hadamard transforms.

TurboQuant (arXiv:2504.19874, section 3.1) rotates by the Q factor of a Gaussian matrix, after which a vector's
direction is uniform on the sphere. DRIVE (arXiv:2105.08339, section 6) and EDEN (arXiv:2108.08842, section 5) put a
randomized Hadamard transform in its place: random signs, then a Hadamard matrix.

A Hadamard matrix of order m has entries +1 and -1 and orthogonal rows. Sylvester's has an order 2^k, Paley's
(R. Paley, On orthogonal matrices, 1933) q + 1 or 2 (q + 1) for primes q; the Kronecker product of two is another. So
96 = 8 * 12 and 80 = 4 * 20 are mixed as completely as 64 and 128 are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from scipy import linalg  # type: ignore[import-untyped]

from ggml_tq.reference.protocol import Array, Quantizer, constant, vectors
from ggml_tq.signs import ROTATION_SEED, sign_vector, splitmix64

Floats = NDArray[np.float64]
Kind = Literal["dense", "hadamard"]
RADIX = 16  # a product by a 16x16 matrix takes the place of four stages of additions


@cache
def gaussian(rows: int, cols: int, seed: int) -> Floats:
    """Independent N(0, 1) numbers (rows, cols)."""
    matrix = np.random.default_rng(seed).standard_normal((rows, cols))
    matrix.flags.writeable = False  # shared by the cache
    return matrix


@cache
def haar(dim: int, seed: int) -> Floats:
    """A uniformly (Haar) distributed orthogonal matrix (dim, dim)."""
    q, r = np.linalg.qr(gaussian(dim, dim, seed))
    matrix = q * np.sign(np.diag(r))  # without this, the distribution depends on LAPACK's choice of signs
    matrix.flags.writeable = False
    return matrix


@cache
def signs(dim: int, seed: int) -> Floats:
    """(dim,) of +1 and -1: the bits of SplitMix64's outputs, low bit first, 1 for -1 (docs/format.md, section 3)."""
    words = islice(splitmix64(seed), -(-dim // 64))
    return np.concatenate([sign_vector(w) for w in words])[:dim].astype(np.float64)


def _is_prime(q: int) -> bool:
    return q > 2 and all(q % p for p in range(2, int(q**0.5) + 1))


def _paley(order: int) -> Floats | None:
    """A Hadamard matrix of Paley's first or second kind, or None if there is none of that order over a prime field."""
    for q, second in ((order - 1, False), (order // 2 - 1, True)):
        if order % 4 or not _is_prime(q) or q % 4 != (1 if second else 3):
            continue
        squares = np.zeros(q)
        squares[np.arange(1, q) ** 2 % q] = 1
        residue = np.where(squares == 1, 1.0, -1.0)  # the quadratic character of 0..q-1
        residue[0] = 0
        core = np.zeros((q + 1, q + 1))
        core[0, 1:] = 1
        core[1:, 0] = 1 if second else -1
        core[1:, 1:] = residue[np.subtract.outer(np.arange(q), np.arange(q)) % q]
        eye = np.eye(q + 1)
        if not second:
            return core + eye
        return np.kron(core, [[1, 1], [1, -1]]) + np.kron(eye, [[1, -1], [-1, -1]])
    return None


@cache
def hadamard_factors(dim: int) -> tuple[Floats, ...]:
    """Small Hadamard matrices whose Kronecker product has the order ``dim``.

    Raises ValueError where Sylvester's and Paley's constructions have none, as for every dim above 2 that is
    not a multiple of 4.
    """
    twos = dim & -dim
    odd = dim // twos if dim > 0 else 0
    if odd == 1:
        factors = []
    else:
        for extra in (4, 8, 16, 32):
            paley = _paley(odd * extra) if extra <= twos else None
            if paley is not None:
                factors, twos = [paley], twos // extra
                break
        else:
            raise ValueError(f"dimension {dim}: no Hadamard matrix is known here, use a dense rotation")
    while twos > 1:
        radix = min(twos, RADIX)
        factors.append(linalg.hadamard(radix).astype(np.float64))
        twos //= radix
    return tuple(factors)


def hadamard_transform(x: Array, *, transpose: bool = False) -> Array:
    """H x / sqrt(d) over the last axis, H the Kronecker product of ``hadamard_factors(d)``; or H^T x / sqrt(d)."""
    xp = array_namespace(x)
    shape, dim = x.shape, x.shape[-1]
    for factor in reversed(hadamard_factors(dim)):
        order = factor.shape[0]
        matrix = constant((factor if transpose else factor.T) / np.sqrt(order), x)
        x = xp.reshape(x, (-1, dim // order, order))
        # One axis done; it moves to the front, and the next one is last.
        x = xp.reshape(xp.matrix_transpose(x @ matrix), (-1, dim))
    return xp.reshape(x, shape)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal transform of vectors of ``dim`` coordinates, drawn by ``seed``."""

    dim: int
    kind: Kind = "hadamard"
    seed: int = ROTATION_SEED

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "hadamard"):
            raise ValueError(f"rotation {self.kind!r}: want 'dense' or 'hadamard'")
        if self.kind == "hadamard":
            hadamard_factors(self.dim)  # raises where there is none

    def forward(self, x: Array) -> Array:
        """R x for every vector of ``x`` (..., dim)."""
        x = vectors(x, self.dim)
        if self.kind == "dense":
            return x @ constant(haar(self.dim, self.seed).T, x)
        return hadamard_transform(x * constant(signs(self.dim, self.seed), x))

    def inverse(self, y: Array) -> Array:
        """R^T y, the inverse of ``forward``."""
        y = vectors(y, self.dim)
        if self.kind == "dense":
            return y @ constant(haar(self.dim, self.seed), y)
        return hadamard_transform(y, transpose=True) * constant(signs(self.dim, self.seed), y)


@dataclass(frozen=True)
class Rotated:
    """Another quantizer in a rotated basis, as upstream has its own types in a KV cache.

    ``block`` coordinates are rotated at a time (0: all of them); upstream's blocks have 64.
    """

    inner: Quantizer
    kind: Kind = "hadamard"
    block: int = 0
    seed: int = ROTATION_SEED

    @property
    def name(self) -> str:
        return f"{self.inner.name}+{self.kind}{self.block or ''}"

    @property
    def bits(self) -> float:
        return self.inner.bits

    def reconstruct(self, x: Array) -> Array:
        xp = array_namespace(x)
        vectors(x)  # raises for what are none
        block = self.block or x.shape[-1]
        if x.shape[-1] % block:
            raise ValueError(f"shape {tuple(x.shape)}: {block} must divide the length of a vector")
        rotation = Rotation(block, self.kind, self.seed)
        blocks = (*x.shape[:-1], x.shape[-1] // block, block)
        y = rotation.forward(xp.reshape(x, blocks))
        y = self.inner.reconstruct(xp.reshape(y, x.shape))
        y = rotation.inverse(xp.reshape(y, blocks))
        return xp.astype(xp.reshape(y, x.shape), x.dtype)
