"""``ggml-tq stamp``, ``inspect`` and ``strip``: quantizer parameters and centers in GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ggml_tq import metadata
from ggml_tq.cache_types import CODEBOOK_TYPES, FORMAT_VERSION
from ggml_tq.calibrate import calibrated, gaussian, params_of, sphere
from ggml_tq.capture import CaptureError, load_capture
from ggml_tq.center import Centers
from ggml_tq.cli.app import app, fail
from ggml_tq.gguf_file import GgufError, Header
from ggml_tq.hparams import key_shapes
from ggml_tq.metadata import Metadata
from ggml_tq.params import DEFAULT, ParamsError
from ggml_tq.signs import ROTATION_SEED, SKETCH_SEED

Model = Annotated[Path, typer.Argument(metavar="MODEL.gguf")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="The file to write; it must not exist.")]
InPlace = Annotated[
    bool, typer.Option("--in-place", help="Change MODEL.gguf itself, where its padding has room: after a first stamp.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Books(str, Enum):
    """Where codebooks come from."""

    sphere = "sphere"
    gaussian = "gaussian"
    calibrated = "calibrated"


class Center(str, Enum):
    """What `stamp` can center keys by."""

    none = "none"
    bias = "bias"


def _seed(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 2**64:
        raise fail(f"seed '{text}': want an integer from 0 to 2^64-1 (0x… is hexadecimal)")
    return value


@contextmanager
def _progress(output: Path | None, size: int) -> Iterator[Callable[[int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=output is None) as progress:
        task = progress.add_task(f"writing {output}", total=size)
        yield lambda done: progress.update(task, completed=done)


def _one_target(output: Path | None, in_place: bool) -> None:
    if (output is None) != in_place:
        raise fail("give either -o OUTPUT or --in-place")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@app.command()
def stamp(
    model: Model,
    output: Output = None,
    in_place: InPlace = False,
    seed: Annotated[str, typer.Option(help="Seed of the rotation, a 64-bit integer.")] = f"{ROTATION_SEED:#x}",
    sketch_seed: Annotated[str, typer.Option(help="Seed of the QJL sketch.")] = f"{SKETCH_SEED:#x}",
    codebooks: Annotated[
        Books,
        typer.Option(help="sphere: exact for a block (built in). gaussian: the limit. calibrated: from --calibration."),
    ] = Books.sphere,
    calibration: Annotated[
        Path | None, typer.Option(metavar="KV.safetensors", help="What `ggml-tq capture` recorded of this model.")
    ] = None,
    center: Annotated[
        Center | None,
        typer.Option(
            show_default=False,
            help="What keys are centered by. Default: as the file says, else the key projection's bias if it has one.",
        ),
    ] = None,
) -> None:
    """Write quantizer parameters into a model's metadata, which the runtime then obeys.

    Tensors and all other metadata stay as they are, byte for byte. Without options the parameters are the built-in
    ones: a stamped model then works as before, and goes on doing so in builds whose built-in ones differ. Centers that
    `ggml-tq calibrate` wrote stay unless --center says otherwise.
    """
    _one_target(output, in_place)
    if (codebooks == Books.calibrated) != (calibration is not None):
        raise fail("--codebooks calibrated and --calibration KV.safetensors go together")
    rotation_seed, qjl_seed = _seed(seed), _seed(sketch_seed)
    origin = {"codebooks": codebooks.value}
    try:
        if calibration is not None:
            with load_capture(calibration) as capture:
                book = calibrated(capture, rotation_seed)
                text = f"{capture.metadata.get('text', 'a text')}, {len(capture.tokens)} tokens"
                origin["calibration"] = text
        else:
            book = sphere if codebooks == Books.sphere else gaussian
        params = params_of(book, rotation_seed, qjl_seed)
        with _progress(output, _size(model)) as progress:
            given = None if center is None else Centers(center.value)
            centers = metadata.stamp(model, output, params, origin, progress, given)
    except (GgufError, CaptureError, ValueError) as e:
        raise fail(e) from e
    typer.echo(f"{output or model}: parameters {params.hash:016x} ({codebooks.value} codebooks), center {centers.kind}")


@app.command()
def strip(model: Model, output: Output = None, in_place: InPlace = False) -> None:
    """Remove quantizer parameters from a model's metadata: the built-in ones apply again."""
    _one_target(output, in_place)
    try:
        with _progress(output, _size(model)) as progress:
            metadata.strip(model, output, progress)
    except GgufError as e:
        raise fail(e) from e
    typer.echo(f"{output or model}: no {metadata.PREFIX}* metadata")


