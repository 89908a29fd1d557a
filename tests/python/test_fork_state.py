"""Saved caches: what comes back is what was saved, and anything else is refused without a crash."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from conftest import THREADS, Fork

TQ4 = ("tq4", "tq4")
PROMPT = "The history of the city begins with a small harbour at the mouth of the river, where traders from"
N_LAYER, N_EMBD_KV = 30, 192  # of SmolLM2
ROW_SIZE = N_EMBD_KV // 64 * 34  # bytes, of tq4
TQ4_IDS = (125, 122)  # tq4_qjl, tq4_mse


def with_next_version(data: bytes) -> bytes:
    """A state of tq4 types, as another format version would tag it (docs/format.md section 7)."""
    row_size = struct.pack("<Q", ROW_SIZE)  # it follows the type
    for type_id in TQ4_IDS:
        tag = re.compile(b"(%b...)(%b)" % (re.escape(bytes([type_id])), re.escape(row_size)), re.DOTALL)
        data, n = tag.subn(lambda m: struct.pack("<I", struct.unpack("<I", m[1])[0] + (1 << 8)) + m[2], data)
        assert n == N_LAYER
    return data


def cuts(size: int) -> dict[str, int]:
    """Where to truncate a file of a certain size."""
    half = size // 2
    return {"magic": 3, "tokens": 30, "cells": 200, "first rows": 1000, "half": half, "one byte": size - 1}


@pytest.fixture(scope="module")
def prompt_cache(fork: Fork, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "prompt.bin"
    fork.complete(smollm2, "--prompt-cache", path, prompt=PROMPT, cache=TQ4)
    return path


def copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


def test_prompt_cache(fork: Fork, smollm2: Path, prompt_cache: Path, tmp_path: Path) -> None:
    expected = fork.complete(smollm2, prompt=PROMPT, n=64, cache=TQ4).out
    saved = copy(prompt_cache, tmp_path / "prompt.bin")
    restored = fork.complete(smollm2, "--prompt-cache", saved, prompt=PROMPT, n=64, cache=TQ4)
    assert "session file has exact match for prompt" in restored.err
    assert restored.out == expected
    # the file is as large as the bits say, and little more
    n_tokens = int(restored.number(r"loaded a session with prompt size of (\d+) tokens"))
    rows = 2 * N_LAYER * (n_tokens - 1) * ROW_SIZE  # the last token is evaluated again
    assert rows < saved.stat().st_size < rows + 4096


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (("q8_0", "q8_0"), r"key type \(the file holds tq4_qjl, format version \d+, .*; this context uses q8_0,"),
        (("f16", "tq4"), r"key type \(the file holds tq4_qjl, .*, parameters \w{5}; this context uses f16,"),
        (("tq4_mse", "tq4"), r"key type \(the file holds tq4_qjl, .*; this context uses tq4_mse,"),
        (("tq4", "tq3"), r"value type \(the file holds tq4_mse, .*; this context uses tq3_mse,"),
    ],
)
def test_another_type_is_refused(
    fork: Fork, smollm2: Path, prompt_cache: Path, cache: tuple[str, str], message: str
) -> None:
    before = prompt_cache.read_bytes()
    fork.refuses_completion(message, smollm2, "--prompt-cache", prompt_cache, prompt=PROMPT, cache=cache)
    fork.refuses_completion(
        "failed to load session file", smollm2, "--prompt-cache", prompt_cache, prompt=PROMPT, cache=cache
    )
    assert prompt_cache.read_bytes() == before


def test_a_file_of_another_type_is_refused_by_ours(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    saved = tmp_path / "q8_0.bin"
    fork.complete(smollm2, "--prompt-cache", saved, prompt=PROMPT, cache=("q8_0", "q8_0"))
    message = r"key type \(the file holds q8_0; this context uses tq4_qjl, format version \d+, parameters \w{5},"
    fork.refuses_completion(message, smollm2, "--prompt-cache", saved, prompt=PROMPT, cache=TQ4)


def test_another_format_version_is_refused(fork: Fork, smollm2: Path, prompt_cache: Path, tmp_path: Path) -> None:
    saved = tmp_path / "version.bin"
    saved.write_bytes(with_next_version(prompt_cache.read_bytes()))
    found, expected = (rf"tq4_qjl, format version {n}" for n in (r"(\d+)", r"(?!\1)\d+"))
    message = rf"the file holds {found}, parameters (\w+); this context uses {expected}, parameters \2"
    fork.refuses_completion(message, smollm2, "--prompt-cache", saved, prompt=PROMPT, cache=TQ4)


@pytest.mark.parametrize("where", cuts(0))
def test_a_truncated_file_is_refused(fork: Fork, smollm2: Path, prompt_cache: Path, tmp_path: Path, where: str) -> None:
    data = prompt_cache.read_bytes()
    saved = tmp_path / "short.bin"
    saved.write_bytes(data[: cuts(len(data))[where]])
    fork.refuses_completion("failed to load session file", smollm2, "--prompt-cache", saved, prompt=PROMPT, cache=TQ4)
    if where not in ("magic", "tokens"):  # those are upstream's own refusals
        fork.refuses_completion("file is truncated", smollm2, "--prompt-cache", saved, prompt=PROMPT, cache=TQ4)


def test_slots_are_saved_and_restored(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    """In one server's life; then what another type, another version and truncation do to the file."""
    args = ("-m", smollm2, "-c", 1024, "-np", 2, "--slot-save-path", tmp_path)
    with fork.server(tmp_path / "tq4.log", *args, "-ctk", "tq4", "-ctv", "tq4") as server:
        expected = server.complete(PROMPT, 64, slot=0)["content"]
        status, saved = server.slot(0, "save", "slot.bin")
        assert status == 200, saved
        status, restored = server.slot(1, "restore", "slot.bin")
        assert status == 200, restored
        assert restored["n_restored"] == saved["n_saved"] > 64
        again = server.complete(PROMPT, 64, slot=1)
        assert again["timings"]["cache_n"] > 10
        assert again["content"] == expected

        (tmp_path / "version.bin").write_bytes(with_next_version((tmp_path / "slot.bin").read_bytes()))
        status, answer = server.slot(1, "restore", "version.bin")
        assert status == 400, answer
        assert server.complete(PROMPT, 64, slot=1)["content"] == expected

    for cache in ("q8_0", "tq3"):
        with fork.server(tmp_path / f"{cache}.log", *args, "-ctk", cache, "-ctv", cache) as server:
            expected = server.complete(PROMPT, 16, slot=0)["content"]
            status, answer = server.slot(0, "restore", "slot.bin")
            assert status == 400, answer
            assert "Unable to restore slot" in answer["error"]["message"]
            assert server.complete(PROMPT, 16, slot=0)["content"] == expected
            assert "the file holds tq4_qjl" in server.log.read_text()


