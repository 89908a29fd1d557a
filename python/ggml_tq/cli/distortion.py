"""``ggml-tq distortion``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ggml_tq import distortion as d
from ggml_tq.cli.app import app, fail
from ggml_tq.eval.report import replace_file

RESULTS = Path("docs/results/distortion.json")


@app.command()
def distortion(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Results; the table and the plot go beside it.")
    ] = RESULTS,
    render_only: Annotated[
        bool, typer.Option("--render", help="Measure nothing: table and plot from the recorded results.")
    ] = False,
    time_only: Annotated[
        bool, typer.Option("--time", help="Keep the recorded errors, measure the throughput again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results too.")] = False,
) -> None:
    """Measure every reference algorithm at 1 to 8 bits on random vectors, against Shannon's bound.

    Needs no model. Records distortion, inner-product error, bias and encoding throughput as JSON, and writes a
    table (.md) and a plot (.png) beside it. Takes some minutes.
    """
    try:
        if not output.parent.is_dir():
            raise d.DistortionError(f"{output.parent}: no such folder")
        if not render_only:
            kept = d.load(output)[1] if time_only else None
            replace_file(output, d.dump(_measure(kept)))
        d.render(output)
        if as_json:
            typer.echo(output.read_text(encoding="utf-8"), nl=False)
        else:
            typer.echo(output.with_suffix(".md"))
    except (d.DistortionError, OSError, ImportError) as e:
        raise fail(e) from e


def _measure(kept: list[d.Measure] | None) -> d.Results:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        measures = kept or []
        if kept is None:
            for dim in d.DIMS:
                x = d.sphere(d.VECTORS, dim)
                for entry in progress.track(list(d.entries(dim)), description=f"dimension {dim}"):
                    measures.append(d.measure(entry, x))
        jobs = progress.track(list(d.speeds()), description="throughput")
        return d.results(measures, [d.time_encoder(*job) for job in jobs])