def _center_rms(header: Header, centers: Centers) -> list[float | None]:
    """Root mean square of each layer's centers; None where a layer has no keys."""
    if centers.key is None:
        return []
    sizes = [shape.size for shape in key_shapes(header.entries)]
    layers = np.split(centers.key.astype(np.float64), np.cumsum(sizes)[:-1])
    return [float(np.sqrt(np.mean(m * m))) if m.size else None for m in layers]


def _as_dict(header: Header, found: Metadata) -> dict[str, Any]:
    params, centers = found.params, found.centers
    return {
        "version": FORMAT_VERSION,
        "rotation_seed": params.rotation_seed,
        "sketch_seed": params.sketch_seed,
        "hash": f"{params.hash:016x}",
        "built_in": params.hash == DEFAULT.hash,
        "types": {
            name: {"centroids": q.centroids.tolist(), "kappa": float(q.kappa)} for name, q in params.quantizers.items()
        },
        "center": {
            "kind": centers.kind,
            "hash": f"{centers.hash:016x}" if centers.key is not None else None,
            "rms": _center_rms(header, centers),
        },
        "provenance": metadata.provenance_of(header),
    }


@app.command()
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Show and check what metadata of ours a model brings; exit status 1 if the runtime would refuse it.

    These are the quantizers' parameters, and what keys are centered by.
    """
    try:
        header, found = metadata.read(model)
    except (GgufError, ParamsError) as e:
        if as_json:
            typer.echo(json.dumps({"file": str(model), "valid": False, "error": str(e)}))
            raise typer.Exit(1) from e
        raise fail(f"{model}: {e}" if isinstance(e, ParamsError) else e) from e
    if as_json:
        parameters = None if found is None else _as_dict(header, found)
        typer.echo(json.dumps({"file": str(model), "valid": True, "parameters": parameters}, indent=2))
        return
    console = Console(highlight=False)
    if found is None:
        console.print(f"{model}: the built-in parameters apply ({DEFAULT.hash:016x})", soft_wrap=True)
        console.print(f"keys are centered by: {metadata.default_centers(header).kind}")
        return
    params, centers = found.params, found.centers
    built_in = " (the built-in ones)" if params.hash == DEFAULT.hash else ""
    console.print(f"{model}: parameters {params.hash:016x}{built_in}, format version {FORMAT_VERSION}")
    console.print(f"rotation seed {params.rotation_seed:#018x}, sketch seed {params.sketch_seed:#018x}")
    apart = "" if centers.first is None else ", position 0 apart"
    console.print(f"keys are centered by: {centers.kind}{apart}")
    for key, text in metadata.provenance_of(header).items():
        console.print(f"{key}: {text}", markup=False)
    table = Table("type", "kappa", "centroids")
    for name, tq in CODEBOOK_TYPES.items():
        q = params.quantizers[name]
        c = q.centroids
        half = len(c) // 2
        symmetric = np.array_equal(c, -c[::-1])
        shown = ("±" if symmetric else "") + ", ".join(f"{v:.4f}" for v in (c[half:] if symmetric else c))
        table.add_row(name, f"{q.kappa:.4f}" if tq.qjl else "", shown)
    console.print(table)
    if rms := _center_rms(header, centers):
        console.print(f"centers of {len(rms)} layers ({centers.hash:016x}), root mean square of each:")
        console.print(" ".join("-" if r is None else f"{r:.3g}" for r in rms))
