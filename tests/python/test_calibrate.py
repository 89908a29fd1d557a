"""Centers from a model that reads a text: `ggml-tq calibrate`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Fork
from random_models import DeepSeek2, Llama, Model
from typer.testing import CliRunner

from ggml_tq import calibrate, metadata
from ggml_tq.calibrate import CHUNK, KeySums, key_biases, pieces
from ggml_tq.capture import Layer, Request, capture
from ggml_tq.cli import app
from ggml_tq.gguf_file import read_header
from ggml_tq.params import Params

RandomModel = Callable[[Model], Path]


def layer(index: int, n_head: int = 4, n_head_kv: int = 2, dim: int = 64) -> Layer:
    return Layer(index, n_head, n_head_kv, dim, dim, False, 1, 0.125, 0.0, 0.0, 0, None)


def run(*args: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["calibrate", *map(str, args)])
    assert result.exit_code == status, result.output
    if status:
        assert result.output.startswith("error: ")
        assert len(result.output.strip().splitlines()) == 1, result.output
    return result.output


# ---- arithmetic


def test_shares() -> None:
    rng = np.random.default_rng(4)
    k = rng.standard_normal((500, 2, 64)) + 2 * rng.standard_normal((2, 64))
    sums = KeySums(layer(0), 500, k.sum(axis=0), float(np.sum(k * k)))
    for center in (k.mean(axis=0), rng.standard_normal((2, 64)), np.zeros((2, 64))):
        assert sums.share(center) == pytest.approx(1 - np.sum((k - center) ** 2) / np.sum(k * k), abs=1e-12)
    assert KeySums(layer(0), 1, np.zeros((2, 64)), 0.0).share(np.zeros((2, 64))) == 0


def test_pieces_are_spread_over_the_text() -> None:
    text = " ".join(f"word{i}" for i in range(60000))
    found = list(pieces(text, 4))
    assert [len(p) for p in found] == [CHUNK * calibrate.CHARACTERS] * 4
    assert all(p in text and p.startswith("word") for p in found)
    first = [int(p.split()[0].removeprefix("word")) for p in found]
    assert first == sorted(first)
    assert first[0] == 0
    assert 40000 < first[3] < 46000
    assert list(pieces("one two", 1)) == ["one two"]
    assert list(pieces("abcdef", 2)) == ["abc", "def"]  # no word begins in the second


def test_biases(tmp_path: Path) -> None:
    """Those of keys alone, and the keys' part of fused ones."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = np.arange(1000, dtype=np.float32)
    writer.add_tensor("blk.0.attn_k.bias", values[:128])
    writer.add_tensor("blk.1.attn_qkv.bias", values[: 4 * 64 + 2 * 128])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sums = {i: KeySums(layer(i), 1, np.zeros((2, 64)), 0.0) for i in range(3)}
    biases = key_biases(read_header(path), sums)
    assert list(biases) == [0, 1]
    np.testing.assert_array_equal(biases[0], values[:128].reshape(2, 64))
    np.testing.assert_array_equal(biases[1], values[256:384].reshape(2, 64))


# ---- with a model


@pytest.fixture
def text(prose: Path, tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(prose.read_text() * 4)
    return path


def expected(model: Path, text: Path, folder: Path, wanted: list[int]) -> tuple[np.ndarray, int]:
    """Means (layers, heads, dim) from captures of the same pieces, over positions from 16 on."""
    keys: dict[int, list[np.ndarray]] = {}
    for n, piece in zip(wanted, pieces(text.read_text(), len(wanted)), strict=True):
        part = folder / "piece.txt"
        part.write_text(piece)
        request = Request(model, part, folder / "kv.st", context=n, force=True)
        with capture(request) as kv:
            assert len(kv.tokens) == n
            for index in kv.layers:
                keys.setdefault(index, []).append(kv.k_pre(index)[16:])
    every = {index: np.concatenate(parts).astype(np.float64) for index, parts in keys.items()}
    return np.stack([k.mean(axis=0) for k in every.values()]), len(every[0])


def test_a_model(fork: Fork, random_model: RandomModel, text: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    monkeypatch.setenv("GGML_TQ_BUILD", str(tmp_path / "nowhere"))  # --bin says it
    model, out, again = random_model(Llama(64)), tmp_path / "out.gguf", tmp_path / "again.gguf"
    options = ("-f", text, "--tokens", CHUNK + 100, "--bin", fork.bin_dir)
    shown = json.loads(run("-m", model, "-o", out, *options, "--json"))
    monkeypatch.setenv("GGML_TQ_BUILD", str(fork.bin_dir.parent))
    want, n = expected(model, text, tmp_path, [CHUNK, 100])
    found = metadata.read(out)[1]
    assert found is not None
    assert found.centers.key is not None
    np.testing.assert_allclose(found.centers.key.reshape(want.shape), want, rtol=0, atol=1e-3 * np.max(np.abs(want)))
    assert found.params.hash == Params().hash
    assert shown["tokens"] == n == CHUNK + 100 - 32
    assert [row["layer"] for row in shown["layers"]] == [0, 1]
    assert all(0 < row["mean"] < 1 for row in shown["layers"])
    assert metadata.provenance_of(read_header(out)) | {"tool": ""} == {
        "tool": "",
        "center.text": "text.txt",
        "center.sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "center.tokens": str(n),
    }
    assert not list(tmp_path.glob(".calibrate-*"))

    # again in place, with other parameters: those stay
    metadata.stamp(out, again, Params(5), {"codebooks": "sphere"})
    before = again.stat().st_size
    printed = run("-m", again, "--in-place", "-f", text, "--tokens", 200, "--bin", fork.bin_dir)
    assert "2 of 2 layers" in printed
    assert "median" in printed
    assert again.stat().st_size == before
    newer = metadata.read(again)[1]
    assert newer is not None
    assert newer.params.hash == Params(5).hash
    assert newer.centers.hash != found.centers.hash
    assert metadata.provenance_of(read_header(again))["codebooks"] == "sphere"


@pytest.mark.usefixtures("fork")
def test_what_gives_no_centers(fork: Fork, random_model: RandomModel, text: Path, tmp_path: Path) -> None:
    llama, out = random_model(Llama(64)), tmp_path / "out.gguf"
    few, binary = tmp_path / "few.txt", ("--bin", fork.bin_dir)
    few.write_text("a word or two")
    for message, args in {
        "either": ("-m", llama, "-f", text),
        "MLA": ("-m", random_model(DeepSeek2()), "-f", text, "-o", out, *binary),
        "of which none is after the first 16": ("-m", llama, "-f", few, "-o", out, *binary),
        "has no room": ("-m", llama, "-f", text, "--in-place", *binary),
        "exists": ("-m", llama, "-f", text, "-o", text, *binary),
        "not a directory": ("-m", llama, "-f", text, "-o", tmp_path / "no" / "out.gguf", *binary),
        "not a GGUF file": ("-m", text, "-f", text, "-o", out, *binary),
        "No such file": ("-m", llama, "-f", tmp_path / "none.txt", "-o", out, *binary),
        "llama-tq-capture is not in": ("-m", llama, "-f", text, "-o", out, "--bin", tmp_path),
    }.items():
        assert message in run(*args, status=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.txt", "text.txt"]
