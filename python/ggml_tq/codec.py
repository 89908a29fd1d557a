"""Encode, decode and score cache rows as docs/format.md says, bit for bit, over any leading axes.

The codes are TurboQuant's (arXiv:2504.19874): Algorithm 1 (``_mse``) and Algorithm 2 with an orthogonal
sketch (``_qjl``), or a trellis code (``_tcq``, ``ggml_tq.trellis``). The block scales are EDEN's (arXiv:2108.08842):
of least error for ``_mse``, unbiased for the others.
All arithmetic is float32: arrays of that dtype times NumPy float32 or Python scalars, never float64.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_tq import trellis
from ggml_tq.cache_types import BLOCK, QUERY_BYTES, TqType
from ggml_tq.params import DEFAULT, Params
from ggml_tq.transform import Array, rht, rht_inverse, tree_sum

Bytes = NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)

F16_MAX = 65504.0
TINY = 2.0**-60  # blocks with a smaller maximum are stored as zeros
NAN_SCALE = 0x7E00


def _blocks(x: ArrayLike) -> Array:
    """Rows (..., n) as float32 blocks (..., n/64, 64)."""
    x = np.asarray(x, dtype=np.float32)
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"shape {x.shape}: {BLOCK} must divide the length of a row")
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def _split(data: Bytes, size: int) -> Bytes:
    """Stored rows (..., m) as blocks (..., m/size, size)."""
    data = np.asarray(data)
    if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] % size:
        raise ValueError(f"{data.dtype} of shape {data.shape}: want uint8 rows of whole {size}-byte blocks")
    return data.reshape(*data.shape[:-1], data.shape[-1] // size, size)


def _join(blocks: NDArray[Scalar]) -> NDArray[Scalar]:
    """Rows (..., blocks * size) of blocks (..., blocks, size)."""
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def _signs(bits: NDArray[Any]) -> Array:
    """Sign bits 0, 1 as +1, -1."""
    return np.where(bits, np.float32(-1), np.float32(1))


def _round(u: Array, tq: TqType, params: Params) -> tuple[Bytes, Array]:
    """Codes of normalized blocks (..., 64), their bits those of the planes, and the values that they stand for."""
    quantizer = params.quantizers[tq.name]
    code = np.zeros(u.shape, dtype=np.uint8)
    for t in quantizer.thresholds:
        code += u > t
    q = quantizer.centroids[code]
    if tq.qjl:
        sign = rht(u - q, params.sketch_signs) < 0
        q = q + quantizer.kappa * rht_inverse(_signs(sign), params.sketch_signs)
        code |= sign.astype(np.uint8) << tq.code_bits
    return code, q


def encode(x: ArrayLike, tq: TqType, params: Params = DEFAULT) -> Bytes:
    """Rows (..., n) of numbers as uint8 (..., n/64 * block_bytes). Raises ValueError unless 64 divides n."""
    x = _blocks(x)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    peak = np.max(np.abs(x), axis=-1, keepdims=True)
    normal = finite & (peak >= TINY)

    # Blocks outside `normal` are overwritten below; ones keep them out of the arithmetic.
    exponent = np.where(normal, np.minimum(np.frexp(peak)[1] - 1, 126), 0)  # floor(log2 peak)
    scaled = np.ldexp(np.where(normal, x, np.float32(1)), -exponent)
    y = rht(scaled.astype(np.float32, copy=False), params.rotation_signs)
    g: Array = np.divide(8, np.sqrt(tree_sum(y * y)), dtype=np.float32)
    u: Array = y * g

    code, q = trellis.encode(u, tq.bits) if tq.kind == "tcq" else _round(u, tq, params)
    uq = tree_sum(u * q)
    with np.errstate(divide="ignore", invalid="ignore"):  # where uq is not positive
        s = uq / tree_sum(q * q) if tq.kind == "mse" else tree_sum(u * u) / uq
    s = np.where(uq > 0, s, np.float32(0))

    with np.errstate(over="ignore"):  # the largest rows overflow here, and saturate
        scale = np.minimum(np.ldexp(s / g, exponent), np.float32(F16_MAX)).astype("<f2")
    scale[~normal] = 0
    code = np.where(normal & (scale != 0), code, 0)
    scale[~finite] = np.uint16(NAN_SCALE).view(np.float16)
    planes = [np.packbits(code >> p & 1, axis=-1, bitorder="little") for p in range(tq.bits)]
    return _join(np.concatenate([scale.view(np.uint8), *planes], axis=-1))


def _unpack(data: Bytes, tq: TqType, params: Params) -> tuple[Array, Array, Array | None]:
    """Scales (..., blocks, 1), centroids or levels and, for ``_qjl``, signs (..., blocks, 64) of stored rows."""
    blocks = _split(data, tq.block_bytes)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    planes = blocks[..., 2:].reshape(*blocks.shape[:-1], tq.bits, 8)
    bits = np.unpackbits(planes, axis=-1, bitorder="little")
    if tq.kind == "tcq":
        code = np.asarray(sum(bits[..., p, :] << p for p in range(tq.bits)))
        return scale, trellis.decode(code, tq.bits), None
    index = sum(bits[..., p, :] << p for p in range(tq.code_bits))
    return scale, params.quantizers[tq.name].centroids[index], _signs(bits[..., -1, :]) if tq.qjl else None


def decode(data: Bytes, tq: TqType, params: Params = DEFAULT) -> Array:
    """Inverse of ``encode``: uint8 (..., n/64 * block_bytes) as float32 rows (..., n)."""
    scale, v, signs = _unpack(data, tq, params)
    if signs is not None:
        v = v + params.quantizers[tq.name].kappa * rht_inverse(signs, params.sketch_signs)
    with np.errstate(invalid="ignore"):  # infinite scales
        return _join(rht_inverse(scale * v, params.rotation_signs))


def encode_query(a: ArrayLike, params: Params = DEFAULT) -> Bytes:
    """Rows (..., n) of numbers as query rows, uint8 (..., n/64 * 136) (section 6)."""
    b = rht(_blocks(a), params.rotation_signs)
    (b_scale, b_codes), (f_scale, f_codes) = _int8(b), _int8(rht(b, params.sketch_signs))
    parts = [part.view(np.uint8) for part in (b_scale, f_scale, b_codes, f_codes)]
    return _join(np.concatenate(parts, axis=-1))


def _int8(v: Array) -> tuple[Array, NDArray[np.int8]]:
    """A block as scale (..., 1) and signed bytes (..., 64); tiny blocks are 0, those not finite NaN."""
    top = np.max(np.abs(v), axis=-1, keepdims=True)
    finite, tiny = np.isfinite(top), top < np.float32(2.0**-100)
    usable = finite & ~tiny
    scale = np.where(usable, top, np.float32(127)) / np.float32(127)
    codes = np.rint(np.where(usable, v, 0) * (np.float32(1) / scale))
    scale = np.where(finite, np.where(tiny, np.float32(0), scale), np.float32(np.nan))
    return scale.astype("<f4"), codes.astype(np.int8)


def query_dot(data: Bytes, query: Bytes, tq: TqType, params: Params = DEFAULT) -> NDArray[np.float64]:
    """Inner products of stored rows and query rows of as many blocks, leading axes broadcast (section 6).

    The terms are exact to float64; only their order of addition differs between implementations.
    """
    scale, centroids, signs = _unpack(data, tq, params)
    blocks = _split(query, QUERY_BYTES)
    scales = np.ascontiguousarray(blocks[..., :8]).view("<f4").astype(np.float64)
    codes = np.ascontiguousarray(blocks[..., 8:]).view(np.int8).astype(np.float64)
    dot = scales[..., 0] * np.sum(centroids * codes[..., :BLOCK], axis=-1)
    if signs is not None:
        dot = dot + params.quantizers[tq.name].kappa * scales[..., 1] * np.sum(signs * codes[..., BLOCK:], axis=-1)
    total: NDArray[np.float64] = np.sum(scale[..., 0] * dot, axis=-1)
    return total
