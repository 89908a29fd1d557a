"""The Lloyd-Max solver against published digits and its own optimality conditions; the generated header."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from ggml_tq.codebook import Codebook, from_samples, lloyd_max, marginal, solve, solve_weighted, weighted_error

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ROOT / "scripts" / "generate_codebooks.py"
HEADER = ROOT / "ggml-tq" / "src" / "tq-codebooks.h"


@pytest.mark.parametrize(
    ("bits", "dim", "positive"),
    [
        # N(0, 1): J. Max, Quantizing for minimum distortion, 1960, Table I.
        (1, None, [0.7980]),
        (2, None, [0.4528, 1.510]),
        (3, None, [0.2451, 0.7560, 1.344, 2.152]),
        (4, None, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
        # The sphere: TurboQuant, section 3.1, gives sqrt(2/pi) at 1 bit and {0.453, 1.51} at 2 for large d.
        (1, 10**5, [np.sqrt(2 / np.pi)]),
        (2, 10**5, [0.453, 1.51]),
        # d = 64 by an independent fixed-point iteration with adaptive quadrature.
        (1, 64, [0.801007]),
        (2, 64, [0.452119, 1.499975]),
        (3, 64, [0.2437534, 0.7506581, 1.3293429, 2.1113114]),
    ],
)
def test_published_centroids(bits: int, dim: int | None, positive: list[float]) -> None:
    got = solve(bits, dim).centroids[2 ** (bits - 1) :]
    np.testing.assert_allclose(got, positive, rtol=1e-6 if dim == 64 else 5e-4)


@pytest.mark.parametrize(
    ("bits", "dim", "distortion"),
    [
        (1, None, 0.36338),
        (2, None, 0.117482),
        (3, None, 0.0345478),
        (4, None, 0.00950101),
        (8, None, 4.11851e-5),
        (1, 64, 0.358387),
        (2, 64, 0.114526),
        (3, 64, 0.0333908),
        (4, 64, 0.00913152),
        (2, 128, 0.116),
        (5, 256, 0.00247794),
    ],
)
def test_published_distortion(bits: int, dim: int | None, distortion: float) -> None:
    assert solve(bits, dim).distortion == pytest.approx(distortion, rel=3e-6)


@pytest.mark.parametrize("dim", [4, 64, 576, None])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_symmetric_and_sorted(bits: int, dim: int | None) -> None:
    book = solve(bits, dim)
    assert len(book.centroids) == 2**bits
    np.testing.assert_array_equal(book.centroids, -book.centroids[::-1])
    np.testing.assert_array_equal(book.thresholds_f32, -book.thresholds_f32[::-1])
    assert np.all(np.diff(book.centroids) > 0)


@pytest.mark.parametrize("dim", [64, None])
def test_fixed_point(dim: int | None) -> None:
    """Each centroid is the mean of its cell, and D is the error, both by adaptive quadrature."""
    book, law = solve(3, dim), marginal(dim)
    edges = np.concatenate([[0.0], book.thresholds[4:], [law.edge]])
    error = 0.0
    for low, high, c in zip(edges[:-1], edges[1:], book.centroids[4:], strict=True):

        def integral(weight: object, low: float = low, high: float = high) -> float:
            return integrate.quad(lambda u: weight(u) * law.density(u), low, high, epsabs=1e-13)[0]

        assert integral(lambda u: u) / integral(lambda u: 1) == pytest.approx(c, abs=1e-10)
        error += 2 * integral(lambda u, c=c: (u - c) ** 2)
    assert book.distortion == pytest.approx(error, abs=1e-11)


@pytest.mark.parametrize("dim", [4, 5, 64, 128, 576, None])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_closed_forms_agree_with_quadrature(bits: int, dim: int | None) -> None:
    """Newton over closed forms, and over numerical integrals of the density alone."""
    a, b = solve(bits, dim), solve_weighted(bits, dim)
    np.testing.assert_allclose(b.centroids, a.centroids, rtol=0, atol=1e-10)
    assert b.distortion == pytest.approx(a.distortion, abs=1e-12)
    assert weighted_error(a) == pytest.approx(a.distortion, abs=1e-12)


bits_ = st.integers(1, 8)
dims = st.one_of(st.integers(4, 2000), st.none())


@settings(deadline=None, max_examples=60)
@given(bits=bits_, dim=dims)
def test_solve_properties(bits: int, dim: int | None) -> None:
    """Sorted inside the support, below the asymptotic bound, better than the Gaussian's as the tails are shorter."""
    book = solve(bits, dim)
    assert np.all(np.diff(book.centroids) > 0)
    assert book.centroids[-1] < marginal(dim).edge
    assert book.distortion <= solve(bits, None).distortion * (1 + 1e-9)
    assert book.distortion < np.sqrt(3) * np.pi / 2 * 4.0**-bits
    if bits > 1:
        assert book.distortion < 0.4 * solve(bits - 1, dim).distortion


