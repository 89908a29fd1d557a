"""``ggml-tq train-trellis``."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from ggml_tq.cli.app import app, fail
from ggml_tq.reference.trellis import TABLES
from ggml_tq.reference.trellis_training import CODES, Settings, train_codes

DEFAULT = Settings()


class TrellisError(Exception):
    """One line for the user."""


def as_text(data: dict[str, Any]) -> str:
    """JSON with every list of numbers on one line."""
    text = json.dumps(data, indent=1)
    return (
        re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
        + "\n"
    )


@app.command("train-trellis")
def train_trellis(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The table file. (default: the package's own)")
    ] = None,
    codes: Annotated[str, typer.Option(help="Names such as 32x16-3b, with commas between them, or all.")] = "all",
    device: Annotated[str, typer.Option(help="numpy, or a device of torch: cpu, cuda.")] = "numpy",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Codes at a time.")] = 1,
    blocks: Annotated[int, typer.Option(min=64, help="Blocks of 64 coordinates a sample.")] = DEFAULT.blocks,
    restarts: Annotated[int, typer.Option(min=1, help="Starts a code.")] = DEFAULT.restarts,
    iterations: Annotated[int, typer.Option(min=1, help="Of every start.")] = DEFAULT.rough,
    fine: Annotated[int, typer.Option(min=0, help="Of the best start, on all samples.")] = DEFAULT.fine,
    seed: Annotated[int, typer.Option(help="Of samples and starts.")] = DEFAULT.seed,
) -> None:
    """Train the level tables of trellis codes: generalized Lloyd on blocks uniform on the sphere.

    A code's name says the entries of its table, the states of its trellis and the bits a coordinate. Codes that are
    not named stay in the file as they are. The same seed on the same kind of device gives the same tables.
    """
    try:
        names = list(CODES) if codes == "all" else [name.strip() for name in codes.split(",")]
        if unknown := [name for name in names if name not in CODES]:
            raise TrellisError(f"unknown code '{unknown[0]}': known are {', '.join(CODES)}")
        if device != "numpy":
            import torch

            torch.empty(0, device=device)
        path = output or Path(str(resources.files("ggml_tq.reference").joinpath(TABLES)))
        old: dict[str, Any] = json.loads(path.read_text())["tables"] if path.exists() else {}
        settings = replace(DEFAULT, blocks=blocks, restarts=restarts, rough=iterations, fine=fine, seed=seed)

        def progress(name: str, table: dict[str, Any]) -> None:
            typer.echo(f"{name}: distortion {table['distortion']}")

        data = train_codes(names, settings, device, jobs, progress)
        data["tables"] = {n: data["tables"].get(n, old.get(n)) for n in CODES if n in data["tables"] or n in old}
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(as_text(data))
        os.replace(temporary, path)
    except (TrellisError, OSError, ImportError, RuntimeError, ValueError, KeyError) as e:
        raise fail(e) from e
    typer.echo(f"{path}: {len(data['tables'])} codes")
