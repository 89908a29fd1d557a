"""Teach the gguf package the cache types: their names, sizes and codec, without changing it.

from ggml_tq.gguf_types import register
register()
gguf.GGMLQuantizationType(121).name                     # 'TQ3_MSE'
gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(121))
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ggml_tq import codec
from ggml_tq.cache_types import BLOCK, TYPES, TqType

# the package's base class of codecs; the two underscores are part of its module-level name
_Base: Any = getattr(gguf.quants, "__Quant")


def _add_member(tq: TqType) -> GGMLQuantizationType:
    """A member like those of the class statement; Enum has no public way to add one."""
    name = tq.name.upper()
    member: GGMLQuantizationType = int.__new__(GGMLQuantizationType, tq.id)
    member._name_, member._value_ = name, tq.id
    GGMLQuantizationType._member_map_[name] = member
    GGMLQuantizationType._member_names_.append(name)
    GGMLQuantizationType._value2member_map_[tq.id] = member
    type.__setattr__(GGMLQuantizationType, name, member)
    return member


def _add_codec(tq: TqType, member: GGMLQuantizationType) -> None:
    class Codec(_Base, qtype=member):  # type: ignore[misc, call-arg]
        @classmethod
        def quantize_blocks(cls, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
            return codec.encode(blocks, tq)

        @classmethod
        def dequantize_blocks(cls, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
            return codec.decode(blocks, tq)


def register() -> None:
    """Add the cache types to gguf's tables, with the built-in parameters; once is enough, more does no harm.

    Raises ValueError if the gguf package uses one of the ids for another type.
    """
    for tq in TYPES.values():
        known = GGMLQuantizationType._value2member_map_.get(tq.id)
        if known is not None:
            if known.name != tq.name.upper():
                raise ValueError(f"type id {tq.id} is {known.name} in this gguf package, not {tq.name}")
            continue
        member = _add_member(tq)
        GGML_QUANT_SIZES[member] = (BLOCK, tq.block_bytes)
        _add_codec(tq, member)