def check_weighted(book: Codebook, dim: int | None, weight: object) -> None:
    """A symmetric fixed point under the weight, to 1e-9 by adaptive quadrature, that no other scaling betters."""
    law, n = marginal(dim), len(book.centroids) // 2
    np.testing.assert_array_equal(book.centroids, -book.centroids[::-1])
    edges = np.concatenate([[0.0], book.thresholds[n:], [min(law.edge, 22.0)]])
    for k in {0, n // 2, n - 1}:
        c, low, high = book.centroids[n + k], edges[k], edges[k + 1]
        high = min(high, low + 12)  # the rest is below 1e-16 of it

        def moment(p: int, error: float, low: float = low, high: float = high, c: float = c) -> float:
            f = lambda u: weight(u) * law.density(u) * (u - c) ** p  # noqa: E731
            middle = [low + (high - low) * s for s in (0.001, 0.05, 0.3)]
            return integrate.quad(f, low, high, points=middle, epsabs=error, epsrel=0, limit=400)[0]

        mass = moment(0, 1e-13)
        assert moment(1, 1e-10 * mass) == pytest.approx(0, abs=1e-9 * mass)


@settings(deadline=None, max_examples=25)
@given(bits=st.integers(1, 6), dim=dims, power=st.floats(0, 6))
def test_weighted_by_power(bits: int, dim: int | None, power: float) -> None:
    book = solve_weighted(bits, dim, power)
    check_weighted(book, dim, lambda u: u**power)
    assert weighted_error(book, power) <= weighted_error(solve(bits, dim), power) * (1 + 1e-12)
    assert book.distortion >= solve(bits, dim).distortion * (1 - 1e-10)


@pytest.mark.parametrize("bits", [1, 3, 6, 8])
@pytest.mark.parametrize("weight", [lambda u: 1 + u * u, lambda u: np.exp(-u), lambda u: 1 / (0.1 + u)])
def test_weighted_by_function(bits: int, weight: object) -> None:
    book = solve_weighted(bits, 128, weight)
    check_weighted(book, 128, weight)
    assert weighted_error(book, weight) < weighted_error(solve(bits, 128), weight)


def test_weighted_in_closed_form() -> None:
    """One bit with |u|^p for N(0, 1): c = E|U|^(p+1) / E|U|^p."""
    for power, c in ((0, np.sqrt(2 / np.pi)), (1, np.sqrt(np.pi / 2)), (2, 2 * np.sqrt(2 / np.pi))):
        assert solve_weighted(1, None, power).centroids[1] == pytest.approx(c, abs=1e-10)
    for power in (-0.9, -0.5, 0.3):
        c = np.sqrt(2) * special.gamma(power / 2 + 1) / special.gamma(power / 2 + 0.5)
        assert solve_weighted(1, None, power).centroids[1] == pytest.approx(c, abs=1e-10)


def test_lloyd_max_of_the_uniform_density() -> None:
    for bits in range(1, 9):
        c, error = lloyd_max(bits, np.ones_like, 3.0)
        n = 2 ** (bits - 1)
        np.testing.assert_allclose(c, 3 * (np.arange(n) + 0.5) / n, atol=1e-10)
        assert error == pytest.approx((3 / n) ** 2 / 12, abs=1e-12)


def test_lloyd_max_of_the_laplace_density() -> None:
    """Two bits: published centroids 0.4198 and 1.8340 at unit variance."""
    c, error = lloyd_max(2, lambda u: np.exp(-np.sqrt(2) * u), 40.0)
    np.testing.assert_allclose(c, [0.4198, 1.8340], atol=2e-4)
    assert error == pytest.approx(0.1762, abs=1e-4)


@pytest.mark.parametrize("density", [lambda u: -np.ones_like(u), np.zeros_like, lambda u: np.where(u > 1, np.nan, 1.0)])
def test_lloyd_max_refuses(density: object) -> None:
    with pytest.raises(ValueError, match="density"):
        lloyd_max(2, density, 4.0)
    with pytest.raises(ValueError, match="want"):
        lloyd_max(9, np.ones_like, 4.0)
    with pytest.raises(ValueError, match="power"):
        solve_weighted(2, 64, -1.5)


# ---- from samples


def error_of(samples: np.ndarray, book: Codebook) -> float:
    q = book.centroids[np.searchsorted(book.thresholds, samples)]
    return float(np.mean((samples - q) ** 2))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(300, 3000), bits=bits_, tail=st.sampled_from([0, 0.3, 1]))
