"""Lloyd-Max codebooks for one coordinate of a randomly rotated vector.

After a random rotation a coordinate of a vector of length d and norm sqrt(d) has mean 0, variance 1 and the
density

    f(u) = f(0) (1 - u^2/d)^((d-3)/2)   on [-sqrt(d), sqrt(d)]

(TurboQuant, arXiv:2504.19874, Lemma 1, here with unit variance), which tends to N(0, 1) as d grows. The
codebook of B bits is the scalar quantizer of 2^B levels with the least mean squared error for that density.
The density is log-concave, so the Lloyd-Max conditions (each centroid is its cell's mean, each threshold the
midpoint of two centroids) have exactly one solution; Newton's method finds it, with closed forms for every
integral (``solve``).

``lloyd_max`` does the same for any symmetric density by numerical integration, and so for weighted errors
(``solve_weighted``); ``from_samples`` for measured coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, special  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
MAX_BITS = 8
GRID = 1024  # places where the cells of a calibrated codebook may end at first


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
    half = (dim - 1) / 2
    peak = _gamma_ratio(half) / np.sqrt(np.pi * dim)

    def depth(u: Floats) -> Floats:
        return np.maximum(1 - u * u / dim, 0)  # the rounded edge may lie outside the sphere

    return Marginal(
        edge=float(np.sqrt(dim)),
        density=lambda u: peak * depth(u) ** (half - 1),
        # U^2/dim has the distribution Beta(1/2, half); the complement keeps the tail's relative precision.
        tail=lambda u: special.betainc(half, 0.5, depth(u)) / 2,
        tail_mean=lambda u: peak * dim / (2 * half) * depth(u) ** half,
    )


def _gamma_ratio(z: float) -> float:
    """Gamma(z + 1/2) / Gamma(z) to rounding, where the difference of their logarithms would lose three digits.

    Stirling's series in 1/w at w = z + 200, and the functional equation from there down to z.
    """
    w = z + 200
    series = np.polynomial.polynomial.polyval(1 / w, [1, -1 / 8, 1 / 128, 5 / 1024, -21 / 32768])
    k = np.arange(200)
    return float(np.sqrt(w) * series * np.prod((z + k) / (z + k + 0.5)))


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

    def cells(t: Floats) -> tuple[Floats, Floats]:
        mass = -np.diff(law.tail(t))
        return mass, -np.diff(law.tail_mean(t)) / mass

    c, mass, mean = _newton(c, cells, law.density, law.edge)
    # E[(U - Q)^2] = 1 - E[Q^2], as each level is the mean of its cell.
    return _symmetric(bits, dim, c, float(1 - 2 * np.sum(mass * mean * mean)))


def _symmetric(bits: int, dim: int | None, positive: Floats, distortion: float) -> Codebook:
    centroids = np.concatenate([-positive[::-1], positive])
    thresholds = (centroids[:-1] + centroids[1:]) / 2
    centroids.flags.writeable = thresholds.flags.writeable = False  # shared by the cache
    return Codebook(bits, dim, centroids, thresholds, distortion)


def _newton(
    c: Floats,
    cells: Callable[[Floats], tuple[Floats, Floats]],
    density: Callable[[Floats], Floats],
    edge: float,
) -> tuple[Floats, Floats, Floats]:
    """The positive centroids of a Lloyd-Max quantizer, from ascending ones ``c``, and their cells' masses and means.

    ``cells`` gives masses and means of the cells between ascending thresholds. Newton's step is taken where it keeps
    the order and comes nearer to the fixed point, else Lloyd's, which always lowers the error. Raises
    ArithmeticError where the steps do not fall below 1e-10 of the codebook's range.
    """
    previous = np.inf
    for _ in range(500):
        t = np.concatenate([[0.0], (c[:-1] + c[1:]) / 2, [edge]])
        mass, mean = cells(t)
        # d mean[k] / d t[k] and d mean[k] / d t[k+1]; the outer ends 0 and edge do not move.
        inner = density(t[1:-1])
        low = np.concatenate([[0.0], inner * (mean[1:] - t[1:-1]) / mass[1:]])
        high = np.concatenate([inner * (t[1:-1] - mean[:-1]) / mass[:-1], [0.0]])
        # Jacobian of c - mean(t(c)), tridiagonal in solve_banded's layout.
        jacobian = np.zeros((3, len(c)))
        jacobian[0, 1:] = -high[:-1] / 2
        jacobian[1] = 1 - (low + high) / 2
        jacobian[2, :-1] = -low[1:] / 2
        residual = float(np.max(np.abs(mean - c)))
        step = linalg.solve_banded((1, 1), jacobian, mean - c)
        new = c + step
        sound = new[0] > 0 and new[-1] < edge and bool(np.all(np.diff(new) > 0))
        c = new if sound and residual < previous else mean
        previous = residual
        if sound and np.max(np.abs(step)) < 1e-10 * c[-1]:  # convergence is quadratic: the rest is rounding
            return c, mass, mean
    raise ArithmeticError(f"no convergence for {2 * len(c)} levels")


@cache
def _tanh_sinh(points: int = 257, reach: float = 5.5) -> tuple[Floats, Floats]:
    """Nodes in (0, 1] and weights of the double exponential rule, to rounding even for powers of u down to -0.9.

    H. Takahasi and M. Mori, Double exponential formulas for numerical integration, 1974.
    """
    h = np.linspace(-reach, reach, points)
    u = np.pi / 2 * np.sinh(h)
    nodes = special.expit(2 * u)  # (1 + tanh u) / 2
    return nodes, np.pi / 4 * np.cosh(h) / np.cosh(u) ** 2 * (h[1] - h[0])


def _integrate(f: Callable[[Floats], Floats], edges: Floats) -> Floats:
    """Integrals of ``f`` between successive ``edges``; f may add leading axes to its argument's."""
    nodes, weights = _tanh_sinh()
    width = np.diff(edges)[:, None]
    return np.asarray(np.sum(f(edges[:-1, None] + width * nodes) * weights * width, axis=-1))


