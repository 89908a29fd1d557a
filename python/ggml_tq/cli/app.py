"""The ``ggml-tq`` application object, and how its commands report errors."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ggml_tq import __version__

HELP = """TurboQuant KV cache types for llama.cpp: learn them, measure them, prepare a model for them.

- **learn**: `types` lists the cache types; `distortion` compares every algorithm with the Shannon bound.
- **prepare**: `calibrate` writes the means of a model's keys into its metadata, for the cache to center them by;
  `stamp` writes seeds and codebooks, `inspect` shows all of it, `strip` removes it. `capture` records real queries,
  keys and values; `study` says what quantizers make of them, and `stamp` can take codebooks from them. `train-trellis`
  makes the tables of trellis codes.
- **measure**: `eval` (perplexity, KL divergence), `retrieval` and `bench` run the fork's own programs and record what
  they find; `report` makes tables and plots of it.

A first round, with the programs of `make build`:

    ggml-tq fetch smollm2 wiki
    ggml-tq eval -m models/SmolLM2-135M-Instruct.Q4_1.gguf -f models/wiki.txt --help
    ggml-tq calibrate -m models/SmolLM2-135M-Instruct.Q4_1.gguf -f models/wiki.txt -o calibrated.gguf
    ggml-tq inspect calibrated.gguf
    build/bin/llama-cli -m calibrated.gguf -ctk tq3 -ctv tq3

Exit status: 0 done, 1 an error (one line on standard error), 2 a wrong command line.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def fail(error: object) -> typer.Exit:
    """Print a one-line error; ``raise fail(e) from e`` ends the command with exit status 1."""
    Console(stderr=True).print(
        f"error: {error}", style="red", markup=False, highlight=False, emoji=False, soft_wrap=True
    )
    return typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ggml-tq {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass  # --version acts in its callback
