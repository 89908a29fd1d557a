"""``ggml-tq calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ggml_tq import metadata
from ggml_tq.calibrate import (
    BEGINNING,
    BEGINNINGS,
    CHUNK,
    CalibrationError,
    Doubles,
    KeySums,
    key_biases,
    key_sums,
    mean_centers,
)
from ggml_tq.capture import CaptureError
from ggml_tq.cli.app import app, fail
from ggml_tq.eval.runs import EvalError, sha256
from ggml_tq.gguf_file import GgufError, Header, packed_size, without
from ggml_tq.hparams import key_shapes
from ggml_tq.params import DEFAULT, ParamsError


def _check_target(header: Header, output: Path | None) -> None:
    """Refuses before the model runs what would be refused after."""
    if output is None:
        size = 12 * sum(shape.size for shape in key_shapes(header.entries))
        if header.data_start - packed_size(header, without(header.entries, metadata.PREFIX)) < size:
            raise GgufError(f"{header.path}: has no room for {size} bytes in its header: write to another file instead")
    elif output.exists():
        raise GgufError(f"{output}: exists, and is not overwritten")
    elif not output.parent.is_dir():
        raise GgufError(f"{output.parent}: is not a directory")


def _rows(sums: dict[int, KeySums], biases: dict[int, Doubles]) -> list[dict[str, Any]]:
    """By layer: the shares of the keys' energy in their mean and in the bias, how far these are from each other, the
    part of the error's power that scales leave, and that of keys at position 0 which a center of their own leaves.
    """
    rows = []
    for index, of_layer in sums.items():
        mean, bias = of_layer.mean, biases.get(index)
        row: dict[str, Any] = {"layer": index, "mean": of_layer.share(mean)}
        row |= {"scaled": of_layer.gain, "first": of_layer.first_left}
        if bias is not None:
            row["bias"] = of_layer.share(bias)
            row["distance"] = float(np.linalg.norm(mean - bias) / np.linalg.norm(mean))
        rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    """With a line of medians and one of maxima."""
    table = Table(
        caption="mean, bias: share of the keys' energy; distance: |mean - bias| / |mean|; "
        "scaled: power of the scores' error, of that without scales; "
        "first: energy of keys at position 0 with their own center, of that with the mean"
    )
    columns = [name for name in ("mean", "bias", "distance", "scaled", "first") if any(name in row for row in rows)]
    for name in ("layer", *columns):
        table.add_column(name, justify="right")

    def line(label: object, values: list[float | None]) -> None:
        table.add_row(str(label), *("" if v is None else f"{v:.4f}" for v in values))

    for row in rows:
        line(row["layer"], [row.get(name) for name in columns])
    table.add_section()
    known = [[row[name] for row in rows if name in row] for name in columns]
    line("median", [float(np.median(values)) for values in known])
    line("max", [max(values) for values in known])
    return table


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option("--model", "-m", help="The model (GGUF).")],
    text: Annotated[Path, typer.Option("--file", "-f", help="A text of the kind that it will read (UTF-8).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write; it must not exist.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change the model itself, where its header has room: calibrated before.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(min=32, help=f"Tokens to read, in chunks of {CHUNK} spread over the text.")
    ] = 4096,
    directory: Annotated[
        Path | None, typer.Option("--bin", help="Where llama-tq-capture is. (default: as built)", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write the mean of a model's keys before RoPE, and scales for the rest, into its metadata, for the cache to use.

    The mean is taken over the tokens from the 17th of each chunk on; the first ones have keys of their own kind. The
    runtime takes it, turned to each key's position, off the key before encoding and adds it to the score exactly.
    What is left is scaled coordinate by coordinate, so that its rounding errs where the model's queries hardly look.
    The key at position 0, which attention falls back on, gets a center of its own, from many short beginnings.
    Seeds and codebooks that the file brings stay; a file without gets the built-in ones. While the model runs, one
    chunk's queries, keys and values lie beside the file to write.
    """
    if (output is None) != in_place:
        raise fail("give either -o OUTPUT or --in-place")
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        header, found = metadata.read(model)
        _check_target(header, output)
        origin = {"center.text": text.name, "center.sha256": sha256(text)}
        folder = (output or model).resolve().parent
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("tokens", total=tokens + BEGINNINGS * BEGINNING)
            sums = key_sums(header, text, tokens, folder, directory, lambda n: progress.update(task, completed=n))
        counted = max(of_layer.tokens for of_layer in sums.values())
        origin["center.tokens"] = str(counted)
        kept = {k: v for k, v in metadata.provenance_of(header).items() if k != "tool"}
        centers = mean_centers(header, sums)
        params = found.params if found else DEFAULT
        metadata.stamp(model, output, params, kept | origin, centers=centers)
        rows = _rows(sums, key_biases(header, sums))
    except (CalibrationError, CaptureError, EvalError, GgufError, ParamsError, OSError) as e:
        raise fail(e) from e
    if as_json:
        typer.echo(json.dumps({"file": str(output or model), "tokens": counted, "layers": rows}, indent=2))
        return
    Console().print(_table(rows))
    of = f"{len(sums)} of {len(key_shapes(header.entries))} layers"
    if centers.first is None:
        typer.echo(f"{text}: too short for a center of position 0's keys, which is that of the others", err=True)
    typer.echo(f"{output or model}: centers {centers.hash:016x}, means over {counted} tokens, {of}")
