"""Lloyd-Max codebooks for one coordinate of a randomly rotated vector.

After a random rotation a coordinate of a vector of length d and norm sqrt(d) has mean 0, variance 1 and the
density

    f(u) = f(0) (1 - u^2/d)^((d-3)/2)   on [-sqrt(d), sqrt(d)]

(TurboQuant, arXiv:2504.19874, Lemma 1, here with unit variance), which tends to N(0, 1) as d grows. The
codebook of B bits is the scalar quantizer of 2^B levels with the least mean squared error for that density.
The density is log-concave, so the Lloyd-Max conditions (each centroid is its cell's mean, each threshold the
midpoint of two centroids) have exactly one solution; Newton's method finds it, with closed forms for every
integral.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, special

Floats = NDArray[np.float64]
MAX_BITS = 8


class Marginal(NamedTuple):
    """The distribution of one coordinate, as vectorized functions of u >= 0."""

    edge: float  # supremum of the support
    density: Callable[[Floats], Floats]  # f(u)
    tail: Callable[[Floats], Floats]  # P(U > u)
    tail_mean: Callable[[Floats], Floats]  # integral of v f(v) over v > u


def marginal(dim: int | None) -> Marginal:
    """Coordinate of a uniform vector on the sphere of norm sqrt(dim), or N(0, 1) for ``dim=None``.

    Raises ValueError for dim < 4, where the density is not log-concave with a peak at 0.
    """
    if dim is None:
        peak = 1 / np.sqrt(2 * np.pi)
        return Marginal(
            edge=np.inf,
            density=lambda u: peak * np.exp(-u * u / 2),
            tail=lambda u: special.erfc(u / np.sqrt(2)) / 2,
            tail_mean=lambda u: peak * np.exp(-u * u / 2),
        )
    if dim < 4:
        raise ValueError(f"dimension {dim}: want at least 4")
    peak = np.exp(special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2)) / np.sqrt(np.pi * dim)
    half = (dim - 1) / 2

    def depth(u: Floats) -> Floats:
        return np.maximum(1 - u * u / dim, 0)  # the rounded edge may lie outside the sphere

    return Marginal(
        edge=float(np.sqrt(dim)),
        density=lambda u: peak * depth(u) ** (half - 1),
        # U^2/dim has the distribution Beta(1/2, half); the complement keeps the tail's relative precision.
        tail=lambda u: special.betainc(half, 0.5, depth(u)) / 2,
        tail_mean=lambda u: peak * dim / (2 * half) * depth(u) ** half,
    )


@dataclass(frozen=True)
class Codebook:
    """A symmetric quantizer of 2^bits levels for a coordinate of unit variance."""

    bits: int
    dim: int | None
    centroids: Floats  # (2^bits,), ascending
    thresholds: Floats  # (2^bits - 1,), midpoints of the centroids
    distortion: float  # mean squared error D(bits)

    @property
    def centroids_f32(self) -> NDArray[np.float32]:
        """Centroids as the cache format has them (docs/format.md, section 2)."""
        return self.centroids.astype(np.float32)

    @property
    def thresholds_f32(self) -> NDArray[np.float32]:
        """Midpoints of ``centroids_f32``, computed in binary32."""
        c = self.centroids_f32
        return (c[:-1] + c[1:]) / np.float32(2)

    @property
    def kappa(self) -> np.float32:
        """QJL weight of the residual's signs, sqrt(2/pi D): E|w| of a sketched residual coordinate."""
        return np.float32(np.sqrt(2 / np.pi * self.distortion))


@cache
def solve(bits: int, dim: int | None = 64) -> Codebook:
    """Lloyd-Max codebook of ``bits`` bits (1 to 8) for ``marginal(dim)``.

    The centroids are good to 1e-10, to 1e-13 up to 4 bits. Only the positive half is solved, so the result is
    symmetric to the bit. Raises ValueError for other arguments, and ArithmeticError for dimensions so large
    that rounding prevents that precision, where ``dim=None`` will do.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits: want 1 to {MAX_BITS}")
    law = marginal(dim)
    n = 2 ** (bits - 1)
    # Panter and Dite: an optimal quantizer of many levels has density f^(1/3), here close to N(0, 3).
    c = np.sqrt(3) * special.ndtri(0.5 + (np.arange(n) + 0.5) / (2 * n))
    if dim is not None:
        c /= np.sqrt(1 + c * c / dim)  # the Gaussian's tail, drawn inside the sphere

    for _ in range(50):
        t = np.concatenate([[0.0], (c[:-1] + c[1:]) / 2, [law.edge]])
        mass = -np.diff(law.tail(t))
        mean = -np.diff(law.tail_mean(t)) / mass
        # d mean[k] / d t[k] and d mean[k] / d t[k+1]; the outer ends 0 and edge do not move.
        inner = law.density(t[1:-1])
        low = np.concatenate([[0.0], inner * (mean[1:] - t[1:-1]) / mass[1:]])
        high = np.concatenate([inner * (t[1:-1] - mean[:-1]) / mass[:-1], [0.0]])
        # Jacobian of c - mean(t(c)), tridiagonal in solve_banded's layout.
        jacobian = np.zeros((3, n))
        jacobian[0, 1:] = -high[:-1] / 2
        jacobian[1] = 1 - (low + high) / 2
        jacobian[2, :-1] = -low[1:] / 2
        step = linalg.solve_banded((1, 1), jacobian, mean - c)
        c = c + step
        if np.max(np.abs(step)) < 1e-10:  # convergence is quadratic: the rest is rounding
            break
    else:
        raise ArithmeticError(f"no convergence for {bits} bits, dimension {dim}")

    centroids = np.concatenate([-c[::-1], c])
    thresholds = (centroids[:-1] + centroids[1:]) / 2
    centroids.flags.writeable = thresholds.flags.writeable = False  # shared by the cache
    # E[(U - Q)^2] = 1 - E[Q^2], as each level is the mean of its cell.
    return Codebook(bits, dim, centroids, thresholds, float(1 - 2 * np.sum(mass * mean * mean)))