def lloyd_max(bits: int, density: Callable[[Floats], Floats], edge: float) -> tuple[Floats, float]:
    """Positive centroids (2^(bits-1),) and mean squared error of the quantizer of least error for ``density``.

    The density is symmetric and given for 0 <= u <= edge, up to a factor, vectorized and positive inside. It may
    vanish at the ends or have a singularity u^p, p >= -0.9, at 0, but is smooth between them. The centroids are good
    to 1e-10 of the largest one. They are a local optimum, and the only one where the density's positive half is
    log-concave.
    Raises ValueError for ``bits`` outside 1 to 8 and for a density that is negative, infinite or zero everywhere,
    ArithmeticError where there is no convergence (a density with steps).
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits: want 1 to {MAX_BITS}")
    n = 2 ** (bits - 1)
    # Panter and Dite: an optimal quantizer of many levels has density f^(1/3).
    grid = np.linspace(0, edge, 20001)
    middle = (grid[:-1] + grid[1:]) / 2
    values = density(middle)
    if not np.all(np.isfinite(values)) or np.any(values < 0) or not np.any(values > 0):
        raise ValueError("the density must be finite and not negative, and not zero everywhere")
    total = np.concatenate([[0.0], np.cumsum(np.cbrt(values))])
    c = np.interp((np.arange(n) + 0.5) / n * total[-1], total, grid)

    def cells(t: Floats) -> tuple[Floats, Floats]:
        mass, moment = _integrate(lambda u: density(u) * np.stack([np.ones_like(u), u]), t)
        return mass, moment / mass

    c, mass, _ = _newton(c, cells, density, edge)
    t = np.concatenate([[0.0], (c[:-1] + c[1:]) / 2, [edge]])
    error = _integrate(lambda u: density(u) * (u - c[:, None]) ** 2, t)
    return c, float(np.sum(error) / np.sum(mass))


def _support(dim: int | None) -> float:
    """Where to stop integrating: the sphere's edge, or where the normal density has fallen below 1e-100."""
    return min(marginal(dim).edge, 22.0)


@lru_cache(maxsize=64)  # callers' functions are not kept for ever
def solve_weighted(bits: int, dim: int | None = 64, weight: float | Callable[[Floats], Floats] = 0.0) -> Codebook:
    """Codebook of least E[w(U) (U - Q)^2] for ``marginal(dim)``.

    ``weight`` is p >= -0.9 for w(u) = |u|^p, or w itself: a vectorized function of u >= 0, positive inside the
    support. ``distortion`` remains the unweighted squared error, which ``kappa`` needs; ``weighted_error`` gives the
    other. Errors and precision are those of ``lloyd_max``, of whose quantizer this is a case.
    """
    law = marginal(dim)
    w = _weight(weight)
    c, _ = lloyd_max(bits, lambda u: w(u) * law.density(u), _support(dim))
    return _symmetric(bits, dim, c, weighted_error(_symmetric(bits, dim, c, 0.0)))