@pytest.mark.parametrize("where", cuts(0))
def test_a_truncated_slot_is_refused(fork: Fork, smollm2: Path, tmp_path: Path, where: str) -> None:
    args = ("-m", smollm2, "-c", 512, "-np", 1, "--slot-save-path", tmp_path, "-ctk", "tq4", "-ctv", "tq4")
    with fork.server(tmp_path / "server.log", *args) as server:
        expected = server.complete(PROMPT, 8)["content"]
        assert server.slot(0, "save", "slot.bin")[0] == 200
        data = (tmp_path / "slot.bin").read_bytes()
        (tmp_path / "short.bin").write_bytes(data[: cuts(len(data))[where]])
        status, answer = server.slot(0, "restore", "short.bin")
        assert status == 400, answer
        assert server.complete(PROMPT, 8)["content"] == expected
        assert server.alive()


@pytest.mark.parametrize("cache", [("tq4", "tq4"), ("tq2_mse", "tq3_qjl")])
def test_save_load_state(fork: Fork, smollm2: Path, tmp_path: Path, cache: tuple[str, str]) -> None:
    """Upstream's test of saving, restoring and copying sequences."""
    options = ("-p", PROMPT, "-n", 16, "-c", 256, "-t", THREADS, "-ctk", cache[0], "-ctv", cache[1])
    # it writes a file where it runs
    fork.run("test-save-load-state", "-m", smollm2, *options, last="All tests passed", cwd=tmp_path).ok()
