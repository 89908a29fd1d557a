"""The header of a GGUF file as bytes: find, remove and add metadata entries without touching anything else.

A GGUF file is magic, version and two counts, then key-value entries, tensor infos, padding, and tensor data whose
offsets count from the end of the padding. So entries can change while every other byte is copied as it is, and a
large model needs no memory: the file is mapped, its data is streamed. (Specification: docs/gguf.md of ggml.)
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

CHUNK = 1 << 24  # bytes copied at a time
_HEAD = struct.Struct("<4sIQQ")
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


class GgufError(Exception):
    """A file that is not usable, or an operation that was refused; the message is one line for the user."""


@dataclass(frozen=True)
class Entry:
    """One key-value pair; ``raw`` is all of it as in the file."""

    key: str
    type: GGUFValueType
    item_type: GGUFValueType | None  # of an array's items
    raw: bytes
    value_offset: int  # in raw, behind the type

    @property
    def value(self) -> Any:  # noqa: ANN401
        """The value as a Python number, string, or list of them."""
        return _Cursor(self.raw, self.value_offset).value(self.type)


@dataclass(frozen=True)
class Header:
    """Everything before the tensor data."""

    path: Path
    version: int
    n_tensors: int
    entries: tuple[Entry, ...]
    tensor_infos: bytes
    alignment: int
    data_start: int  # bytes from the start of the file
    size: int  # of the file

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401
        return next((e.value for e in self.entries if e.key == key), default)


class _Cursor:
    """Reads values in order and never beyond the end."""

    def __init__(self, data: bytes | mmap.mmap, position: int) -> None:
        self.data: Any = data  # typeshed has no name for what slices of both are
        self.position = position

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.position:
            raise GgufError("truncated: its header goes on beyond its end")
        self.position += n
        taken: bytes = self.data[self.position - n : self.position]
        return taken

    def scalar(self, fmt: str) -> Any:  # noqa: ANN401
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode(errors="surrogateescape")

    def type(self) -> GGUFValueType:
        number = self.scalar("<I")
        try:
            return GGUFValueType(number)
        except ValueError as e:
            raise GgufError(f"broken: a metadata value of unknown type {number}") from e

    def skip(self, kind: GGUFValueType) -> None:
        if kind == GGUFValueType.STRING:
            self.take(self.scalar("<Q"))
        elif kind == GGUFValueType.ARRAY:
            item, n = self.type(), self.scalar("<Q")
            if item in _SCALARS:
                self.take(n * struct.calcsize(_SCALARS[item]))
            else:
                for _ in range(n):
                    self.skip(item)
        else:
            self.take(struct.calcsize(_SCALARS[kind]))

    def value(self, kind: GGUFValueType) -> Any:  # noqa: ANN401
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            item, n = self.type(), self.scalar("<Q")
            return [self.value(item) for _ in range(n)]
        return self.scalar(_SCALARS[kind])


def _entry(cursor: _Cursor) -> Entry:
    start = cursor.position
    key = cursor.string()
    kind = cursor.type()
    value_start = cursor.position
    item_type = cursor.type() if kind == GGUFValueType.ARRAY else None
    cursor.position = value_start
    cursor.skip(kind)
    return Entry(key, kind, item_type, cursor.data[start : cursor.position], value_start - start)


def encode_entry(key: str, kind: GGUFValueType, value: Any, item_type: GGUFValueType | None = None) -> Entry:  # noqa: ANN401
    """An entry of a scalar, a string, or an array of scalars."""

    def pack(kind: GGUFValueType, value: Any) -> bytes:  # noqa: ANN401
        if kind == GGUFValueType.STRING:
            value = str(value).encode()
            return struct.pack("<Q", len(value)) + bytes(value)
        return struct.pack(_SCALARS[kind], value)

    head = struct.pack("<Q", len(key.encode())) + key.encode() + struct.pack("<I", kind)
    if item_type is None:
        return Entry(key, kind, None, head + pack(kind, value), len(head))
    items = b"".join(pack(item_type, v) for v in value)
    return Entry(key, kind, item_type, head + struct.pack("<IQ", item_type, len(value)) + items, len(head))


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is: its number of values, the number of its type, bytes from the start of the data."""

    name: str
    n_values: int
    type: int
    offset: int

    @property
    def end(self) -> int:
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.type)]
        except (ValueError, KeyError):  # a type that the gguf package does not know
            return self.offset
        return self.offset + self.n_values // block * size


def _tensor(cursor: _Cursor) -> Tensor:
    name, n_values = cursor.string(), 1
    for _ in range(cursor.scalar("<I")):
        n_values *= cursor.scalar("<Q")
    return Tensor(name, n_values, cursor.scalar("<I"), cursor.scalar("<Q"))


def tensors(header: Header) -> list[Tensor]:
    """The tensors of the file."""
    cursor = _Cursor(header.tensor_infos, 0)
    return [_tensor(cursor) for _ in range(header.n_tensors)]


def read_vector(header: Header, tensor: Tensor) -> NDArray[np.float32]:
    """The values of a float32 tensor, flat; raises GgufError for other types."""
    if tensor.type != GGMLQuantizationType.F32:
        raise GgufError(f"{header.path}: {tensor.name} is not of type F32")
    return np.fromfile(header.path, "<f4", tensor.n_values, offset=header.data_start + tensor.offset)


