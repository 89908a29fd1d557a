"""The NumPy reference against docs/format.md and the theory of its error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ggml_tq import signs, transform
from ggml_tq.cache_types import CODEBOOK_TYPES, TYPES, TqType
from ggml_tq.codec import decode, encode, encode_query, query_dot
from ggml_tq.params import DEFAULT

ALL = pytest.mark.parametrize("tq", TYPES.values(), ids=TYPES)
UNBIASED = pytest.mark.parametrize("tq", [t for t in TYPES.values() if t.kind != "mse"], ids=lambda t: t.name)
SCALAR = pytest.mark.parametrize("tq", CODEBOOK_TYPES.values(), ids=CODEBOOK_TYPES)

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
rows = hnp.arrays(np.float32, st.sampled_from([(64,), (2, 128), (1, 3, 64)]), elements=floats)
moderate = hnp.arrays(np.float32, (2, 64), elements=st.floats(-1e6, 1e6, width=32))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def scales(data: np.ndarray, tq: TqType) -> np.ndarray:
    """The binary16 scales of stored rows, one a block."""
    blocks = data.reshape(-1, tq.block_bytes)
    return np.ascontiguousarray(blocks[:, :2]).view("<f2")[:, 0]


def relative_error(x: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.sum((decoded - x) ** 2, dtype=np.float64) / np.sum(x * x, dtype=np.float64))


# ---- the format's constants


def test_type_table() -> None:
    got = [(t.name, t.id, t.bits, t.block_bytes, t.bits_per_value) for t in TYPES.values()]
    assert got == [
        ("tq2_mse", 120, 2, 18, 2.25),
        ("tq3_mse", 121, 3, 26, 3.25),
        ("tq4_mse", 122, 4, 34, 4.25),
        ("tq2_qjl", 123, 2, 18, 2.25),
        ("tq3_qjl", 124, 3, 26, 3.25),
        ("tq4_qjl", 125, 4, 34, 4.25),
        ("tq2_tcq", 126, 2, 18, 2.25),
        ("tq3_tcq", 127, 3, 26, 3.25),
        ("tq4_tcq", 128, 4, 34, 4.25),
    ]


def test_splitmix64() -> None:
    """The first outputs for the seed 1234567, as published with the generator."""
    stream = signs.splitmix64(1234567)
    assert [next(stream) for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_seeds_spell_their_names() -> None:
    assert signs.ROTATION_SEED.to_bytes(8, "big") == b"turbcash"
    assert signs.SKETCH_SEED.to_bytes(8, "big") == b"qjlsketc"


# ---- transforms


def test_fwht_is_the_hadamard_matrix() -> None:
    i = np.arange(64)
    parity = np.array([[bin(a & b).count("1") % 2 for a in i] for b in i])
    np.testing.assert_array_equal(transform.fwht(np.eye(64, dtype=np.float32)), 1 - 2 * parity)


@given(moderate)
def test_transforms_invert_and_keep_norms(x: np.ndarray) -> None:
    tolerance = 1e-5 * float(np.max(np.abs(x))) + 1e-30
    turned = [transform.rht(x, s) for s in (DEFAULT.rotation_signs, DEFAULT.sketch_signs)]
    for y, s in zip(turned, (DEFAULT.rotation_signs, DEFAULT.sketch_signs), strict=True):
        np.testing.assert_allclose(transform.rht_inverse(y, s), x, rtol=0, atol=tolerance)
    norms = [np.linalg.norm(v.astype(np.float64)) for v in (x, *turned)]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5, atol=1e-30)


def test_reference_computes_in_float32() -> None:
    x = normal(3, 128)
    blocks = x.reshape(3, 2, 64)
    for f in (transform.rht, transform.rht_inverse):
        assert f(blocks, DEFAULT.rotation_signs).dtype == np.float32
    assert transform.tree_sum(blocks).dtype == np.float32
    for tq in TYPES.values():
        assert decode(encode(x, tq), tq).dtype == np.float32


# ---- errors on Gaussian rows


@pytest.mark.parametrize(("name", "most"), [("tq2_mse", 0.118), ("tq3_mse", 0.0347), ("tq4_mse", 0.0096)])
def test_mse_distortion(name: str, most: float) -> None:
    x, tq = normal(2000, 128), TYPES[name]
    assert relative_error(x, decode(encode(x, tq), tq)) <= most


@SCALAR
def test_distortion_is_the_theory_s(tq: TqType) -> None:
    """A block's own best scale beats a fixed one a little, so theory is an upper bound, and a close one."""
    x = normal(4000, 128, seed=1)
    assert relative_error(x, decode(encode(x, tq), tq)) == pytest.approx(0.98 * tq.distortion, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_trellis_distortion_is_the_trained_one(bits: int) -> None:
    """Each block has the error that was measured on uniform directions: the sum over rows weighs long blocks more."""
    x, tq = normal(3000, 64, seed=1), TYPES[f"tq{bits}_tcq"]
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    assert relative_error(x, decode(encode(x, tq), tq)) == pytest.approx(tq.distortion, rel=0.01)


@UNBIASED
def test_scale_keeps_the_component_along_x(tq: TqType) -> None:
    """The unbiased scale, up to its rounding to binary16."""
    x = normal(1000, 64, seed=2)
    along = np.sum(decode(encode(x, tq), tq) * x, axis=-1) / np.sum(x * x, axis=-1)
    np.testing.assert_allclose(along, 1, rtol=0, atol=2**-11 + 1e-6)


@UNBIASED
def test_inner_products_are_unbiased(tq: TqType) -> None:
    """Regress estimates on exact products, for queries that correlate with the keys: slope 1, no offset."""
    x = normal(8000, 128, seed=3)
    a = 0.5 * x + normal(8000, 128, seed=4)
    exact = np.sum(x * a, axis=-1, dtype=np.float64)
    estimate = query_dot(encode(x, tq), encode_query(a), tq)
    slope, offset = np.polyfit(exact, estimate, 1)
    noise = float(np.std(estimate - exact))
    assert slope == pytest.approx(1, abs=5 * noise / float(np.std(exact)) / np.sqrt(8000))
    assert abs(np.mean(estimate - exact)) < 4 * noise / np.sqrt(8000)
    assert abs(offset) < 0.05 * float(np.mean(exact))


@ALL
def test_query_dot_is_the_dot_with_the_decoded_row(tq: TqType) -> None:
    x, a = normal(50, 128, seed=5), normal(4, 1, 128, seed=6)
    data = encode(x, tq)
    got = query_dot(data, encode_query(a), tq)
    want = np.sum(decode(data, tq).astype(np.float64) * a, axis=-1)
    assert got.shape == want.shape == (4, 50)
    # int8 queries: an error of scale/sqrt(12), about 0.007, in each of two times 128 terms of about 1
    assert np.max(np.abs(got - want)) < 0.6
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.15


# ---- special rows


@ALL
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -(2.0**-61), 2.0**-40])
def test_small_rows_are_zero_bytes(tq: TqType, value: float) -> None:
    """Below 2^-60 by rule, and at 2^-40 because the scale rounds to 0."""
    data = encode(np.full(128, value, dtype=np.float32), tq)
    assert not data.any()
    assert not decode(data, tq).any()


