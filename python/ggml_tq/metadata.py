"""Quantizer parameters and centers in GGUF metadata (docs/format.md, section 8): write, read and check them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as T

from ggml_tq import __version__
from ggml_tq.cache_types import CODEBOOK_TYPES, FORMAT_VERSION
from ggml_tq.center import KINDS, Centers, check_centers, check_scales
from ggml_tq.gguf_file import (
    Entry,
    GgufError,
    Header,
    encode_entry,
    packed_size,
    read_header,
    recover,
    tensors,
    without,
    write_copy,
    write_in_place,
)
from ggml_tq.hparams import key_shapes
from ggml_tq.params import Params, ParamsError, Quantizer, check_centroids, check_kappa

PREFIX = "turboquant."
PROVENANCE = PREFIX + "provenance."
PADDING = PROVENANCE + "padding"  # spaces, so that a later stamp fits in place
CENTER = "center."  # provenance of centers
ROTATION_KIND = "rht64"


@dataclass(frozen=True)
class Metadata:
    """What a file brings."""

    params: Params
    centers: Centers


def to_entries(params: Params, centers: Centers, provenance: Mapping[str, str]) -> list[Entry]:
    """All metadata entries of a set of parameters and centers; ``provenance`` says where they come from."""
    entries = [
        encode_entry(PREFIX + "version", T.UINT32, FORMAT_VERSION),
        encode_entry(PREFIX + "rotation.kind", T.STRING, ROTATION_KIND),
        encode_entry(PREFIX + "rotation.seed", T.UINT64, params.rotation_seed),
        encode_entry(PREFIX + "sketch.seed", T.UINT64, params.sketch_seed),
    ]
    for name, tq in CODEBOOK_TYPES.items():
        q = params.quantizers[name]
        entries.append(encode_entry(f"{PREFIX}{name}.codebook", T.ARRAY, q.centroids.tolist(), T.FLOAT32))
        if tq.qjl:
            entries.append(encode_entry(f"{PREFIX}{name}.kappa", T.FLOAT32, float(q.kappa)))
    entries.append(encode_entry(PREFIX + "hash", T.UINT64, params.hash))
    entries.append(encode_entry(PREFIX + "center.kind", T.STRING, centers.kind))
    if centers.key is not None and centers.scale is not None:
        entries.append(encode_entry(PREFIX + "center.key", T.ARRAY, centers.key.tolist(), T.FLOAT32))
        entries.append(encode_entry(PREFIX + "center.scale", T.ARRAY, centers.scale.tolist(), T.FLOAT32))
        if centers.first is not None:
            entries.append(encode_entry(PREFIX + "center.first", T.ARRAY, centers.first.tolist(), T.FLOAT32))
        entries.append(encode_entry(PREFIX + "center.hash", T.UINT64, centers.hash))
    entries += [encode_entry(PROVENANCE + key, T.STRING, text) for key, text in provenance.items()]
    return entries


class _Reader:
    """Gets values by name, and knows which ones nobody asked for."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = list(entries)
        self.ours = {e.key: e for e in self.entries if e.key.startswith(PREFIX)}
        self.read: set[str] = set()

    def get(self, name: str, kind: T, item: T | None = None) -> Any:  # noqa: ANN401
        key = PREFIX + name
        self.read.add(key)
        if key not in self.ours:
            raise ParamsError(key, "missing")
        e = self.ours[key]
        if (e.type, e.item_type) != (kind, item):
            raise ParamsError(key, f"wrong type, want {f'an array of {item.name}' if item else kind.name}")
        return e.value

    def string(self, name: str) -> str:
        return str(self.get(name, T.STRING)).split("\0")[0]  # as C reads it

    def params(self) -> Params:
        kind = self.string("rotation.kind")
        if kind != ROTATION_KIND:
            raise ParamsError(PREFIX + "rotation.kind", f"unknown rotation '{kind}', want '{ROTATION_KIND}'")
        rotation_seed, sketch_seed = self.get("rotation.seed", T.UINT64), self.get("sketch.seed", T.UINT64)
        quantizers = {}
        for name, tq in CODEBOOK_TYPES.items():
            codebook, kappa = f"{name}.codebook", f"{name}.kappa"
            quantizers[name] = Quantizer(
                check_centroids(tq, self.get(codebook, T.ARRAY, T.FLOAT32), PREFIX + codebook),
                check_kappa(self.get(kappa, T.FLOAT32) if tq.qjl else 0.0, PREFIX + kappa),
            )
        params = Params(rotation_seed, sketch_seed, quantizers)
        if self.get("hash", T.UINT64) != params.hash:
            raise ParamsError(PREFIX + "hash", "not that of the parameters, which were changed or damaged")
        return params

    def centers(self) -> Centers:
        name = self.string("center.kind")
        kind = next((k for k in KINDS if k == name), None)
        if kind is None:
            raise ParamsError(PREFIX + "center.kind", f"unknown kind '{name}', want {', '.join(KINDS)}")
        if kind != "mean":
            for key in (PREFIX + "center." + name for name in ("key", "scale", "first", "hash")):
                if key in self.ours:
                    raise ParamsError(key, f"only for the kind mean, not for {kind}")
            return Centers(kind)
        values = self.get("center.key", T.ARRAY, T.FLOAT32)
        try:
            want = sum(shape.size for shape in key_shapes(self.entries))
        except GgufError as e:
            raise ParamsError(PREFIX + "center.key", str(e)) from e
        means = check_centers(values, want, PREFIX + "center.key")
        scales = check_scales(self.get("center.scale", T.ARRAY, T.FLOAT32), want, PREFIX + "center.scale")
        first = None
        if PREFIX + "center.first" in self.ours:
            values = self.get("center.first", T.ARRAY, T.FLOAT32)
            first = check_centers(values, want, PREFIX + "center.first")
        centers = Centers(kind, means, scales, first)
        if self.get("center.hash", T.UINT64) != centers.hash:
            raise ParamsError(PREFIX + "center.hash", "not that of the centers, which were changed or damaged")
        return centers


