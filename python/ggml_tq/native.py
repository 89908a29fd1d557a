"""The C library (ggml-tq/include/ggml-tq.h) on NumPy arrays, the same functions as ``ggml_tq.codec``.

Arrays that are float32 (or uint8 for stored rows) and C-contiguous are read where they lie, others are copied;
results go to ``out`` if it is given. The library is looked for at $GGML_TQ_LIBRARY, in $GGML_TQ_BUILD/bin, beside
this file (wheels bring it), and in the checkout's build/bin.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_tq.cache_types import BLOCK, CODEBOOK_TYPES, QUERY_BYTES, TYPES, TqType
from ggml_tq.center import PAGE, PARTS, Turn
from ggml_tq.params import DEFAULT, Params

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
_NAME = {"win32": "ggml-tq.dll", "darwin": "libggml-tq.dylib"}.get(sys.platform, "libggml-tq.so")


class NativeError(Exception):
    """The library is missing, or refused a parameter."""


class _Quantizer(ctypes.Structure):
    _fields_ = (
        ("centroids", ctypes.c_float * 16),
        ("thresholds", ctypes.c_float * 15),
        ("kappa", ctypes.c_float),
    )


class _Params(ctypes.Structure):
    _fields_ = (
        ("rotation_seed", ctypes.c_uint64),
        ("sketch_seed", ctypes.c_uint64),
        ("rotation_signs", ctypes.c_float * BLOCK),
        ("sketch_signs", ctypes.c_float * BLOCK),
        ("quantizers", _Quantizer * len(CODEBOOK_TYPES)),
        ("hash", ctypes.c_uint64),
    )


class _Center(ctypes.Structure):
    _fields_ = (
        ("head_dim", ctypes.c_int32),
        ("n_rot", ctypes.c_int32),
        ("neox", ctypes.c_int32),
        ("table", ctypes.c_void_p),
    )


def library_path() -> Path:
    """Where the library is; raises NativeError if it is nowhere."""
    here = Path(__file__).resolve().parent
    places = [here / _NAME, here.parents[1] / "build" / "bin" / _NAME]
    if build := os.environ.get("GGML_TQ_BUILD"):
        places.insert(0, Path(build) / "bin" / _NAME)
    if exact := os.environ.get("GGML_TQ_LIBRARY"):
        places = [Path(exact)]
    for place in places:
        if place.is_file():
            return place
    raise NativeError(f"{_NAME} is at none of: {', '.join(map(str, places))}; `make build` makes it")


@cache
def library() -> ctypes.CDLL:
    """The loaded library with its functions' types declared."""
    lib = ctypes.CDLL(str(library_path()))
    kind, pointer, size, params = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Params)
    for name, result, arguments in (
        ("tq_params_default", params, ()),
        ("tq_params_set_seeds", None, (params, ctypes.c_uint64, ctypes.c_uint64)),
        ("tq_params_set_codebook", ctypes.c_char_p, (params, kind, pointer, ctypes.c_size_t)),
        ("tq_params_set_kappa", ctypes.c_char_p, (params, kind, ctypes.c_float)),
        ("tq_encode", None, (params, kind, pointer, pointer, size)),
        ("tq_decode", None, (params, kind, pointer, pointer, size)),
        ("tq_encode_query", None, (params, pointer, pointer, size)),
        ("tq_dot", ctypes.c_float, (params, kind, pointer, pointer, size)),
        ("tq_rotate", None, (params, pointer, pointer, size)),
        ("tq_unrotate", None, (params, pointer, pointer, size)),
        ("tq_center_make_table", None, (pointer, ctypes.c_int32, pointer)),
        ("tq_center_add", None, (ctypes.POINTER(_Center), pointer, ctypes.c_int32, ctypes.c_float, pointer)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


_INDEX = {name: i for i, name in enumerate(TYPES)}  # enum tq_type
_SETS: dict[int, _Params] = {}  # by hash


def c_params(params: Params) -> _Params:
    """The C struct of ``params``; raises NativeError if the library refuses a value or computes another hash."""
    if params.hash not in _SETS:
        lib = library()
        c = _Params.from_buffer_copy(lib.tq_params_default().contents)
        lib.tq_params_set_seeds(c, params.rotation_seed, params.sketch_seed)
        for name, tq in CODEBOOK_TYPES.items():
            q = params.quantizers[name]
            centroids = np.ascontiguousarray(q.centroids, dtype=np.float32)
            problem = lib.tq_params_set_codebook(c, _INDEX[name], centroids.ctypes.data, centroids.size)
            if not problem and tq.qjl:
                problem = lib.tq_params_set_kappa(c, _INDEX[name], q.kappa)
            if problem:
                raise NativeError(f"{name}: {problem.decode()}")
        if c.hash != params.hash:
            raise NativeError(f"the library is of another format: hash {c.hash:#x}, want {params.hash:#x}")
        _SETS[params.hash] = c
    return _SETS[params.hash]


def _rows(x: ArrayLike, dtype: Any, unit: int) -> NDArray[Any]:  # noqa: ANN401
    """Contiguous rows whose length is a multiple of ``unit``."""
    rows = np.ascontiguousarray(x, dtype=dtype)
    if rows.shape[-1] % unit:
        raise ValueError(f"shape {rows.shape}: {unit} must divide the length of a row")
    return rows


def _result(out: NDArray[Any] | None, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:  # noqa: ANN401
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out: want a writeable contiguous {np.dtype(dtype)} array of shape {shape}")
    return out


def encode(x: ArrayLike, tq: TqType, params: Params = DEFAULT, out: Bytes | None = None) -> Bytes:
    """Rows (..., n) of numbers as uint8 (..., n/64 * block_bytes)."""
    x = _rows(x, np.float32, BLOCK)
    out = _result(out, (*x.shape[:-1], x.shape[-1] // BLOCK * tq.block_bytes), np.uint8)
    library().tq_encode(c_params(params), _INDEX[tq.name], x.ctypes.data, out.ctypes.data, x.size)
    return out


def decode(data: Bytes, tq: TqType, params: Params = DEFAULT, out: Array | None = None) -> Array:
    """Stored rows, uint8 (..., n/64 * block_bytes), as float32 (..., n)."""
    data = _rows(data, np.uint8, tq.block_bytes)
    out = _result(out, (*data.shape[:-1], data.shape[-1] // tq.block_bytes * BLOCK), np.float32)
    library().tq_decode(c_params(params), _INDEX[tq.name], data.ctypes.data, out.ctypes.data, out.size)
    return out


def encode_query(a: ArrayLike, params: Params = DEFAULT, out: Bytes | None = None) -> Bytes:
    """Rows (..., n) of numbers as query rows, uint8 (..., n/64 * 136)."""
    a = _rows(a, np.float32, BLOCK)
    out = _result(out, (*a.shape[:-1], a.shape[-1] // BLOCK * QUERY_BYTES), np.uint8)
    library().tq_encode_query(c_params(params), a.ctypes.data, out.ctypes.data, a.size)
    return out


def query_dot(data: Bytes, query: Bytes, tq: TqType, params: Params = DEFAULT) -> Array:
    """Inner products of stored rows and query rows of as many blocks, leading axes broadcast; float32."""
    data, query = _rows(data, np.uint8, tq.block_bytes), _rows(query, np.uint8, QUERY_BYTES)
    n_blocks = data.shape[-1] // tq.block_bytes
    if n_blocks != query.shape[-1] // QUERY_BYTES:
        raise ValueError(f"rows of {n_blocks} blocks, queries of {query.shape[-1] // QUERY_BYTES}")
    shape = np.broadcast_shapes(data.shape[:-1], query.shape[:-1])
    keys = np.broadcast_to(data, (*shape, data.shape[-1]))
    queries = np.broadcast_to(query, (*shape, query.shape[-1]))
    dot, c, kind, n = library().tq_dot, c_params(params), _INDEX[tq.name], n_blocks * BLOCK
    out = np.empty(shape, np.float32)
    for i in np.ndindex(shape):
        out[i] = dot(c, kind, keys[i].ctypes.data, queries[i].ctypes.data, n)
    return out


def rotate(x: ArrayLike, params: Params = DEFAULT, out: Array | None = None) -> Array:
    """The randomized Hadamard transform of each block of rows (..., n); float32 of the same shape."""
    x = _rows(x, np.float32, BLOCK)
    out = _result(out, x.shape, np.float32)
    library().tq_rotate(c_params(params), x.ctypes.data, out.ctypes.data, x.size)
    return out


def unrotate(y: ArrayLike, params: Params = DEFAULT, out: Array | None = None) -> Array:
    """Inverse of ``rotate``."""
    y = _rows(y, np.float32, BLOCK)
    out = _result(out, y.shape, np.float32)
    library().tq_unrotate(c_params(params), y.ctypes.data, out.ctypes.data, y.size)
    return out


def center_table(freqs: ArrayLike) -> Array:
    """``ggml_tq.center.make_table``."""
    f = np.ascontiguousarray(freqs, dtype=np.float64)
    table = np.empty((PAGE * (PARTS + 1), 2 * f.size), np.float32)  # the last part repeats the first
    library().tq_center_make_table(f.ctypes.data, 2 * f.size, table.ctypes.data)
    return table[: PAGE * PARTS]


def center_add(turn: Turn, m: ArrayLike, positions: ArrayLike, sign: int, x: Array) -> None:
    """Add ``sign`` (1 or -1) times X_p(m), m (dim,), to the rows x (tokens, dim) of ``positions`` (tokens,)."""
    m, table = np.ascontiguousarray(m, dtype=np.float32), np.ascontiguousarray(turn.table)
    positions = np.asarray(positions)
    if m.shape != (x.shape[-1],) or x.shape[:1] != positions.shape or table.shape[1] > len(m):
        raise ValueError(f"rows of shape {x.shape}, a center of {m.shape}, positions of {positions.shape}")
    _result(x, x.shape, np.float32)
    center = _Center(len(m), table.shape[1], turn.neox, table.ctypes.data)
    for row, position in zip(x, positions.tolist(), strict=True):
        library().tq_center_add(center, m.ctypes.data, position, sign, row.ctypes.data)
