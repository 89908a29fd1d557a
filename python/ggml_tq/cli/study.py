"""``ggml-tq study``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ggml_tq import calibrated, study_report
from ggml_tq.calibrated import CalibratedError
from ggml_tq.capture import CaptureError, load_capture
from ggml_tq.cli.app import app, fail
from ggml_tq.quantizers import CENTERS, Center, QuantizerError, Recipe, parse
from ggml_tq.study import StudyError, study

KEYS = "q8_0,q4_0,q4_0-norot,q4_0+mean,tq4_mse,tq4_mse+mean,tq3_mse,tq3_mse+mean,tq3_qjl"


def _center(text: str) -> Center:
    for center in CENTERS:
        if center == text:
            return center
    raise StudyError(f"--center {text}: want {', '.join(CENTERS)}")


def _layers(text: str, have: list[int]) -> list[int]:
    """ "all", "0,5,10" or "::3", the slice of all layers."""
    try:
        if ":" in text:
            return have[slice(*(int(part) if part else None for part in text.split(":")))]
        return have if text == "all" else [int(part) for part in text.split(",")]
    except (TypeError, ValueError) as e:
        raise StudyError(f"--layers {text}: want numbers with commas between them, START:STOP:STEP, or all") from e


def _pairs(keys: str, values: str | None, center: Center) -> list[tuple[Recipe, Recipe]]:
    of_keys = parse(keys, center)
    if values is None:
        return [(k, Recipe(k.quantizer)) for k in of_keys]
    of_values = parse(values)
    if len(of_values) == 1:
        of_values *= len(of_keys)
    if len(of_values) != len(of_keys):
        raise StudyError(f"{len(of_keys)} keys and {len(of_values)} values: want one value, or one for each key")
    return list(zip(of_keys, of_values, strict=True))


@app.command("study")
def study_command(
    file: Annotated[Path, typer.Argument(metavar="KV.safetensors", help="What `ggml-tq capture` wrote.")],
    keys: Annotated[str, typer.Option(help="Quantizers of keys, with commas between them.")] = KEYS,
    values: Annotated[
        str | None, typer.Option(help="Of values: one for all, or one for each key. (default: as the keys)")
    ] = None,
    center: Annotated[str, typer.Option(help="What comes off keys that do not say: none, mean, rope, cal.")] = "none",
    model: Annotated[
        Path | None,
        typer.Option("--calibrated", metavar="MODEL.gguf", help="Whose centers and scales `+cal` means."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers: all, 0,5,10, or a slice such as ::3.")] = "all",
    skip: Annotated[int, typer.Option(min=0, help="Queries of each chunk that do not count.")] = 256,
    calibration: Annotated[
        int | None, typer.Option(min=1, help="Tokens that means are taken over. (default: the first half)")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes. (default: one a core)")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write OUTPUT.json, .md and .png (a directory: study.*).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, layer by layer, instead of a table.")] = False,
) -> None:
    """Compare quantizers on a model's real queries, keys and values.

    Names: the cache types (`tq3_qjl`, `tq4_mse`, `tq3` by role); upstream's `q4_0` … `q8_0` with upstream's rotation of
    the head, `q4_0-norot` without; `f16`, `bf16`; `lm3`, a Lloyd-Max codebook over the whole head with the unbiased
    scale; any class of `ggml_tq.reference`, as `Eden(b=3,scale=biased)`. A key's name may end in `+mean` or `+rope`:
    the mean of the head's keys after or before RoPE comes off first and is put back exactly. `+cal` does what the
    cache does with the centers and scales of a calibrated model.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        if output is not None and not output.parent.is_dir():
            raise StudyError(f"{output.parent} is not a directory")
        with (
            load_capture(file) as capture,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task("layers", total=None)
            result = study(
                capture,
                _pairs(keys, values, _center(center)),
                _layers(layers, list(capture.layers)),
                skip,
                calibration,
                lambda n, total: progress.update(task, completed=n, total=total),
                jobs or os.cpu_count() or 1,
                calibrated.load(model) if model is not None else None,
            )
        written = study_report.write(result, output) if output is not None else []
    except (CalibratedError, CaptureError, StudyError, QuantizerError, OSError) as e:
        raise fail(e) from e
    if as_json:
        typer.echo(study_report.as_json(result))
        return
    table = Table()
    for heading in study_report.HEADINGS:
        table.add_column(heading, justify="left" if heading in ("keys", "values") else "right")
    for row in study_report.rows(result):
        table.add_row(*study_report.cells(row))
    for line in (study_report.title(result), *study_report.shares(result.layers)):
        typer.echo(line)
    # where there is no terminal to fit, nothing is cut
    Console(width=None if Console().is_terminal else 200).print(table)
    for path in written:
        typer.echo(path)
