"""Several sequences, context shift, draft models and a cache on a remote device."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import THREADS, VERBOSE, Fork, Server, free_port, listening, wait_until
from random_models import DeepSeek2, Gemma3, Llama, Model

TQ3 = ("-ctk", "tq3", "-ctv", "tq3")
TQ4 = ("-ctk", "tq4", "-ctv", "tq4")
PROMPTS = (
    "The history of the city begins with a small harbour at the mouth of the river.",
    "To bake a loaf of bread you need flour, water, salt and yeast. First, mix the",
)


@pytest.mark.parametrize(("options", "streams"), [((), 2), (("--kv-unified",), 1)])
def test_batched_bench(fork: Fork, smollm2: Path, options: tuple[str, ...], streams: int) -> None:
    work = ("-c", 512, "-npp", 32, "-ntg", 8, "-npl", "1,2", "-t", THREADS)
    args = ("-m", smollm2, *TQ3, *work, *VERBOSE, *options)
    result = fork.run("llama-batched-bench", *args, last="graphs reused").ok()
    assert f" 2/{streams} seqs)" in result.text, result.text
    assert re.search(r"\| +32 \| +8 \| +1 \| +40 \|", result.text)
    assert re.search(r"\| +32 \| +8 \| +2 \| +80 \|", result.text)


def concurrently(server: Server, n: int) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(server.complete, p, n, i, cache_prompt=False) for i, p in enumerate(PROMPTS)]
        return [job.result()["content"] for job in jobs]


@pytest.mark.parametrize("options", [("--no-kv-unified",), ("--kv-unified",)])
def test_two_slots(fork: Fork, smollm2: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    args = ("-m", smollm2, "-c", 1024, "-np", 2, *TQ4, *options)
    with fork.server(tmp_path / "server.log", *args) as server:
        alone = [server.complete(p, 24, i, cache_prompt=False)["content"] for i, p in enumerate(PROMPTS)]
        assert len(set(alone)) == 2
        assert concurrently(server, 24) == alone
        # a slot's text does not depend on what the other slot holds
        assert server.complete(PROMPTS[0], 24, 1, cache_prompt=False)["content"] == alone[0]
        # a kept prefix: only the new part of the prompt is processed
        again = server.complete(PROMPTS[0] + alone[0], 8, 1)
        assert again["timings"]["cache_n"] > 10


@pytest.mark.parametrize("cache", [("tq3", "tq3"), ("tq4_mse", "q8_0")])
def test_context_shift(fork: Fork, smollm2: Path, cache: tuple[str, str]) -> None:
    result = fork.complete(smollm2, "--context-shift", "-lv", 5, n=400, ctx=256, cache=cache)
    assert "applying K-shift" in result.err
    tokens = int(result.number(r" eval time = .* / +(\d+) runs"))
    assert tokens == 399
    # a damaged cache shows as one token over and over
    words = result.out.split()[-100:]
    assert len(set(words)) > 5, result.out


def test_context_shift_in_the_server(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    args = ("-m", smollm2, "-c", 256, "-np", 1, "--context-shift", *TQ3)
    with fork.server(tmp_path / "server.log", *args) as server:
        answer = server.complete(PROMPTS[0], 320)
        assert answer["tokens_predicted"] == 320
        assert server.complete(PROMPTS[1], 8)["tokens_predicted"] == 8
        assert server.alive()


@pytest.mark.parametrize("model", [Llama(128), Gemma3(), Gemma3(n_layer=5)], ids=["llama", "window", "windows only"])
def test_context_shift_of_other_models(fork: Fork, random_model: Callable[[Model], Path], model: Model) -> None:
    options = ("--context-shift", "-lv", 5)
    result = fork.complete(random_model(model), *options, n=300, ctx=256, cache=("tq4", "tq4"))
    assert "applying K-shift" in result.err


@pytest.mark.parametrize("model", [DeepSeek2(), Gemma3(rope_dim=128), Gemma3(rope_dim=32)])
def test_context_shift_of_partly_rotated_keys(fork: Fork, random_model: Callable[[Model], Path], model: Model) -> None:
    """Upstream cannot write a part of a quantized key: it must say so, and stop where the context ends."""
    options = ("--context-shift", "-lv", 5)
    result = fork.complete(random_model(model), *options, n=300, ctx=256, cache=("tq4", "tq4"))
    assert re.search("applying K-shift|shifting is not supported for this context", result.err)


def test_draft_model(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    target = ("-m", smollm2, "-c", 512, "-np", 1, *TQ4)
    draft = ("-md", smollm2, "--spec-type", "draft-simple", "-ctkd", "tq4", "-ctvd", "tq3")
    with fork.server(tmp_path / "alone.log", *target) as server:
        alone = server.complete(PROMPTS[0], 48)
    with fork.server(tmp_path / "draft.log", *target, *draft) as server:
        drafted = server.complete(PROMPTS[0], 48)
        log = server.log.read_text()
    assert "V = tq4_mse (4.25" in log
    assert "K = tq4_qjl (4.25 bits per value), V = tq3_mse (3.25 bits per value)" in log
    assert drafted["timings"]["draft_n_accepted"] > 10
    assert drafted["content"] == alone["content"]


def test_cache_on_a_remote_device(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "rpc.log"
    rpc_args = ("--host", "127.0.0.1", "--port", port, "--threads", THREADS)
    with fork.background(log, "ggml-rpc-server", *rpc_args) as process:
        wait_until(lambda: listening(port), process, log)
        options = ("--rpc", f"127.0.0.1:{port}", "-ngl", 99)
        remote = fork.complete(smollm2, *options, *VERBOSE, cache=("tq3", "tq3"))
        assert process.poll() is None
    assert re.search(r"RPC\S* KV buffer size = +1\.14 MiB", remote.err), remote.err
    assert remote.out == fork.complete(smollm2, cache=("tq3", "tq3")).out
