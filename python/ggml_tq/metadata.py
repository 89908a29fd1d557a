"""Quantizer parameters in GGUF metadata (docs/format.md, section 8): write, read and check them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as T

from ggml_tq import __version__
from ggml_tq.cache_types import CODEBOOK_TYPES, FORMAT_VERSION
from ggml_tq.gguf_file import (
    Entry,
    GgufError,
    Header,
    encode_entry,
    packed_size,
    read_header,
    recover,
    without,
    write_copy,
    write_in_place,
)
from ggml_tq.params import Params, ParamsError, Quantizer, check_centroids, check_kappa

PREFIX = "turboquant."
PROVENANCE = PREFIX + "provenance."
PADDING = PROVENANCE + "padding"  # spaces, so that a later stamp fits in place
ROTATION_KIND = "rht64"


def to_entries(params: Params, provenance: Mapping[str, str]) -> list[Entry]:
    """All metadata entries of a set of parameters; ``provenance`` says where they come from."""
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
    entries += [encode_entry(PROVENANCE + key, T.STRING, text) for key, text in provenance.items()]
    return entries


def from_entries(entries: Iterable[Entry]) -> Params | None:
    """The parameters in a file's metadata, None if it has none.

    Raises ParamsError, which names the key, unless they are complete and valid; the runtime accepts and refuses
    the same files (llama_tq_load in ggml-tq/fork/hooks/llama-tq.cpp).
    """
    ours = {e.key: e for e in entries if e.key.startswith(PREFIX)}
    if not ours:
        return None
    read: set[str] = set()

    def get(name: str, kind: T, item: T | None = None) -> Any:  # noqa: ANN401
        key = PREFIX + name
        read.add(key)
        if key not in ours:
            raise ParamsError(key, "missing")
        e = ours[key]
        if (e.type, e.item_type) != (kind, item):
            raise ParamsError(key, f"wrong type, want {f'an array of {item.name}' if item else kind.name}")
        return e.value

    version = get("version", T.UINT32)  # first: what another one means by the other keys is not known here
    if version != FORMAT_VERSION:
        raise ParamsError(PREFIX + "version", f"unknown version {version}, this program knows {FORMAT_VERSION}")
    kind = get("rotation.kind", T.STRING).split("\0")[0]  # as C reads it
    if kind != ROTATION_KIND:
        raise ParamsError(PREFIX + "rotation.kind", f"unknown rotation '{kind}', want '{ROTATION_KIND}'")
    rotation_seed, sketch_seed = get("rotation.seed", T.UINT64), get("sketch.seed", T.UINT64)
    quantizers = {}
    for name, tq in CODEBOOK_TYPES.items():
        codebook, kappa = f"{name}.codebook", f"{name}.kappa"
        quantizers[name] = Quantizer(
            check_centroids(tq, get(codebook, T.ARRAY, T.FLOAT32), PREFIX + codebook),
            check_kappa(get(kappa, T.FLOAT32) if tq.qjl else 0.0, PREFIX + kappa),
        )
    params = Params(rotation_seed, sketch_seed, quantizers)
    if get("hash", T.UINT64) != params.hash:
        raise ParamsError(PREFIX + "hash", "not that of the parameters, which were changed or damaged")
    for key in ours:
        if key not in read and not key.startswith(PROVENANCE):
            raise ParamsError(key, "unknown key")
    return params


def provenance(header: Header) -> dict[str, str]:
    """What the file says about the origin of its parameters."""
    return {
        e.key.removeprefix(PROVENANCE): str(e.value)
        for e in header.entries
        if e.key.startswith(PROVENANCE) and e.key != PADDING
    }


def read(path: Path) -> tuple[Header, Params | None]:
    """A file's header and its parameters; raises GgufError or ParamsError."""
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
) -> None:
    """Write ``path`` with ``params`` as its metadata to ``output`` (None: in place, if an earlier stamp left room).

    Parameters that the file had are replaced; every other byte of metadata and tensors stays. Raises GgufError.
    """
    header = _open(path, output)
    origin = {"tool": f"ggml-tq {__version__}", **(provenance or {})}
    entries = without(header.entries, PREFIX) + to_entries(params, origin)
    spaces = 256
    if output is None:
        spaces = header.data_start - packed_size(header, entries) - len(encode_entry(PADDING, T.STRING, "").raw)
    if spaces >= 0:
        entries.append(encode_entry(PADDING, T.STRING, " " * spaces))
    _rewrite(header, entries, output, progress)


def strip(path: Path, output: Path | None, progress: Callable[[int], None] = lambda _: None) -> None:
    """Write ``path`` without TurboQuant metadata to ``output`` (None: in place). Raises GgufError."""
    header = _open(path, output)
    kept = without(header.entries, PREFIX)
    if len(kept) == len(header.entries):
        raise GgufError(f"{path}: has no {PREFIX}* metadata")
    _rewrite(header, kept, output, progress)