def from_entries(entries: Iterable[Entry]) -> Metadata | None:
    """What all metadata of a file bring, None if they have none of ours.

    Raises ParamsError, which names the key, unless they are complete and valid; the runtime accepts and refuses
    the same files (llama_tq_load in ggml-tq/fork/hooks/llama-tq.cpp).
    """
    reader = _Reader(entries)
    if not reader.ours:
        return None
    version = reader.get("version", T.UINT32)  # first: what another one means by the other keys is not known here
    if version != FORMAT_VERSION:
        raise ParamsError(PREFIX + "version", f"unknown version {version}, this program knows {FORMAT_VERSION}")
    found = Metadata(reader.params(), reader.centers())
    for key in reader.ours:
        if key not in reader.read and not key.startswith(PROVENANCE):
            raise ParamsError(key, "unknown key")
    return found


def has_key_bias(header: Header) -> bool:
    """Whether a layer's key projection, alone or with queries and values, has a bias."""
    return any(re.fullmatch(r"blk\.\d+\.attn_(k|qkv)\.bias", t.name) for t in tensors(header))


def default_centers(header: Header) -> Centers:
    """What applies to a file without metadata."""
    return Centers("bias" if has_key_bias(header) else "none")


def provenance_of(header: Header) -> dict[str, str]:
    """What the file says about the origin of its parameters."""
    return {
        e.key.removeprefix(PROVENANCE): str(e.value)
        for e in header.entries
        if e.key.startswith(PROVENANCE) and e.key != PADDING
    }


def read(path: Path) -> tuple[Header, Metadata | None]:
    """A file's header and what it brings; raises GgufError or ParamsError."""
    header = read_header(path)
    return header, from_entries(header.entries)


def _rewrite(
    header: Header, entries: list[Entry], output: Path | None, progress: Callable[[int], None] = lambda _: None
) -> None:
    if output is None:
        write_in_place(header, entries)
    else:
        write_copy(header, entries, output, progress)


def _open(path: Path, output: Path | None) -> Header:
    if output is None:
        recover(path)
    header = read_header(path)
    if header.get("split.no", 0) != 0:
        raise GgufError(f"{path}: not the first part of a split model, which is where metadata belongs")
    if header.n_tensors == 0:
        raise GgufError(f"{path}: has no tensors, so it is not a model")
    return header


def stamp(
    path: Path,
    output: Path | None,
    params: Params,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
    centers: Centers | None = None,
) -> Centers:
    """Write ``path`` with ``params`` as its metadata to ``output`` (None: in place, if an earlier stamp left room).

    Parameters that the file had are replaced, and its centers, unless ``centers`` is None: then they stay, and a file
    without gets the default ones. Every other byte of metadata and tensors stays. Returns the file's centers.
    Raises GgufError, or ParamsError for centers that are to stay and are not valid.
    """
    header = _open(path, output)
    origin = {"tool": f"ggml-tq {__version__}", **(provenance or {})}
    if centers is None:
        if header.get(PREFIX + "center.kind") is None:
            centers = default_centers(header)
        else:
            centers = _Reader(header.entries).centers()
            origin = {k: v for k, v in provenance_of(header).items() if k.startswith(CENTER)} | origin
    entries = without(header.entries, PREFIX) + to_entries(params, centers, origin)
    spaces = 256
    if output is None:
        spaces = header.data_start - packed_size(header, entries) - len(encode_entry(PADDING, T.STRING, "").raw)
    if spaces >= 0:
        entries.append(encode_entry(PADDING, T.STRING, " " * spaces))
    _rewrite(header, entries, output, progress)
    return centers


def strip(path: Path, output: Path | None, progress: Callable[[int], None] = lambda _: None) -> None:
    """Write ``path`` without TurboQuant metadata to ``output`` (None: in place). Raises GgufError."""
    header = _open(path, output)
    kept = without(header.entries, PREFIX)
    if len(kept) == len(header.entries):
        raise GgufError(f"{path}: has no {PREFIX}* metadata")
    _rewrite(header, kept, output, progress)
