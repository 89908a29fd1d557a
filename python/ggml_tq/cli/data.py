"""``ggml-tq fetch`` and ``ggml-tq types``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from ggml_tq import data
from ggml_tq.cache_types import TYPES
from ggml_tq.cli.app import app, fail


def _advance(progress: Progress, task: TaskID, completed: int) -> None:
    progress.update(task, completed=completed)


FETCH_HELP = "Download and verify test models and texts.\n\n" + "\n".join(
    f"- **{name}**: {a.about}, {a.size / 1e6:.0f} MB" for name, a in data.ASSETS.items()
)


@app.command(help=FETCH_HELP)
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="What to fetch.")],
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where to put it. (default: $GGML_TQ_DATA, or models)"),
    ] = None,
) -> None:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    try:
        for name in names:  # before an hour of downloads
            data.check_name(name)
        with Progress(*columns, console=console) as progress:
            for name in names:
                task = progress.add_task(name, total=data.ASSETS[name].size)
                done = partial(_advance, progress, task)
                typer.echo(data.fetch(name, directory or data.data_dir(), done))
    except data.DataError as e:
        raise fail(e) from e


@app.command()
def types(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the cache types and the error that is expected of them.

    The distortion is the expected squared error of a decoded row relative to the row's own square. D(B) is
    that of the Lloyd-Max codebook of B bits. An **mse** type of N bits has D(N). A **qjl** type
    spends one bit on the signs of the sketched residual, which take 2/pi of its square away and leave
    D' = (1 - 2/pi) D(N-1); its scale makes inner products unbiased and the distortion D' / (1 - D'). A **tcq** type is
    a trellis code of as many bytes, with that scale too; its D' is measured.
    """
    rows = [
        {
            "name": t.name,
            "id": t.id,
            "bits": t.bits,
            "block_bytes": t.block_bytes,
            "bits_per_value": t.bits_per_value,
            "distortion": t.distortion,
        }
        for t in TYPES.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("type", caption="keys: tqN means tqN_qjl; values: tqN means tqN_mse")
    for heading in ("id", "bits", "bytes/64 values", "bits/value", "distortion"):
        table.add_column(heading, justify="right")
    for r in rows:
        cells = (r["id"], r["bits"], r["block_bytes"], r["bits_per_value"])
        table.add_row(str(r["name"]), *map(str, cells), f"{r['distortion']:.4f}")
    Console().print(table)
