"""The cache types on a real model, and upstream's own tests of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Divergence, Fork

TYPES = ("tq2_mse", "tq3_mse", "tq4_mse", "tq2_qjl", "tq3_qjl", "tq4_qjl")


def test_more_bits_are_better(smollm2: Path, divergence: Divergence) -> None:
    kld = {name: divergence.measure(smollm2, (name, name)) for name in ("q8_0", "tq4", "tq3", "tq2")}
    assert kld["q8_0"] < kld["tq4"] < kld["tq3"] < kld["tq2"], kld
    # measured: 0.08, 0.25 and 0.95; noise between texts is about a tenth
    assert kld["tq4"] < 0.15
    assert kld["tq3"] < 0.45
    assert kld["tq2"] < 1.5


@pytest.mark.parametrize("name", ["tq3", "tq4"])
def test_decode_agrees_with_batches(smollm2: Path, divergence: Divergence, name: str) -> None:
    batched = divergence.measure(smollm2, (name, name))
    assert divergence.measure(smollm2, (name, name), "-ub", 1) == pytest.approx(batched, rel=0.05)


def test_batch_sizes_agree(smollm2: Path, divergence: Divergence) -> None:
    batched = divergence.measure(smollm2, ("tq3", "tq3"))
    for size in (7, 64):
        options = ("-b", size, "-ub", size)
        assert divergence.measure(smollm2, ("tq3", "tq3"), *options) == pytest.approx(batched, rel=0.05)


def test_quantize_fns(fork: Fork) -> None:
    result = fork.run("test-quantize-fns", timeout=240).ok()
    for name in TYPES:
        assert re.search(rf"Testing {name}\b", result.text), result.text
