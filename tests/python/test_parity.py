"""The C library and the NumPy reference agree to the bit (docs/format.md), on fresh inputs of many kinds."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_tq import codec
from ggml_tq.cache_types import TYPES

BUILD = Path(os.environ.get("GGML_TQ_BUILD", Path(__file__).parents[2] / "build"))
ROWS, DIM = 2000, 192
Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return ctypes.CDLL(str(BUILD / "bin" / "libggml-tq.so"))


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # pytest shows it when a test fails
    return np.random.default_rng(seed)


FAMILIES: dict[str, Callable[[np.random.Generator], Rows]] = {
    "normal": lambda r: r.standard_normal((ROWS, DIM)),
    "outlier channels": lambda r: r.standard_normal((ROWS, DIM)) * np.exp(3 * r.standard_normal(DIM)),
    "every magnitude": lambda r: r.standard_normal((ROWS, DIM)) * 2.0 ** r.integers(-80, 120, (ROWS, 1)),
    "small integers, many ties": lambda r: r.integers(-2, 3, (ROWS, DIM)),
    "sparse": lambda r: r.standard_normal((ROWS, DIM)) * (r.random((ROWS, DIM)) < 0.03),
    "any bit pattern": lambda r: r.integers(0, 2**32, (ROWS, DIM), dtype=np.uint32).view(np.float32),
}


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TYPES)
def test_codec(lib: ctypes.CDLL, rng: np.random.Generator, name: str, family: str) -> None:
    kind = TYPES[name]
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(FAMILIES[family](rng), dtype=np.float32)
    want = codec.encode(x, kind)
    got = np.empty_like(want)
    lib.tq_encode(list(TYPES).index(name), pointer(x), pointer(got), ctypes.c_int64(x.size))
    np.testing.assert_array_equal(got, want)

    y = np.empty_like(x)
    lib.tq_decode(list(TYPES).index(name), pointer(got), pointer(y), ctypes.c_int64(x.size))
    np.testing.assert_array_equal(y, codec.decode(want, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_query(lib: ctypes.CDLL, rng: np.random.Generator, family: str) -> None:
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(FAMILIES[family](rng), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        want = codec.encode_query(x)
    got = np.empty_like(want)
    lib.tq_encode_query(pointer(x), pointer(got), ctypes.c_int64(x.size))
    blocks = [a.reshape(-1, 136) for a in (got, want)]
    scales = [np.ascontiguousarray(b[:, :8]).view(np.float32) for b in blocks]
    np.testing.assert_array_equal(*scales)  # NaNs of any kind are equal
    np.testing.assert_array_equal(blocks[0][:, 8:], blocks[1][:, 8:])
