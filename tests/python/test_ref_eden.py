"""DRIVE and EDEN: their closed forms vector by vector, and their published errors."""

from __future__ import annotations

import numpy as np
import pytest
from ref_arrays import BOTH, at_cosine, inner_error, unit, vnmse

from ggml_tq.codebook import solve
from ggml_tq.reference import Drive, Eden, Rotation, TurboQuantProd
from ggml_tq.reference.rounding import lookup

DIM = 128
X = unit(8000, DIM)
SOME = (3 * unit(50, DIM, seed=5)).astype(np.float64)


def rounded(q: Eden, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rx and Q of vectors."""
    y = Rotation(q.dim, q.rotation, q.seed).forward(x)
    return y, lookup(solve(q.b, q.codebook_dim).centroids, q.encode(x).codes, x)


@BOTH
@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_closed_forms(to: object, b: int) -> None:
    y, q = rounded(Eden(DIM, b), SOME)
    xx, xq, qq = (np.sum(v, axis=-1) for v in (y * y, y * q, q * q))

    biased = np.asarray(Eden(DIM, b, "biased").reconstruct(to(SOME)))
    np.testing.assert_allclose(np.sum((biased - SOME) ** 2, axis=-1), xx - xq**2 / qq, rtol=1e-8)
    unbiased = np.asarray(Eden(DIM, b, "unbiased").reconstruct(to(SOME)))
    np.testing.assert_allclose(np.sum(unbiased * SOME, axis=-1), xx, rtol=1e-10)
    matched = np.asarray(Eden(DIM, b, "matched").reconstruct(to(SOME)))
    np.testing.assert_allclose(np.sum(matched**2, axis=-1), xx, rtol=1e-10)


@BOTH
@pytest.mark.parametrize("scale", ["biased", "unbiased", "matched"])
@pytest.mark.parametrize("rotation", ["dense", "hadamard"])
def test_drive_is_eden_of_one_bit(to: object, scale: str, rotation: str) -> None:
    drive, eden = Drive(DIM, scale, rotation), Eden(DIM, 1, scale, rotation)
    got = np.asarray(drive.reconstruct(to(SOME)))
    np.testing.assert_allclose(got, np.asarray(eden.reconstruct(to(SOME))), atol=1e-12)


def test_drive_scales() -> None:
    """|Rx|_1 / d and |x|^2 / |Rx|_1 (DRIVE, sections 3 and 4.2)."""
    l1 = np.sum(np.abs(Rotation(DIM).forward(SOME)), axis=-1)
    np.testing.assert_allclose(Drive(DIM, "biased").encode(SOME).scale[:, 0], l1 / DIM)
    np.testing.assert_allclose(Drive(DIM, "unbiased").encode(SOME).scale[:, 0], 9 / l1, rtol=1e-6)


@pytest.mark.parametrize("scale", ["biased", "unbiased"])
@pytest.mark.parametrize("rotation", ["dense", "hadamard"])
def test_drive_errors(scale: str, rotation: str) -> None:
    """(1 - 2/pi)(1 - 1/d) biased (DRIVE, section 3), pi/2 - 1 unbiased for large d (section 4.2)."""
    want = (1 - 2 / np.pi) * (1 - 1 / DIM) if scale == "biased" else np.pi / 2 - 1
    rel = 0.004 if scale == "biased" else 0.02
    assert vnmse(X, Drive(DIM, scale, rotation).reconstruct(X)) == pytest.approx(want, rel=rel)


@pytest.mark.parametrize("rotation", ["dense", "hadamard"])
@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_errors(rotation: str, b: int) -> None:
    """D biased and D / (1 - D) unbiased, less by about 1/d as the scale fits each vector."""
    d = solve(b, None).distortion
    biased = vnmse(X, Eden(DIM, b, "biased", rotation).reconstruct(X))
    assert d * (1 - 6 / DIM) < biased < d
    unbiased = vnmse(X, Eden(DIM, b, "unbiased", rotation).reconstruct(X))
    assert unbiased == pytest.approx(biased / (1 - biased), rel=0.01)  # Jensen: a little more


@pytest.mark.parametrize(("b", "published"), [(2, 0.1304), (3, 0.0344), (4, 0.00928)])
def test_published_inner_products(b: int, published: float) -> None:
    y = unit(*X.shape, seed=3)
    for scale in ("unbiased", "biased"):
        error = inner_error(y, X, Eden(DIM, b, scale).reconstruct(X))
        # 8000 squares of Gaussians: a standard error of 1.6 %
        assert error == pytest.approx(published if scale == "unbiased" else published / (1 + published), rel=0.06)


def test_two_bits_beat_three_of_prod() -> None:
    """arXiv:2604.18555's claim, which holds for the Gaussian S as printed and not for an orthogonal one."""
    y = at_cosine(X, 0.5)
    eden = inner_error(y, X, Eden(DIM, 2, "unbiased").reconstruct(X))
    assert eden < 0.7 * inner_error(y, X, TurboQuantProd(DIM, 3, "gaussian").reconstruct(X))
    assert eden > 1.3 * inner_error(y, X, TurboQuantProd(DIM, 3, "orthogonal").reconstruct(X))
    for b in (2, 3, 4):
        same = inner_error(y, X, Eden(DIM, b, "unbiased").reconstruct(X))
        for projection, factor in (("gaussian", 4), ("orthogonal", 1.5), ("hadamard", 1.5)):
            assert same * factor < inner_error(y, X, TurboQuantProd(DIM, b, projection).reconstruct(X))