def read_header(path: Path) -> Header:
    """Parse a file's header; raises GgufError if it is not a whole little-endian GGUF file of version 2 or 3."""
    if _journal(path).exists():
        raise GgufError(
            f"{path}: a change of its header was interrupted; `ggml-tq stamp --in-place` and `strip --in-place` "
            "undo that first"
        )
    try:
        with path.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            if size < _HEAD.size:
                raise GgufError(f"{path}: not a GGUF file")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, size)
    except OSError as e:
        raise GgufError(f"{path}: {e.strerror}") from e


def _parse(path: Path, data: mmap.mmap, size: int) -> Header:
    cursor = _Cursor(data, 0)
    magic, version, n_tensors, n_entries = _HEAD.unpack(cursor.take(_HEAD.size))
    if magic != b"GGUF":
        raise GgufError(f"{path}: not a GGUF file")
    if version & 0xFFFF == 0:
        raise GgufError(f"{path}: a big-endian GGUF file, which is not supported")
    if version not in (2, 3):
        raise GgufError(f"{path}: GGUF version {version}, which is not supported")
    try:
        entries = tuple(_entry(cursor) for _ in range(n_entries))
        start = cursor.position
        data_size = max((_tensor(cursor).end for _ in range(n_tensors)), default=0)
    except (GgufError, RecursionError) as e:
        raise GgufError(f"{path}: {e}") from e
    if len({e.key for e in entries}) != n_entries:
        raise GgufError(f"{path}: broken: a metadata key occurs twice")
    infos = data[start : cursor.position]
    alignment = next((e.value for e in entries if e.key == "general.alignment"), 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise GgufError(f"{path}: broken: general.alignment is not a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    if n_tensors and data_start + data_size > size:
        raise GgufError(f"{path}: truncated: {size} bytes, its tensors need {data_start + data_size}")
    return Header(path, version, n_tensors, entries, infos, alignment, data_start, size)


def packed_size(old: Header, entries: Iterable[Entry]) -> int:
    """Bytes that a header with other entries takes, before it is padded."""
    return _HEAD.size + sum(len(e.raw) for e in entries) + len(old.tensor_infos)


def _pack_header(old: Header, entries: Sequence[Entry]) -> bytes:
    """The header with other entries, padded to where the data starts."""
    head = _HEAD.pack(b"GGUF", old.version, old.n_tensors, len(entries))
    body = head + b"".join(e.raw for e in entries) + old.tensor_infos
    return body + bytes(-len(body) % old.alignment)


def write_copy(
    old: Header, entries: Sequence[Entry], target: Path, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write the file with other ``entries`` to ``target``, which must not exist; the tensor data is the same bytes.

    ``progress`` is told how many bytes are done. Whatever happens, ``target`` is a whole file or does not exist.
    """
    if target.exists():
        raise GgufError(f"{target}: exists, and is not overwritten")
    header = _pack_header(old, entries)
    partial: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}-", delete=False) as out:
            partial = Path(out.name)
            out.write(header)
            with old.path.open("rb") as source:
                source.seek(old.data_start)
                done = len(header)
                while chunk := source.read(CHUNK):
                    out.write(chunk)
                    done += len(chunk)
                    progress(done)
            out.flush()
            os.fsync(out.fileno())
            os.fchmod(out.fileno(), old.path.stat().st_mode & 0o666)
        partial.rename(target)
    except OSError as e:
        raise GgufError(f"{e.filename or target}: {e.strerror}") from e
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _journal(path: Path) -> Path:
    return path.with_name(path.name + ".old-header")


def write_in_place(old: Header, entries: Sequence[Entry]) -> None:
    """Replace the header where the data stays where it is; raises GgufError where it would have to move.

    The old header lies beside the file until the new one is on the disk: should that be interrupted, the file is
    broken and ``recover`` mends it.
    """
    header = _pack_header(old, entries)
    if len(header) != old.data_start:
        raise GgufError(
            f"{old.path}: the header would take {len(header)} bytes instead of {old.data_start}, so the tensors would "
            "have to move: write to another file instead"
        )
    journal = _journal(old.path)
    partial = journal.with_name(journal.name + ".partial")
    try:
        with old.path.open("r+b") as f:
            with partial.open("wb") as j:
                j.write(f.read(old.data_start))
                j.flush()
                os.fsync(j.fileno())
            partial.rename(journal)  # under its final name it is whole
            _overwrite(f, header)
        journal.unlink()
    except OSError as e:
        raise GgufError(f"{e.filename or old.path}: {e.strerror}") from e


def recover(path: Path) -> bool:
    """Undo an interrupted ``write_in_place``; True if there was one."""
    journal = _journal(path)
    if not journal.exists():
        return False
    try:
        with path.open("r+b") as f:
            _overwrite(f, journal.read_bytes())
        journal.unlink()
    except OSError as e:
        raise GgufError(f"{e.filename or journal}: {e.strerror}") from e
    return True


def _overwrite(f: BinaryIO, header: bytes) -> None:
    f.seek(0)
    f.write(header)
    f.flush()
    os.fsync(f.fileno())


def without(entries: Iterable[Entry], prefix: str) -> list[Entry]:
    """The entries whose keys do not start with ``prefix``."""
    return [e for e in entries if not e.key.startswith(prefix)]
