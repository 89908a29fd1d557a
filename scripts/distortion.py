#!/usr/bin/env python3
"""``ggml-tq distortion`` from a checkout: error of every reference algorithm, docs/results/distortion.*."""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from ggml_tq.cli.distortion import distortion

if __name__ == "__main__":
    typer.run(distortion)
