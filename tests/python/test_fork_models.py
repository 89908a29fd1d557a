"""Head layouts, mixed types and attention variants, on small models with random weights.

The measure is the divergence of the outputs from those with an f16 cache. At these models' weights it is
about 0.05, 0.15 and 0.45 for four, three and two bits, below 0.001 for q8_0, and above 2 for noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import VERBOSE, Divergence, Fork
from random_models import DeepSeek2, Gemma3, Llama, Model

BOUND = {"tq4": 0.12, "tq3": 0.35, "tq2": 0.9}
RandomModel = Callable[[Model], Path]

LAYOUTS = {
    "64": Llama(64),
    "64-mha": Llama(64, n_head=4, n_head_kv=4),
    "64-mqa": Llama(64, n_head=4, n_head_kv=1),
    "128": Llama(128),
    "128-mqa": Llama(128, n_head=6, n_head_kv=1),
    "192": Llama(192),
    "256": Llama(256),
    "512": Llama(512),
    "192-and-128": DeepSeek2(mla=False),
    "576-mla": DeepSeek2(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_supported_head_dims(random_model: RandomModel, divergence: Divergence, layout: str) -> None:
    model = random_model(LAYOUTS[layout])
    kld = {name: divergence.measure(model, (name, name)) for name in BOUND}
    assert all(0 < kld[name] < bound for name, bound in BOUND.items()), kld
    assert kld["tq4"] < kld["tq3"] < kld["tq2"]
    # one token at a time is another path through attention, of the same arithmetic
    assert divergence.measure(model, ("tq3", "tq3"), "-ub", 1) == pytest.approx(kld["tq3"], rel=0.03)


@pytest.mark.parametrize(
    ("k", "v"), [("tq3", "tq3"), ("tq4_mse", "f16"), ("f16", "tq2_qjl"), ("q8_0", "tq3"), ("tq3", "q8_0")]
)
@pytest.mark.parametrize("head_dim", [40, 80, 96])
def test_other_head_dims_are_refused(fork: Fork, random_model: RandomModel, head_dim: int, k: str, v: str) -> None:
    roles = [role for role, name in (("K", k), ("V", v)) if name.startswith("tq")]
    message = rf"{roles[0]} head dim of {head_dim}\b.*64, 128, 192, 256, 512, 576"
    fork.refuses_completion(message, random_model(Llama(head_dim)), cache=(k, v))


def test_other_head_dims_are_refused_for_one_of_two(fork: Fork, random_model: RandomModel) -> None:
    model = random_model(DeepSeek2(mla=False, head_dim_v=96))
    fork.complete(model, cache=("tq3", "f16"), n=4)
    for k in ("tq3", "f16"):
        fork.refuses_completion(r"V head dim of 96\b", model, cache=(k, "tq3"))


@pytest.mark.parametrize("program", ["llama-server", "llama-cli", "llama-bench", "llama-batched-bench"])
def test_every_program_refuses_a_head_dim(fork: Fork, random_model: RandomModel, program: str) -> None:
    model = random_model(Llama(80))
    fork.refuses(r"K head dim of 80\b", program, "-m", model, "-ctk", "tq3", "-ctv", "tq3")


@pytest.mark.parametrize("head_dim", [80, 96])
def test_upstreams_types_still_take_other_head_dims(fork: Fork, random_model: RandomModel, head_dim: int) -> None:
    fork.complete(random_model(Llama(head_dim)), cache=("f16", "f16"), n=4)


@pytest.mark.parametrize("other", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["tq4", "tq2"])
def test_mixed_types(random_model: RandomModel, divergence: Divergence, name: str, other: str) -> None:
    model = random_model(Llama(128))
    alone = divergence.measure(model, (name, name))
    # half of the error goes; q4_0 brings an error of its own, about that of tq4
    allowed = alone + (BOUND["tq4"] if other == "q4_0" else 0)
    assert 0 < divergence.measure(model, (name, other)) < allowed
    assert 0 < divergence.measure(model, (other, name)) < allowed


@pytest.mark.parametrize(("k", "v"), [("tq4_mse", "tq3_qjl"), ("tq2_qjl", "tq4_qjl"), ("tq3_mse", "tq3_mse")])
def test_any_two_of_ours(random_model: RandomModel, divergence: Divergence, k: str, v: str) -> None:
    assert 0 < divergence.measure(random_model(Llama(64)), (k, v)) < BOUND["tq2"]


def test_without_flash_attention_keys_work(random_model: RandomModel, divergence: Divergence) -> None:
    model = random_model(Llama(128))
    for k in ("tq3", "tq4_mse"):
        with_fa = divergence.measure(model, (k, "f16"))
        assert divergence.measure(model, (k, "f16"), "-fa", "off") == pytest.approx(with_fa, rel=0.1)


def test_without_flash_attention_values_are_refused(fork: Fork, random_model: RandomModel) -> None:
    model = random_model(Llama(128))
    message = "quantized V cache requires flash_attn"
    fork.refuses_completion(message, model, "-fa", "off", cache=("f16", "tq3"))


def test_mla_has_one_type(fork: Fork, random_model: RandomModel) -> None:
    model = random_model(DeepSeek2())
    short = fork.complete(model, *VERBOSE, cache=("tq3", "tq3"))
    assert "K = tq3_qjl (3.25 bits per value), V = tq3_qjl (3.25 bits per value)" in short.err
    assert f"KV buffer size = {256 * 2 * 576 * 3.25 / 8 / 2**20:8.2f} MiB" in short.err
    fork.complete(model, cache=("tq3_mse", "tq3_mse"))
    fork.refuses_completion(r"different K \(tq4_qjl\) and V \(tq3_mse\)", model, cache=("tq4", "tq3"))


@pytest.mark.parametrize("options", [(), ("--swa-full",)])
def test_sliding_window(
    fork: Fork, random_model: RandomModel, divergence: Divergence, options: tuple[str, ...]
) -> None:
    model = random_model(Gemma3())
    kld = {name: divergence.measure(model, (name, name), *options) for name in BOUND}
    assert all(0 < kld[name] < bound for name, bound in BOUND.items()), kld
    assert kld["tq4"] < kld["tq3"] < kld["tq2"]


def test_sliding_window_reuses_cells(random_model: RandomModel, divergence: Divergence) -> None:
    model = random_model(Gemma3())
    # 512 tokens in batches of 64: more than the window's own cache of 256 cells holds
    full, window = (
        divergence.measure(model, ("tq3", "tq3"), "-b", 64, "-ub", 64, *options, ctx=512)
        for options in (("--swa-full",), ())
    )
    assert window == pytest.approx(full, rel=0.05)
