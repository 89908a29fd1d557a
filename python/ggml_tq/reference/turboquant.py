"""Encode, decode and score cache rows as docs/format.md says, bit for bit, over any leading axes.

The codes are TurboQuant's (arXiv:2504.19874): Algorithm 1 (``_mse``) and Algorithm 2 with an orthogonal
sketch (``_qjl``). The block scales are EDEN's (arXiv:2108.08842): of least error for ``_mse``, unbiased
for ``_qjl``.
All arithmetic is float32: arrays of that dtype times NumPy float32 or Python scalars, never float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_tq.codebook import Codebook, solve
from ggml_tq.reference.hadamard import BLOCK, Array, rotate, sketch, tree_sum, unrotate, unsketch

Bytes = NDArray[np.uint8]

F16_MAX = 65504.0
TINY = 2.0**-60  # blocks with a smaller maximum are stored as zeros
NAN_SCALE = 0x7E00
QUERY_ID = 126
QUERY_BYTES = 8 + 2 * BLOCK


@dataclass(frozen=True)
class TqType:
    """One stored cache type: ``bits`` planes of 64 bits and a binary16 scale for each 64 values."""

    id: int  # ggml_type
    bits: int  # planes, the last a QJL sign if qjl
    qjl: bool

    @property
    def name(self) -> str:
        return f"tq{self.bits}_{'qjl' if self.qjl else 'mse'}"

    @property
    def block_bytes(self) -> int:
        return 2 + 8 * self.bits

    @property
    def bits_per_value(self) -> float:
        return 8 * self.block_bytes / BLOCK

    @property
    def codebook(self) -> Codebook:
        return solve(self.bits - self.qjl, BLOCK)

    @property
    def distortion(self) -> float:
        """Expected squared error of a decoded row, relative to the row's own square, in theory.

        ``_mse``: the codebook's D. ``_qjl``: the residual's signs take 2/pi of its square away, which leaves
        D' = (1 - 2/pi) D, and the unbiased scale 1 / (1 - D') turns that into D' / (1 - D').
        """
        d = self.codebook.distortion
        if not self.qjl:
            return d
        d *= 1 - 2 / math.pi
        return d / (1 - d)


TYPES: dict[str, TqType] = {
    t.name: t for t in (TqType(120 + 3 * qjl + bits - 2, bits, qjl) for qjl in (False, True) for bits in (2, 3, 4))
}


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


def _join(blocks: NDArray) -> NDArray:
    """Rows (..., blocks * size) of blocks (..., blocks, size)."""
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def _signs(bits: NDArray) -> Array:
    """Sign bits 0, 1 as +1, -1."""
    return np.where(bits, np.float32(-1), np.float32(1))


def encode(x: ArrayLike, tq: TqType) -> Bytes:
    """Rows (..., n) of numbers as uint8 (..., n/64 * block_bytes). Raises ValueError unless 64 divides n."""
    x = _blocks(x)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    peak = np.max(np.abs(x), axis=-1, keepdims=True)
    normal = finite & (peak >= TINY)

    # Blocks outside `normal` are overwritten below; ones keep them out of the arithmetic.
    exponent = np.where(normal, np.minimum(np.frexp(peak)[1] - 1, 126), 0)  # floor(log2 peak)
    y = rotate(np.ldexp(np.where(normal, x, np.float32(1)), -exponent))
    g = 8 / np.sqrt(tree_sum(y * y))
    u = y * g

    book = tq.codebook
    index = np.zeros(u.shape, dtype=np.uint8)
    for t in book.thresholds_f32:
        index += u > t
    q = book.centroids_f32[index]
    if tq.qjl:
        sign = sketch(u - q) < 0
        q = q + book.kappa * unsketch(_signs(sign))
        uq = tree_sum(u * q)
        s = np.where(uq > 0, tree_sum(u * u) / uq, np.float32(0))
        code = index | sign.astype(np.uint8) << book.bits
    else:
        s = tree_sum(u * q) / tree_sum(q * q)
        code = index

    with np.errstate(over="ignore"):  # the largest rows overflow here, and saturate
        scale = np.minimum(np.ldexp(s / g, exponent), np.float32(F16_MAX)).astype("<f2")
    scale[~normal] = 0
    code = np.where(normal & (scale != 0), code, 0)
    scale[~finite] = np.uint16(NAN_SCALE).view(np.float16)
    planes = [np.packbits(code >> p & 1, axis=-1, bitorder="little") for p in range(tq.bits)]
    return _join(np.concatenate([scale.view(np.uint8), *planes], axis=-1))


def _unpack(data: Bytes, tq: TqType) -> tuple[Array, Array, Array | None]:
    """Scales (..., blocks, 1), centroids and, for ``_qjl``, signs (..., blocks, 64) of stored rows."""
    blocks = _split(data, tq.block_bytes)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    planes = blocks[..., 2:].reshape(*blocks.shape[:-1], tq.bits, 8)
    bits = np.unpackbits(planes, axis=-1, bitorder="little")
    book = tq.codebook
    index = sum(bits[..., p, :] << p for p in range(book.bits))
    return scale, book.centroids_f32[index], _signs(bits[..., -1, :]) if tq.qjl else None


def decode(data: Bytes, tq: TqType) -> Array:
    """Inverse of ``encode``: uint8 (..., n/64 * block_bytes) as float32 rows (..., n)."""
    scale, v, signs = _unpack(data, tq)
    if signs is not None:
        v = v + tq.codebook.kappa * unsketch(signs)
    with np.errstate(invalid="ignore"):  # infinite scales
        return _join(unrotate(scale * v))


def encode_query(a: ArrayLike) -> Bytes:
    """Rows (..., n) of numbers as query rows, uint8 (..., n/64 * 136) (section 6)."""
    b = rotate(_blocks(a))
    (b_scale, b_codes), (f_scale, f_codes) = _int8(b), _int8(sketch(b))
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


def query_dot(data: Bytes, query: Bytes, tq: TqType) -> NDArray[np.float64]:
    """Inner products of stored rows and query rows of as many blocks, leading axes broadcast (section 6).

    The terms are exact to float64; only their order of addition differs between implementations.
    """
    scale, centroids, signs = _unpack(data, tq)
    blocks = _split(query, QUERY_BYTES)
    scales = np.ascontiguousarray(blocks[..., :8]).view("<f4").astype(np.float64)
    codes = np.ascontiguousarray(blocks[..., 8:]).view(np.int8).astype(np.float64)
    dot = scales[..., 0] * np.sum(centroids * codes[..., :BLOCK], axis=-1)
    if signs is not None:
        dot = dot + tq.codebook.kappa * scales[..., 1] * np.sum(signs * codes[..., BLOCK:], axis=-1)
    return np.sum(scale[..., 0] * dot, axis=-1)
