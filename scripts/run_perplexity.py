#!/usr/bin/env python3
"""Perplexity and KL divergence of cache types against the f16 cache: ``ggml-tq eval`` by another name."""

import typer

from ggml_tq.cli.eval import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
