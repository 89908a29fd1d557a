"""QJL: its estimator is unbiased with the published variance, and its weights are what they claim."""

from __future__ import annotations

import numpy as np
import pytest
from ref_arrays import BOTH, at_cosine, slope, unit, vnmse

from ggml_tq.reference import Qjl
from ggml_tq.reference.rotation import gaussian

PROJECTIONS = pytest.mark.parametrize("projection", ["gaussian", "orthogonal", "hadamard"])


@pytest.mark.parametrize("cosine", [0.0, 0.5, 1.0])
def test_mean_and_variance_over_sketches(cosine: float) -> None:
    """E = <q, k>, Var = (pi/2 |q|^2 |k|^2 - <q, k>^2) / m over Gaussian S, for one pair of vectors (QJL, section 3)."""
    d, m, n = 24, 16, 3000
    k = unit(1, d).astype(np.float64)
    q, k = 3 * at_cosine(k, cosine), 2 * k
    got = np.array([Qjl(d, m, seed=s).inner(q, Qjl(d, m, seed=s).encode(k))[0] for s in range(n)])
    gaussian.cache_clear()
    variance = (np.pi / 2 * 9 * 4 - (6 * cosine) ** 2) / m
    assert np.mean(got) == pytest.approx(6 * cosine, abs=4 * np.sqrt(variance / n))
    assert np.var(got) == pytest.approx(variance, rel=0.12)  # 4 standard errors


@BOTH
@PROJECTIONS
@pytest.mark.parametrize("m", [0, 8, 50])
def test_estimator_is_the_vectors_inner_product(to: object, projection: str, m: int) -> None:
    qjl = Qjl(20, m, projection)
    q, k = (to(unit(4, 20, seed).astype(np.float64)) for seed in (1, 2))
    code = qjl.encode(k)
    want = np.sum(np.asarray(q) * np.asarray(qjl.decode(code)), axis=-1)
    np.testing.assert_allclose(np.asarray(qjl.inner(q, code)), want, atol=1e-13)


@PROJECTIONS
@pytest.mark.parametrize("m", [0, 32, 128, 160])
def test_projections(projection: str, m: int) -> None:
    """Rows have mean square norm d, and those of a group are orthogonal where the projection says so."""
    d = 64
    s = Qjl(d, m, projection).project(np.eye(d)).T
    assert s.shape == (m or d, d)
    np.testing.assert_allclose(Qjl(d, m, projection).project_back(np.eye(len(s))), s, atol=1e-12)
    if projection == "gaussian":
        assert np.mean(s**2) == pytest.approx(1, rel=0.1)
        return
    for start in range(0, len(s), d):
        group = s[start : start + d]
        np.testing.assert_allclose(group @ group.T, d * np.eye(len(group)), atol=1e-10)
    if len(s) > d:
        assert np.max(np.abs(s[:d] @ s[d:].T)) > 1


@PROJECTIONS
def test_papers_weight(projection: str) -> None:
    """Error pi/2 for Gaussian S and pi/2 - 1 for orthogonal ones, slope 1, or 0.2 % more at d = 128."""
    x = unit(8000, 128)
    got = Qjl(128, projection=projection).reconstruct(x)
    excess = 1 if projection == "gaussian" else Qjl(128, projection=projection).mean_magnitude * np.sqrt(np.pi / 2)
    assert slope(x, got) == pytest.approx(excess, abs=0.01 if projection == "gaussian" else 0.001)
    assert vnmse(x, got) == pytest.approx(np.pi / 2 - (projection != "gaussian"), rel=0.02)
    if projection != "gaussian":
        assert excess == pytest.approx(1.00195, abs=2e-5)


@PROJECTIONS
@pytest.mark.parametrize("m", [0, 32, 96, 200])
def test_least_error_weight(projection: str, m: int) -> None:
    """Its error is the closed form's, and the weight that fits the vectors best is within sampling error."""
    d, n = 64, 6000
    qjl = Qjl(d, m, projection, "least-error")
    x = unit(n, d)
    got = qjl.reconstruct(x).astype(np.float64)
    best = np.sum(got * x) / np.sum(got * got)  # relative to the weight in use
    # One S serves all vectors: its own deviation is what the tolerance is for.
    assert best == pytest.approx(1, abs=0.04 if projection == "gaussian" else 0.02)
    mu, factor = qjl.mean_magnitude, qjl.factor
    assert vnmse(x, got) == pytest.approx(1 - mu * factor, abs=0.02)
    assert vnmse(x, got) < vnmse(x, Qjl(d, m, projection, "paper").reconstruct(x))


def test_least_errors_at_large_dim() -> None:
    """1 / (1 + 2/pi) for Gaussian S, 1 - 2/pi for orthogonal ones: a one-bit codebook's error."""
    for projection, want in (("gaussian", 1 / (1 + 2 / np.pi)), ("orthogonal", 1 - 2 / np.pi)):
        qjl = Qjl(4096, projection=projection, weight="least-error")
        assert 1 - qjl.mean_magnitude * qjl.factor == pytest.approx(want, rel=1e-3)


def test_refuses() -> None:
    for bad in ({"projection": "sparse"}, {"weight": "half"}):
        with pytest.raises(ValueError, match="no projection"):
            Qjl(64, **bad)
