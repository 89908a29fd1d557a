"""Rotations are orthogonal, as random as they claim, and the format's own at 64."""

from __future__ import annotations

from functools import reduce
from itertools import islice

import numpy as np
import pytest
from ref_arrays import BOTH, unit

from ggml_tq import transform
from ggml_tq.params import DEFAULT
from ggml_tq.reference.rotation import Rotation, haar, hadamard_factors, hadamard_transform, signs
from ggml_tq.signs import ROTATION_SEED, sign_vector, splitmix64

HADAMARD_DIMS = [1, 2, 4, 12, 20, 28, 36, 64, 80, 96, 112, 128, 144, 192, 256, 512, 576]


@pytest.mark.parametrize("dim", HADAMARD_DIMS)
def test_hadamard_matrices(dim: int) -> None:
    h = reduce(np.kron, hadamard_factors(dim), np.ones((1, 1)))
    assert h.shape == (dim, dim)
    assert set(np.unique(h)) <= {-1, 1}
    np.testing.assert_array_equal(h @ h.T, dim * np.eye(dim))
    x = unit(3, dim).astype(np.float64)
    np.testing.assert_allclose(hadamard_transform(x), x @ h.T / np.sqrt(dim), atol=1e-13)
    np.testing.assert_allclose(hadamard_transform(x, transpose=True), x @ h / np.sqrt(dim), atol=1e-13)


@pytest.mark.parametrize("dim", [0, 3, 6, 66, 92])
def test_no_hadamard_matrix(dim: int) -> None:
    """92 has one, found by computer; Paley's constructions do not give it."""
    with pytest.raises(ValueError, match="dense"):
        Rotation(dim)


@BOTH
@pytest.mark.parametrize(("kind", "dim"), [("dense", 7), ("dense", 96), ("hadamard", 96), ("hadamard", 128)])
def test_inverse_and_norm(to: object, kind: str, dim: int) -> None:
    x = unit(10, dim).astype(np.float64).reshape(2, 5, dim)
    rotation = Rotation(dim, kind)
    y = rotation.forward(to(x))
    assert not np.allclose(np.asarray(y), x)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(y), axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(rotation.inverse(y)), x, atol=1e-13)


def test_seeds_differ() -> None:
    x = unit(4, 128)
    for kind in ("dense", "hadamard"):
        a, b = (Rotation(128, kind, seed).forward(x) for seed in (1, 2))
        assert np.max(np.abs(a - b)) > 0.1


def test_signs_are_the_formats() -> None:
    words = list(islice(splitmix64(ROTATION_SEED), 3))
    want = np.concatenate([sign_vector(w) for w in words])
    np.testing.assert_array_equal(signs(192, ROTATION_SEED), want)
    np.testing.assert_array_equal(signs(80, ROTATION_SEED), want[:80])


def test_is_the_formats_rotation_at_64() -> None:
    x = unit(50, 64)
    np.testing.assert_allclose(Rotation(64).forward(x), transform.rht(x, DEFAULT.rotation_signs), atol=1e-6)


def test_haar_moments() -> None:
    """Of entries of uniform orthogonal matrices: E r^2 = 1/d, E r^4 = 3/(d (d+2)), E trace^2 = 1, E trace = 0.

    A QR factorization without the correction of signs has E trace far from 0.
    """
    d, n = 8, 4000
    r = np.stack([haar(d, seed) for seed in range(n)])
    haar.cache_clear()
    assert np.mean(r[:, 0, 0] ** 2) == pytest.approx(1 / d, rel=0.1)
    assert np.mean(r**4) == pytest.approx(3 / (d * (d + 2)), rel=0.02)
    trace = np.trace(r, axis1=1, axis2=2)
    assert abs(np.mean(trace)) < 4 / np.sqrt(n)
    assert np.mean(trace**2) == pytest.approx(1, rel=0.1)