def test_samples_fixed_point(seed: int, n: int, bits: int, tail: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * np.exp(tail * rng.standard_normal(n)) * 10.0 ** rng.integers(-3, 4)
    book = from_samples(x, bits)
    c, half = book.centroids, len(book.centroids) // 2
    np.testing.assert_array_equal(c, -c[::-1])
    assert np.all(np.diff(c) > 0)
    # each centroid is the mean of the magnitudes nearest to it
    u = np.abs(x)
    cell = np.searchsorted(book.thresholds[half:], u)
    for k in np.unique(cell):
        assert np.mean(u[cell == k]) == pytest.approx(c[half + k], rel=1e-9)
    assert book.distortion == pytest.approx(error_of(x, book), rel=1e-9)
    # order and signs do not matter
    other = from_samples(rng.permutation(-x), bits)
    np.testing.assert_array_equal(other.centroids, c)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_samples_few_are_solved_exactly(bits: int) -> None:
    """Against all partitions of 10 magnitudes into runs."""
    for seed in range(20):
        u = np.sort(np.random.default_rng(seed).exponential(size=10))
        n = 2 ** (bits - 1)
        best = min(
            sum(len(run) * np.var(run) for run in np.split(u, cuts)) / len(u)
            for cuts in combinations(range(1, 10), n - 1)
        )
        assert from_samples(u, bits).distortion == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_samples_approach_the_density(bits: int) -> None:
    """Of a million Gaussians: no worse on them than the density's own optimum, and nearly that on others."""
    rng = np.random.default_rng(0)
    x, fresh = rng.standard_normal(1_000_000), rng.standard_normal(1_000_000)
    book, ideal = from_samples(x.astype(np.float32).reshape(1000, 1000), bits), solve(bits, None)
    assert book.distortion <= error_of(x, ideal) * (1 + 1e-9)
    assert error_of(fresh, book) < error_of(fresh, ideal) * (1.002 if bits <= 6 else 1.06)


def test_samples_of_other_shapes() -> None:
    """Two narrow peaks: the Gaussian's codebook wastes its levels, the calibrated one does not."""
    rng = np.random.default_rng(0)
    x = rng.choice([-2.0, 2.0], 100_000) + 0.1 * rng.standard_normal(100_000)
    assert from_samples(x, 3).distortion < 0.1 * error_of(x / np.std(x), solve(3, None)) * np.var(x)
    zeros = np.concatenate([np.zeros(1000), [1.0, 2.0]])
    assert from_samples(zeros, 1).centroids[1] == pytest.approx(3 / 1002)


@pytest.mark.parametrize(
    ("samples", "bits", "message"),
    [
        ([], 1, "distinct"),
        ([0.0, 0.0], 1, "distinct"),
        ([1.0, -1.0, 0.0], 2, "distinct"),
        ([1.0, np.nan], 1, "finite"),
        ([1.0, np.inf], 1, "finite"),
        ([1.0], 0, "want"),
        ([1.0], 9, "want"),
    ],
)
def test_samples_refuses(samples: list[float], bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_samples(samples, bits)


@pytest.mark.parametrize(("bits", "dim"), [(0, 64), (9, 64), (2, 3)])
def test_refuses(bits: int, dim: int) -> None:
    with pytest.raises(ValueError, match="want"):
        solve(bits, dim)


def test_header_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, GENERATE, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_header_literals_are_exact() -> None:
    text = HEADER.read_text()
    for bits in (1, 2, 3, 4):
        body = re.search(rf"TQ_CODEBOOK_{bits}B \\\n *{{(.*?)}}", text, re.DOTALL)[1]
        got = np.array([np.float32(x) for x in re.findall(r"[-+.e\d]+(?=f)", body)])
        np.testing.assert_array_equal(got, solve(bits).centroids_f32)
