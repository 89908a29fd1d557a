"""Batch sizes on a real model, and upstream's own tests of the cache types; test_regression.py has the bounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Divergence, Fork

TYPES = ("tq2_mse", "tq3_mse", "tq4_mse", "tq2_qjl", "tq3_qjl", "tq4_qjl")


def test_batch_sizes_agree(smollm2: Path, divergence: Divergence) -> None:
    batched = divergence.measure(smollm2, ("tq3", "tq3"))
    # below 64 tokens queries are rounded to int8, from there on keys are decoded in tiles
    for size, close in ((7, 0.3), (64, 0.05)):
        options = ("-b", size, "-ub", size)
        assert divergence.measure(smollm2, ("tq3", "tq3"), *options) == pytest.approx(batched, rel=close)


def test_quantize_fns(fork: Fork) -> None:
    result = fork.run("test-quantize-fns", timeout=240).ok()
    for name in TYPES:
        assert re.search(rf"Testing {name}\b", result.text), result.text
