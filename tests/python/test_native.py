"""The C library and the NumPy codec agree to the bit (docs/format.md), on fresh inputs of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_tq import center, codec, native, transform, trellis
from ggml_tq.cache_types import CODEBOOK_TYPES, QUERY_BYTES, TYPES, TqType
from ggml_tq.params import DEFAULT, Params, Quantizer

ROWS, DIM = 480, 192
DIMS = (64, 192, 576)  # that the same numbers are cut into
Rows = NDArray[np.float32]
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden.npz"
ALL = pytest.mark.parametrize("tq", TYPES.values(), ids=TYPES)


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # pytest shows it when a test fails
    return np.random.default_rng(seed)


def ties(rng: np.random.Generator, params: Params) -> Rows:
    """Rows whose rotated coordinates lie on thresholds or levels, as nearly as binary32 rows can."""
    levels = [trellis.trellis(bits).levels.ravel() for bits in (2, 3, 4)]
    t = np.concatenate([*(q.thresholds for q in params.quantizers.values()), *levels])
    u = rng.choice(t, (ROWS, DIM // 64, 64)).astype(np.float32)
    u *= 8 / np.maximum(np.linalg.norm(u, axis=-1, keepdims=True), 1e-3)
    return transform.rht_inverse(u.astype(np.float32), params.rotation_signs).reshape(ROWS, DIM)


FAMILIES: dict[str, Callable[[np.random.Generator, Params], Rows]] = {
    "normal": lambda r, _: r.standard_normal((ROWS, DIM)),
    "outlier channels": lambda r, _: r.standard_normal((ROWS, DIM)) * np.exp(3 * r.standard_normal(DIM)),
    "every magnitude": lambda r, _: r.standard_normal((ROWS, DIM)) * 2.0 ** r.integers(-80, 120, (ROWS, 1)),
    "small integers": lambda r, _: r.integers(-2, 3, (ROWS, DIM)),
    "ties": ties,
    "sparse": lambda r, _: r.standard_normal((ROWS, DIM)) * (r.random((ROWS, DIM)) < 0.03),
    "any bit pattern": lambda r, _: r.integers(0, 2**32, (ROWS, DIM), dtype=np.uint32).view(np.float32),
}


def random_params(rng: np.random.Generator) -> Params:
    """Any seeds, any codebooks that the format allows, near or far from the built-in ones."""

    def quantizer(tq: TqType) -> Quantizer:
        c = np.sort(rng.uniform(-3, 3, 2**tq.code_bits)).astype(np.float32)
        return Quantizer(c, np.float32(rng.uniform(0, 0.6) if tq.qjl else 0))

    seeds = (int(s) for s in rng.integers(0, 2**64, 2, dtype=np.uint64))
    return Params(*seeds, {name: quantizer(tq) for name, tq in CODEBOOK_TYPES.items()})


def sets(rng: np.random.Generator) -> list[Params]:
    return [DEFAULT, *(random_params(rng) for _ in range(3))]


@pytest.mark.parametrize("family", FAMILIES)
@ALL
def test_rows(rng: np.random.Generator, tq: TqType, family: str) -> None:
    for params in sets(rng)[: 2 if tq.kind == "tcq" else None]:  # slow, and no parameter but the seeds is theirs
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(FAMILIES[family](rng, params), dtype=np.float32)
        for dim in DIMS:
            rows = x.reshape(-1, dim)
            want = codec.encode(rows, tq, params)
            np.testing.assert_array_equal(native.encode(rows, tq, params), want)
            np.testing.assert_array_equal(native.decode(want, tq, params), codec.decode(want, tq, params))


@ALL
def test_any_bytes_decode_alike(rng: np.random.Generator, tq: TqType) -> None:
    data = rng.integers(0, 256, (ROWS, 3 * tq.block_bytes), dtype=np.uint8)
    np.testing.assert_array_equal(native.decode(data, tq), codec.decode(data, tq))


@pytest.mark.parametrize("family", FAMILIES)
def test_queries(rng: np.random.Generator, family: str) -> None:
    for params in sets(rng):
        with np.errstate(over="ignore", invalid="ignore"):
            x = np.ascontiguousarray(FAMILIES[family](rng, params), dtype=np.float32)
            want = codec.encode_query(x, params)
        got = native.encode_query(x, params)
        blocks = [a.reshape(-1, QUERY_BYTES) for a in (got, want)]
        scales = [np.ascontiguousarray(b[:, :8]).view(np.float32) for b in blocks]
        np.testing.assert_array_equal(*scales)  # NaNs of any kind are equal
        np.testing.assert_array_equal(blocks[0][:, 8:], blocks[1][:, 8:])


@ALL
@pytest.mark.parametrize("dim", [64, 128, 576])
def test_scores(rng: np.random.Generator, tq: TqType, dim: int) -> None:
    """Equal but for the order of additions."""
    for params in sets(rng):
        keys = codec.encode(rng.standard_normal((20, dim)), tq, params)
        queries = codec.encode_query(rng.standard_normal((5, 1, dim)), params)
        want = codec.query_dot(keys, queries, tq, params)
        np.testing.assert_allclose(native.query_dot(keys, queries, tq, params), want, rtol=1e-5, atol=1e-5 * dim**0.5)


def test_rotation(rng: np.random.Generator) -> None:
    x = rng.standard_normal((7, 128), dtype=np.float32)
    for params in sets(rng):
        want = transform.rht(x.reshape(7, 2, 64), params.rotation_signs).reshape(7, 128)
        np.testing.assert_array_equal(native.rotate(x, params), want)
        np.testing.assert_allclose(native.unrotate(want, params), x, atol=1e-5)


def test_built_in_parameters_are_the_same() -> None:
    lib = native.library()
    assert bytes(native.c_params(DEFAULT)) == bytes(lib.tq_params_default().contents)


def test_buffers(rng: np.random.Generator) -> None:
    """Results go where they are told to; arrays of other layouts are read right; wrong ones are refused."""
    tq = TYPES["tq3_qjl"]
    x = rng.standard_normal((4, 128), dtype=np.float32)
    want = codec.encode(x, tq)
    out = np.zeros_like(want)
    assert native.encode(x, tq, out=out) is out
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(native.encode(np.asfortranarray(x), tq), want)
    np.testing.assert_array_equal(native.encode(x.astype(np.float64), tq), want)
    np.testing.assert_array_equal(native.encode(np.repeat(x, 2, axis=0)[::2], tq), want)
    with pytest.raises(ValueError, match="64"):
        native.encode(x[:, :65], tq)
    for bad in (out[:-1], out.astype(np.int32), np.asfortranarray(out)):
        with pytest.raises(ValueError, match="out"):
            native.encode(x, tq, out=bad)
    with pytest.raises(ValueError, match="blocks"):
        native.query_dot(want, native.encode_query(x[:, :64]), tq)
    assert native.encode(x[:0], tq).shape == (0, want.shape[1])


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GGML_TQ_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(native.NativeError, match=r"none\.so"):
        native.library_path()


@ALL
def test_golden_vectors(tq: TqType) -> None:
    """Committed rows and their bytes (scripts/golden.py wrote them): neither implementation may drift."""
    golden = np.load(GOLDEN)
    x, seeds = golden["x"], [int(s) for s in golden["seeds"]]
    for params, name in ((DEFAULT, "default"), (Params(*seeds), "seeded")):
        want = golden[f"{name}/{tq.name}"]
        for implementation in (codec, native):
            np.testing.assert_array_equal(implementation.encode(x, tq, params), want)
            decoded = implementation.decode(want, tq, params)
            np.testing.assert_array_equal(decoded, golden[f"{name}/{tq.name}/decoded"])


@pytest.mark.parametrize("neox", [False, True])
def test_golden_centers(neox: bool) -> None:
    golden = np.load(GOLDEN)
    freqs, m, positions = (golden[f"center/{name}"] for name in ("freqs", "m", "positions"))
    want = golden["center/neox" if neox else "center/pairs"]
    for table in (center.make_table(freqs), native.center_table(freqs)):
        turn = center.Turn(table, neox)
        np.testing.assert_array_equal(turn.apply(m, positions), want)
        for head in range(len(m)):
            x = np.zeros_like(want[:, head])
            native.center_add(turn, m[head], positions, 1, x)
            np.testing.assert_array_equal(x, want[:, head])
