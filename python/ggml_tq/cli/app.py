"""The ``ggml-tq`` application object, and how its commands report errors."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ggml_tq import __version__

app = typer.Typer(
    help="TurboQuant KV cache types for llama.cpp: what they are, how good they are, and models prepared for them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def fail(error: object) -> typer.Exit:
    """Print a one-line error; ``raise fail(e) from e`` ends the command with exit status 1."""
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
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