def weighted_error(book: Codebook, weight: float | Callable[[Floats], Floats] = 0.0) -> float:
    """E[w(U) (U - Q)^2] / E[w(U)] of a symmetric codebook for ``marginal(book.dim)``; w as in ``solve_weighted``."""
    law, w = marginal(book.dim), _weight(weight)
    n = len(book.centroids) // 2
    c, edges = book.centroids[n:], np.concatenate([book.thresholds[n - 1 :], [_support(book.dim)]])
    one = _integrate(lambda u: w(u) * law.density(u), edges)
    error = _integrate(lambda u: w(u) * law.density(u) * (u - c[:, None]) ** 2, edges)
    return float(np.sum(error) / np.sum(one))


def _weight(weight: float | Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    if callable(weight):
        return weight
    power = float(weight)
    if not power >= -0.9:
        raise ValueError(f"weight |u|^{power:g}: want a power of at least -0.9")
    return lambda u: np.asarray(u**power)


def from_samples(samples: ArrayLike, bits: int) -> Codebook:
    """Lloyd-Max codebook of measured coordinates, of any shape and scale: a calibrated codebook.

    Symmetric: a sample counts as much at -u as at u. The centroids are a fixed point of Lloyd's iteration on the
    samples: each is the mean of those nearest to it (ties to the lower magnitude), to rounding. Deterministic, and
    independent of the samples' order. ``dim`` is None and ``distortion`` the samples' mean squared error, in their own
    unit squared. A million samples take about a second at 8 bits, less below.

    Raises ValueError for samples that are not finite or have fewer than 2^(bits-1) distinct magnitudes above 0.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits: want 1 to {MAX_BITS}")
    u = np.sort(np.abs(np.asarray(samples, dtype=np.float64)), axis=None)
    n = 2 ** (bits - 1)
    if not np.all(np.isfinite(u)):
        raise ValueError("a sample is not finite")
    distinct = 1 + np.count_nonzero(np.diff(u)) - (u[0] == 0) if len(u) else 0
    if distinct < n:
        raise ValueError(f"{distinct} distinct magnitudes: want at least {n} for {bits} bits")
    sums = np.concatenate([[0.0], np.cumsum(u)])
    squares = float(np.sum(u * u))

    ends = _group(u, sums, n)
    previous = np.full_like(ends, -1)
    c = np.diff(sums[ends]) / np.diff(ends)
    while not np.array_equal(previous, ends):  # every change lowers the error, so it ends
        previous = ends.copy()
        ends[1:-1] = np.searchsorted(u, (c[:-1] + c[1:]) / 2, side="right")
        count = np.diff(ends)
        # an empty cell keeps its place between its neighbours
        c = np.where(count > 0, np.diff(sums[ends]) / np.maximum(count, 1), c)
    if not np.all(np.diff(np.concatenate([[0.0], c])) > 0):
        raise ValueError(f"too few distinct magnitudes for {bits} bits")
    error = squares - 2 * np.sum(c * np.diff(sums[ends])) + np.sum(c * c * count)
    return _symmetric(bits, None, c, float(max(error, 0.0) / len(u)))


def _group(u: Floats, sums: Floats, n: int) -> NDArray[np.int64]:
    """Ends (n + 1,) of the n runs of sorted magnitudes whose own means are nearest to them, by dynamic programming.

    Runs end on a grid of about a thousand places, half of them at equal counts and half at equal distances; the
    best ones are a start from which Lloyd's iteration, which alone would stop far away, has little left to do.
    """
    values = np.unique(u)
    values = values[values > 0]  # zeros belong to the first run
    if len(values) > GRID:
        places = np.linspace(0, len(u) - 1, GRID // 2).astype(np.int64)
        values = np.unique(np.concatenate([u[places], np.linspace(0, u[-1], GRID // 2)]))
    ends = np.unique(np.concatenate([[0], np.searchsorted(u, values[values > 0], side="right")]))
    # A run from i to j lowers the error by (sum of u)^2 / count against all levels at 0.
    count = np.subtract.outer(ends, ends).T
    gain = np.where(count > 0, np.subtract.outer(sums[ends], sums[ends]).T ** 2 / np.maximum(count, 1), -np.inf)
    best, back = gain[0], []
    for _ in range(n - 1):
        total = best[:, None] + gain
        back.append(np.argmax(total, axis=0))
        best = np.take_along_axis(total, back[-1][None], axis=0)[0]
    path = [len(ends) - 1]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return np.asarray(ends[[0, *reversed(path)]])
