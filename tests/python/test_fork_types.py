"""Names of the cache types on every command line, what is printed about them, and how much memory they
take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import THREADS, VERBOSE, Fork, Result

BITS = {"tq2": 2.25, "tq3": 3.25, "tq4": 4.25, "q8_0": 8.5, "q4_0": 4.5, "f16": 16, "bf16": 16}
N_LAYER, N_EMBD_KV = 30, 192  # of SmolLM2
MIB = 1 << 20


def bits(name: str) -> float:
    return BITS[name.split("_")[0] if name.startswith("tq") else name]


def announcement(k: str, v: str) -> str:
    """The line about the effective types, as a pattern."""
    line = f"cache types: K = {k} ({bits(k):.2f} bits per value), V = {v} ({bits(v):.2f} bits per value)"
    return re.escape(line)


@pytest.mark.parametrize("name", ["tq2", "tq3", "tq4"])
def test_short_names_resolve_by_role(fork: Fork, smollm2: Path, name: str) -> None:
    result = fork.complete(smollm2, n=4, cache=(name, name))
    assert re.search(announcement(f"{name}_qjl", f"{name}_mse"), result.err)


@pytest.mark.parametrize("kind", ["mse", "qjl"])
@pytest.mark.parametrize("name", ["tq2", "tq3", "tq4"])
def test_full_names_mean_what_they_say(fork: Fork, smollm2: Path, name: str, kind: str) -> None:
    full = f"{name}_{kind}"
    result = fork.complete(smollm2, n=4, cache=(full, full))
    assert re.search(announcement(full, full), result.err)


@pytest.mark.parametrize(
    ("program", "args"),
    [
        ("llama-completion", ("-p", "Hello", "-n", 2, "-no-cnv", "-c", 256)),
        ("llama-batched-bench", ("-npp", 8, "-ntg", 2, "-npl", 1, "-c", 256)),
        # llama-cli shows errors only, unless asked
        ("llama-cli", ("-p", "Hello", "-n", 2, "-st", "-c", 256, *VERBOSE)),
    ],
)
def test_programs_print_the_types(fork: Fork, smollm2: Path, program: str, args: tuple[object, ...]) -> None:
    expected = announcement("tq3_qjl", "tq3_mse")
    fixed = ("-t", THREADS, "-ctk", "tq3", "-ctv", "tq3")
    fork.run(program, "-m", smollm2, *fixed, *args, last=expected).ok()


def test_perplexity_prints_the_types(fork: Fork, smollm2: Path, prose: Path) -> None:
    options = ("-f", prose, "-c", 64, "-b", 64, "--chunks", 1, "-t", THREADS, "-ctk", "tq3", "-ctv", "tq3")
    fork.run("llama-perplexity", "-m", smollm2, *options, last=announcement("tq3_qjl", "tq3_mse")).ok()


@pytest.mark.parametrize(("k", "v"), [("tq2", "tq2"), ("tq3", "tq3"), ("tq4", "tq4"), ("tq3", "q8_0"), ("f16", "tq4")])
def test_kv_buffer_is_as_large_as_the_bits_say(fork: Fork, smollm2: Path, k: str, v: str) -> None:
    ctx = 8192
    result = fork.complete(smollm2, *VERBOSE, n=1, ctx=ctx, cache=(k, v))

    def mib(name: str) -> str:
        return f"{ctx * N_LAYER * N_EMBD_KV * bits(name) / 8 / MIB:.2f}"

    total = f"{ctx * N_LAYER * N_EMBD_KV * (bits(k) + bits(v)) / 8 / MIB:.2f}"
    assert re.search(rf"KV buffer size = +{total} MiB", result.err), result.err
    assert re.search(rf"K \({k}\w*\): +{mib(k)} MiB, V \({v}\w*\): +{mib(v)} MiB", result.err), result.err


@pytest.mark.parametrize(
    ("k", "v", "rot_k", "rot_v"),
    [
        ("tq3", "tq3", 0, 0),
        ("tq4_mse", "tq2_qjl", 0, 0),
        ("q8_0", "q4_0", 1, 1),
        ("q4_0", "tq3", 1, 0),
        ("tq3", "q8_0", 0, 1),
    ],
)
def test_upstreams_rotation_is_off_for_our_types_only(
    fork: Fork, smollm2: Path, k: str, v: str, rot_k: int, rot_v: int
) -> None:
    result = fork.complete(smollm2, *VERBOSE, n=1, cache=(k, v))
    assert f"attn_rot_k = {rot_k}," in result.err
    assert f"attn_rot_v = {rot_v}," in result.err


def test_other_types_are_not_announced(fork: Fork, smollm2: Path) -> None:
    assert "cache types" not in fork.complete(smollm2, *VERBOSE, n=1, cache=("q8_0", "f16")).err


def test_help_names_the_types(fork: Fork) -> None:
    text = fork.run("llama-completion", "--help").ok().text
    for name in ("tq2_mse", "tq4_qjl", "tq2, tq3, tq4"):
        assert name in " ".join(text.split())


@pytest.mark.parametrize("option", ["-ctk", "-ctv"])
@pytest.mark.parametrize("name", ["tq9", "tq3_", "TQ3", "tq_query", ""])
def test_unknown_names_are_refused(fork: Fork, smollm2: Path, option: str, name: str) -> None:
    message = rf"Unsupported cache type: {name} \(allowed: f32, .*tq4_tcq, tq2, tq3, tq4"
    fork.refuses(message, "llama-completion", "-m", smollm2, option, name)


@pytest.mark.parametrize("option", ["-ctkd", "-ctvd"])
def test_unknown_draft_names_are_refused(fork: Fork, smollm2: Path, option: str) -> None:
    message = r"Unsupported cache type: tq9 \(allowed: f32, .*tq4_tcq, tq2, tq3, tq4"
    fork.refuses(message, "llama-server", "-m", smollm2, option, "tq9")


@pytest.mark.parametrize("option", ["-ctk", "-ctv"])
@pytest.mark.parametrize("message", ["invalid parameter for argument: {}", "tq9.*tq2, tq3, tq4"])
def test_llama_bench_refuses_unknown_names(fork: Fork, smollm2: Path, option: str, message: str) -> None:
    fork.refuses(message.format(option), "llama-bench", "-m", smollm2, option, "tq9")


def bench(fork: Fork, model: Path, *args: object) -> Result:
    return fork.run("llama-bench", "-m", model, "-p", 32, "-n", 8, "-r", 1, "-t", THREADS, *args).ok()


def test_llama_bench(fork: Fork, smollm2: Path) -> None:
    table = bench(fork, smollm2, "-ctk", "tq3", "-ctv", "tq3").out
    rows = [line for line in table.splitlines() if "tq3_qjl" in line and "tq3_mse" in line]
    assert len(rows) == 2, table
    for row, test in zip(rows, ("pp32", "tg8"), strict=True):
        assert test in row
        assert float(row.split("|")[-2].split()[0]) > 0


def test_llama_bench_lists(fork: Fork, smollm2: Path) -> None:
    table = bench(fork, smollm2, "-ctk", "f16,tq4_mse", "-ctv", "tq2", "-o", "csv").out
    assert table.count('"tq4_mse","tq2_mse"') == 2, table
    assert table.count('"f16","tq2_mse"') == 2, table
