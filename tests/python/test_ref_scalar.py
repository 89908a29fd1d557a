"""Upstream's block types against gguf-py's own code, and uniform quantization against its bound."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ref_arrays import BOTH, KINDS, unit, vnmse

from ggml_tq.reference import Q4_0, Q8_0, Absmax, Rotated

TYPES = [(Q4_0(), gguf.GGMLQuantizationType.Q4_0), (Q8_0(), gguf.GGMLQuantizationType.Q8_0)]
UPSTREAM = pytest.mark.parametrize(("q", "t"), TYPES, ids=[q.name for q, _ in TYPES])

# With subnormals, whose scales are 0. Halves and quarters meet ties; below 60000 the binary16 scales are finite.
numbers = st.one_of(st.floats(-6e4, 6e4, width=32), st.integers(-64, 64).map(lambda i: i / 4))
rows = hnp.arrays(np.float32, st.sampled_from([(32,), (3, 64), (2, 1, 32)]), elements=numbers)


@UPSTREAM
@settings(deadline=None)
@example(x=np.full((32,), 1e-42, np.float32))
@example(x=np.linspace(-1e-6, 2e-6, 32, dtype=np.float32))
@given(x=rows)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
def test_equals_upstream(q: Q4_0 | Q8_0, t: gguf.GGMLQuantizationType, x: np.ndarray) -> None:
    want = dequantize(quantize(x, t), t)
    for to in KINDS.values():
        np.testing.assert_array_equal(np.asarray(q.reconstruct(to(x))), want)


@UPSTREAM
def test_equals_upstream_on_many(q: Q4_0 | Q8_0, t: gguf.GGMLQuantizationType) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20000, 32)) * np.exp(2 * rng.standard_normal((20000, 1)))
    x[:1000] = rng.integers(-16, 17, (1000, 32)) / 2  # ties, and equal magnitudes of both signs
    x = x.astype(np.float32)
    for to in KINDS.values():
        np.testing.assert_array_equal(np.asarray(q.reconstruct(to(x))), dequantize(quantize(x, t), t))


@BOTH
@settings(deadline=None)
@given(b=st.integers(1, 8), x=hnp.arrays(np.float64, (2, 64), elements=st.floats(-1e6, 1e6)))
def test_absmax_bound(to: object, b: int, x: np.ndarray) -> None:
    got = np.asarray(Absmax(b).reconstruct(to(x)))
    top = np.max(np.abs(x.reshape(2, 2, 32)), axis=-1, keepdims=True)
    error = np.abs(got - x).reshape(2, 2, 32)
    assert np.all(error <= top * 2.0**-b * (1 + 1e-12) + 1e-300)  # the scale may be subnormal


@pytest.mark.parametrize(
    ("q", "published"),
    [
        (Absmax(3), 0.0315),  # exllamav3's grid
        (Absmax(4), 0.0079),
        (Q4_0(), 0.00737),
        (Q8_0(), 3e-5),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_error_on_rotated_vectors(q: Absmax | Q4_0 | Q8_0, published: float) -> None:
    """Relative squared error of Gaussian coordinates, which rotated ones are nearly: algorithms in the field."""
    x = unit(8000, 128)
    assert vnmse(x, Rotated(q).reconstruct(x)) == pytest.approx(published, rel=0.02 if published > 1e-4 else 0.1)


def test_rotation_tames_an_outlier() -> None:
    x = unit(2000, 64)
    x[:, 0] *= 40
    assert vnmse(x[:, 1:], Rotated(Q4_0(), block=64).reconstruct(x)[:, 1:]) < 0.5 * vnmse(
        x[:, 1:32], Q4_0().reconstruct(x)[:, 1:32]
    )