@ALL
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_block_is_marked_and_contained(tq: TqType, value: float) -> None:
    x = normal(192)
    x[70] = value
    data = encode(x, tq)
    bad = data[tq.block_bytes : 2 * tq.block_bytes]
    assert bytes(bad) == b"\x00\x7e" + bytes(tq.block_bytes - 2)
    decoded = decode(data, tq)
    assert np.isnan(decoded[64:128]).all()
    assert np.isfinite(decoded[:64]).all()
    assert np.isfinite(decoded[128:]).all()


@ALL
@pytest.mark.parametrize("row", ["constant", "one-hot"])
@pytest.mark.parametrize("size", [2.0**-10, 1.0, 3.0, 1000.0])
def test_structured_rows(tq: TqType, row: str, size: float) -> None:
    """A one-hot row rotates to coordinates all at the mean square; any scale then fits them well."""
    x = np.zeros(64, dtype=np.float32)
    x[5 if row == "one-hot" else slice(None)] = size
    decoded = decode(encode(x, tq), tq)
    assert np.isfinite(decoded).all()
    assert relative_error(x, decoded) < 2 * tq.distortion


@ALL
@pytest.mark.parametrize("size", [2e5, 1e30, 3e38])
def test_huge_rows_saturate(tq: TqType, size: float) -> None:
    data = encode(normal(64) * np.float32(size / 4), tq)
    if size > 1e6:
        assert scales(data, tq) == [65504]
    assert np.isfinite(decode(data, tq)).all()


