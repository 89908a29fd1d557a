"""PolarQuant: the transform, the angles' distribution, and its size and error."""

from __future__ import annotations

import numpy as np
import pytest
from ref_arrays import BOTH, slope, unit, vnmse
from scipy import integrate, stats

from ggml_tq.reference import PolarQuant
from ggml_tq.reference.polar import angles, polar_inverse, polar_transform


def density(level: int, psi: np.ndarray) -> np.ndarray:
    """Of the angles of level 2 and above on [0, pi/2], up to a factor (Lemma 2)."""
    return np.sin(2 * psi) ** (2 ** (level - 1) - 1)


@BOTH
@pytest.mark.parametrize("levels", [1, 4, 6])
def test_transform_inverts(to: object, levels: int) -> None:
    x = unit(10, 64).astype(np.float64).reshape(2, 5, 64)
    found, radius = polar_transform(to(x), levels)
    assert [tuple(a.shape) for a in found] == [(2, 5, 64 >> level) for level in range(1, levels + 1)]
    np.testing.assert_allclose(np.asarray(polar_inverse(found, radius)), x, atol=1e-14)
    assert np.all((np.asarray(found[0]) >= 0) & (np.asarray(found[0]) <= 2 * np.pi))
    for a in found[1:]:
        assert np.all((np.asarray(a) >= 0) & (np.asarray(a) <= np.pi / 2))


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_distribution_of_angles(level: int) -> None:
    x = np.random.default_rng(0).standard_normal((4000, 16))
    psi = polar_transform(x, 4)[0][level - 1].ravel()
    if level == 1:
        cdf = lambda t: t / (2 * np.pi)  # noqa: E731
    else:
        grid = np.linspace(0, np.pi / 2, 2001)
        total = integrate.cumulative_simpson(density(level, grid), x=grid, initial=0)
        cdf = lambda t: np.interp(t, grid, total / total[-1])  # noqa: E731
    assert stats.kstest(psi, cdf).pvalue > 0.01


@pytest.mark.parametrize("level", [2, 3, 4, 7])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_codebooks_are_lloyd_max(level: int, bits: int) -> None:
    book = angles(level, bits)
    np.testing.assert_allclose(book + book[::-1], np.pi / 2, atol=1e-15)
    edges = np.concatenate([[0], (book[:-1] + book[1:]) / 2, [np.pi / 2]])
    for low, high, c in zip(edges[:-1], edges[1:], book, strict=True):
        mass = integrate.quad(lambda t: density(level, t), low, high, epsabs=1e-14)[0]
        mean = integrate.quad(lambda t: t * density(level, t), low, high, epsabs=1e-14)[0] / mass
        assert mean == pytest.approx(c, abs=1e-9)


def test_circle() -> None:
    """Level 1: no angle is further from its code than half a step, across 0 too."""
    psi = np.linspace(-np.pi, np.pi, 20001)
    x = np.stack([np.cos(psi), np.sin(psi)], axis=-1)
    q = PolarQuant(2, (3,), rotation="dense")
    got = q.reconstruct(x)
    cosine = np.sum(got * x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1)
    assert np.min(cosine) == pytest.approx(np.cos(np.pi / 8), abs=1e-4)


def test_papers_setting() -> None:
    """3.875 bits at dim 128. The radii are exact, so all error is in the angles."""
    q = PolarQuant(128)
    assert (q.bits, q.angle_bits) == (3.875, (4, 2, 2, 2))
    x = unit(4000, 128)
    got = q.reconstruct(x)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, rtol=1e-5)
    # |got| = |x| makes error 2 - 2 <x, got>
    assert vnmse(x, got) == pytest.approx(2 - 2 * slope(x, got), rel=1e-4)
    assert vnmse(x, got) == pytest.approx(expected_error((4, 2, 2, 2)), rel=0.01)


def expected_error(angle_bits: tuple[int, ...]) -> float:
    """2 - 2 E<x, got>: by level, independent angles a with codes b keep E cos(a - b) of the product of radii.

    At level l >= 2 the two halves have the same expected share, so E cos(a - b) = c^2 u + s^2 v with u = v.
    """
    kept = np.sinc(1 / 2 ** angle_bits[0])  # mean cosine in a sector of 2 pi / 2^b
    for level, bits in enumerate(angle_bits[1:], 2):
        book = angles(level, bits)

        def cosine(t: float, book: np.ndarray = book) -> float:
            return float(np.cos(t - book[np.argmin(np.abs(book - t))]))

        cuts = list((book[:-1] + book[1:]) / 2)
        total = integrate.quad(lambda t, level=level: density(level, t), 0, np.pi / 2)[0]
        mean = integrate.quad(lambda t, level=level: density(level, t) * cosine(t), 0, np.pi / 2, points=cuts)[0]
        kept *= mean / total
    return 2 - 2 * kept


@pytest.mark.parametrize("angle_bits", [(3, 1, 1, 1), (4, 3), (5, 3, 3, 3), (2, 0, 0, 0, 0, 0, 0), (6, 4, 4, 4)])
def test_error(angle_bits: tuple[int, ...]) -> None:
    x = unit(4000, 128)
    assert vnmse(x, PolarQuant(128, angle_bits).reconstruct(x)) == pytest.approx(expected_error(angle_bits), rel=0.01)


@pytest.mark.parametrize(("dim", "angle_bits"), [(8, (4, 2, 2, 2)), (64, ()), (64, (9, 2)), (64, (-1,))])
def test_refuses(dim: int, angle_bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="want"):
        PolarQuant(dim, angle_bits)
