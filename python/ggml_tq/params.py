"""A model's quantizer parameters: two sign seeds, and a codebook for each cache type.

docs/format.md, section 8, specifies what is valid and the hash; ``ggml_tq.metadata`` reads and writes them as
GGUF metadata, and the C library's ``tq_params`` holds the same.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_tq.cache_types import BLOCK, CODEBOOK_TYPES, FORMAT_VERSION, TqType
from ggml_tq.signs import ROTATION_SEED, SKETCH_SEED, sign_vector, sign_word

Floats = NDArray[np.float32]
MAX_CENTROID = np.float32(8)  # a coordinate of a block of norm 8 is no larger
MAX_KAPPA = np.float32(2)
_U64 = 2**64 - 1


class ParamsError(ValueError):
    """A parameter that the format does not allow; ``key`` names it as GGUF metadata does."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key


def fnv1a(data: bytes) -> int:
    """64-bit FNV-1a."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & _U64
    return h


@dataclass(frozen=True)
class Quantizer:
    """What one cache type rounds to: ascending ``centroids`` and the weight ``kappa`` of the residual's signs."""

    centroids: Floats  # (2^code_bits,)
    kappa: np.float32  # 0 for _mse

    @cached_property
    def thresholds(self) -> Floats:
        """Midpoints of the centroids, computed in binary32: (2^code_bits - 1,)."""
        c = self.centroids
        return (c[:-1] + c[1:]) / np.float32(2)


def check_centroids(tq: TqType, values: ArrayLike, key: str) -> Floats:
    """``values`` as a codebook of ``tq`` in float32; raises ParamsError if it is not one."""
    c = np.array(values, dtype=np.float32)
    want = 2**tq.code_bits
    if c.shape != (want,):
        raise ParamsError(key, f"{c.size} centroids, want {want}")
    if not np.isfinite(c).all():
        raise ParamsError(key, "a centroid is not finite")
    if np.max(np.abs(c)) > MAX_CENTROID:
        raise ParamsError(key, f"a centroid is beyond {MAX_CENTROID:g}")
    if not np.all(np.diff(c) > 0):
        raise ParamsError(key, "centroids are not ascending")
    c.flags.writeable = False
    return c


def check_kappa(value: float, key: str) -> np.float32:
    """``value`` as a QJL weight in float32; raises ParamsError if it is not one."""
    kappa = np.float32(value)
    if not 0 <= kappa <= MAX_KAPPA:  # NaN fails too
        raise ParamsError(key, f"{kappa:g} is not between 0 and {MAX_KAPPA:g}")
    return kappa


def _built_in(tq: TqType) -> Quantizer:
    book = tq.codebook
    return Quantizer(book.centroids_f32, book.kappa if tq.qjl else np.float32(0))


@dataclass(frozen=True)
class Params:
    """One set of parameters. ``quantizers`` has an entry for every name in CODEBOOK_TYPES."""

    rotation_seed: int = ROTATION_SEED
    sketch_seed: int = SKETCH_SEED
    quantizers: Mapping[str, Quantizer] = field(
        default_factory=lambda: {n: _built_in(t) for n, t in CODEBOOK_TYPES.items()}
    )

    @cached_property
    def rotation_signs(self) -> Floats:
        """(64,) of +1 and -1."""
        return sign_vector(sign_word(self.rotation_seed))

    @cached_property
    def sketch_signs(self) -> Floats:
        return sign_vector(sign_word(self.sketch_seed))

    @cached_property
    def hash(self) -> int:
        """64-bit FNV-1a of the parameters' canonical bytes."""
        data = struct.pack("<IQQ", FORMAT_VERSION, self.rotation_seed, self.sketch_seed)
        for name in CODEBOOK_TYPES:
            q = self.quantizers[name]
            data += q.centroids.astype("<f4").tobytes() + np.float32(q.kappa).astype("<f4").tobytes()
        return fnv1a(data)


DEFAULT = Params()
assert BLOCK == 64  # signs are one 64-bit word
