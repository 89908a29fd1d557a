#!/usr/bin/env python3
"""``ggml-tq fetch`` from a checkout: download and verify test models and texts."""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from ggml_tq.cli.data import FETCH_HELP, fetch

if __name__ == "__main__":
    fetch.__doc__ = FETCH_HELP
    typer.run(fetch)