@ALL
@settings(deadline=None, max_examples=60)
@given(x=rows)
def test_any_row_encodes(tq: TqType, x: np.ndarray) -> None:
    data = encode(x, tq)
    assert data.shape == (*x.shape[:-1], x.shape[-1] // 64 * tq.block_bytes)
    finite = np.isfinite(x.reshape(-1, 64)).all(axis=-1)
    d = scales(data, tq)
    np.testing.assert_array_equal(np.isfinite(d), finite)
    assert np.all(d[finite] >= 0)


@ALL
@settings(deadline=None, max_examples=40)
@given(x=hnp.arrays(np.float32, 64, elements=st.floats(-8, 8, width=32)), power=st.integers(-6, 6))
def test_power_of_two_moves_only_the_scale(tq: TqType, x: np.ndarray, power: int) -> None:
    if np.max(np.abs(x)) < 0.5:
        x[0] = 0.5  # a scale well inside binary16's normal range
    a, b = encode(x, tq), encode(np.ldexp(x, power), tq)
    np.testing.assert_array_equal(a[2:], b[2:])
    assert scales(b, tq) == np.ldexp(scales(a, tq), power)


@ALL
@settings(deadline=None, max_examples=40)
@given(payload=st.binary(min_size=34, max_size=34))
def test_any_bytes_decode(tq: TqType, payload: bytes) -> None:
    decoded = decode(np.frombuffer(payload, dtype=np.uint8)[: tq.block_bytes], tq)
    assert decoded.shape == (64,)


@ALL
def test_batches_equal_single_rows(tq: TqType) -> None:
    x = normal(2, 3, 192, seed=7)
    data = encode(x, tq)
    decoded = decode(data, tq)
    for i in np.ndindex(2, 3):
        np.testing.assert_array_equal(encode(x[i], tq), data[i])
        np.testing.assert_array_equal(decode(data[i], tq), decoded[i])
    assert encode(x[:0], tq).shape == (0, 3, 3 * tq.block_bytes)


@SCALAR
def test_layout(tq: TqType) -> None:
    """Decode by hand, bit by bit, from the tables of the specification."""
    data = encode(normal(64, seed=8), tq)
    planes = np.ascontiguousarray(data[2:]).view("<u8")
    bits = np.array([[int(p) >> i & 1 for i in range(64)] for p in planes])
    book = tq.codebook
    v = book.centroids_f32[sum(bits[p] << p for p in range(book.bits))]
    if tq.qjl:
        v = v + book.kappa * transform.rht_inverse(signs.sign_vector(int(planes[-1])), DEFAULT.sketch_signs)
    want = transform.rht_inverse(np.float32(scales(data, tq)[0]) * v, DEFAULT.rotation_signs)
    np.testing.assert_array_equal(decode(data, tq), want)


def test_query_special_blocks() -> None:
    x = np.zeros((3, 64), dtype=np.float32)
    x[1] = 1e-44
    x[2, 0] = np.nan
    query = encode_query(x)
    assert query.shape == (3, 136)
    assert not query[0].any()
    codes = query[:, 8:].view(np.int8)
    assert np.all(codes >= -127)
    assert not codes[2].any()
    key = encode(normal(64), TYPES["tq3_qjl"])
    assert np.isnan(query_dot(key, query[2], TYPES["tq3_qjl"]))


@pytest.mark.parametrize("shape", [(63,), (2, 100), ()])
def test_refuses_partial_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="64"):
        encode(np.zeros(shape), TYPES["tq3_mse"])
    with pytest.raises(ValueError, match="uint8"):
        decode(np.zeros((27,), dtype=np.uint8), TYPES["tq3_mse"])
