"""Read the cached keys and values in llama.cpp's state files: prompt caches (`--prompt-cache`) and saved slots.

The layout is upstream's (llama_context::state_write_data and llama_kv_cache::state_write), the type tags of our types
are docs/format.md's, section 7. Plain attention caches are read, with sliding windows or without; multimodal positions
and transposed values (no flash attention) are refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ggml_tq import codec
from ggml_tq.cache_types import FORMAT_VERSION, TYPES
from ggml_tq.gguf_types import register
from ggml_tq.params import DEFAULT, Params

_PROMPT_CACHE, _SEQUENCE = 0x6767736E, 0x67677371  # 'ggsn', 'ggsq'
_VERSIONS = {_PROMPT_CACHE: 10, _SEQUENCE: 3}


class StateError(ValueError):
    """A file that cannot be read; the message is one line for the user."""


@dataclass(frozen=True)
class Rows:
    """One layer's keys or values: ``data`` is uint8 (cells, row bytes)."""

    type: str  # ggml's name, such as tq3_qjl or f16
    version: int | None  # the format version in the tag, of our types
    hash_bits: int | None  # the low 20 bits of the parameters' hash in the tag, of keys with those of their centers'
    data: NDArray[np.uint8]

    def decode(self, params: Params = DEFAULT, centers: int = 0) -> NDArray[np.float32]:
        """The values, float32 (cells, n); those of upstream's quantized types as cached, rotated by its graph.

        ``centers``, for keys: the hash of what they are centered by (``ggml_tq.center.Centers.hash``), which are
        not added back; nor are scales undone. Raises StateError if ``params`` or ``centers`` are not those of the file.
        """
        if self.type in TYPES:
            if self.version != FORMAT_VERSION or self.hash_bits != (params.hash ^ centers) & 0xFFFFF:
                raise StateError(f"{self.type} rows of version {self.version}, parameters {self.hash_bits:05x}")
            return codec.decode(self.data, TYPES[self.type], params)
        values: NDArray[np.float32] = gguf.quants.dequantize(self.data, gguf.GGMLQuantizationType[self.type.upper()])
        return values


@dataclass(frozen=True)
class Stream:
    """The cells of one stream of one cache: a unified cache has one stream, a sliding window a cache of its own."""

    positions: NDArray[np.int32]  # (cells,)
    sequences: tuple[tuple[int, ...], ...]
    k: tuple[Rows, ...]  # one a layer that this cache holds
    v: tuple[Rows, ...]


@dataclass(frozen=True)
class State:
    tokens: NDArray[np.int32]
    streams: tuple[Stream, ...]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.position:
            raise StateError("truncated, or of a kind that is not read here")
        self.position += n
        return self.data[self.position - n : self.position]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def i32s(self, n: int) -> NDArray[np.int32]:
        return np.frombuffer(self.take(4 * n), "<i4")

    def rows(self, n_cells: int) -> Rows:
        tag = self.u32()
        row_bytes = int.from_bytes(self.take(8), "little")
        try:
            name = gguf.GGMLQuantizationType(tag & 0xFF).name.lower()
        except ValueError as e:
            raise StateError(f"a type of unknown tag {tag:#x}") from e
        data = np.frombuffer(self.take(n_cells * row_bytes), np.uint8).reshape(n_cells, row_bytes)
        if name not in TYPES:
            return Rows(name, None, None, data)
        return Rows(name, (tag >> 8 & 0xF) - 1, tag >> 12, data)

    def stream(self, n_cells: int) -> Stream:
        positions, sequences = [], []
        for _ in range(n_cells):
            position, n_sequences = struct.unpack("<iI", self.take(8))
            positions.append(position)
            sequences.append(tuple(int(s) for s in self.i32s(n_sequences)))
        transposed, n_layers = self.u32(), self.u32()
        if transposed:
            raise StateError("values are transposed (saved without flash attention), which is not read here")
        k = tuple(self.rows(n_cells) for _ in range(n_layers))
        v = tuple(self.rows(n_cells) for _ in range(n_layers))
        return Stream(np.array(positions, np.int32), tuple(sequences), k, v)


def read_state(path: Path) -> State:
    """Read a prompt cache or a saved slot. Raises StateError, or OSError if the file cannot be read at all."""
    register()
    reader = _Reader(path.read_bytes())
    try:
        magic, version = reader.u32(), reader.u32()
        if magic not in _VERSIONS:
            raise StateError("not a state file of llama.cpp")
        if version != _VERSIONS[magic]:
            raise StateError(f"state version {version}, want {_VERSIONS[magic]}")
        tokens = reader.i32s(reader.u32())
        if magic == _PROMPT_CACHE:
            reader.take(reader.u32())  # the architecture's name
        streams = []
        while reader.position < len(reader.data):  # a cache each
            for _ in range(reader.u32()):
                if n_cells := reader.u32():
                    streams.append(reader.stream(n_cells))
    except StateError as e:
        raise StateError(f"{path}: {e}") from e
    return State(tokens, tuple(streams))
