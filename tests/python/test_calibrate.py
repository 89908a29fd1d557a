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
from conftest import Divergence, Fork
from numpy.typing import NDArray
from random_models import Biased, DeepSeek2, Llama, Model
from typer.testing import CliRunner

from ggml_tq import calibrate, codec, metadata
from ggml_tq.cache_types import TYPES
from ggml_tq.calibrate import CHUNK, KeySums, key_biases, pieces
from ggml_tq.capture import ROPE_NEOX, Capture, Layer, Request, Rope, capture
from ggml_tq.center import Centers
from ggml_tq.cli import app
from ggml_tq.gguf_file import read_header
from ggml_tq.params import Params

RandomModel = Callable[[Model], Path]
Doubles = NDArray[np.float64]


def layer(index: int, rope: Rope | None = None) -> Layer:
    """2 key heads of 64 coordinates."""
    return Layer(index, 4, 2, 64, 64, False, 1, 0.125, 0.0, 0.0, 0, rope)


def sums_of(of: Layer, k: Doubles, q: Doubles | None = None, w: Doubles | None = None) -> KeySums:
    """Of keys (tokens, 2, 64), queries (queries, 2, 64) and keys' weights (tokens, 2)."""
    q = np.zeros((1, 2, 64)) if q is None else q
    w = np.ones(k.shape[:2]) if w is None else w
    return KeySums(
        of,
        len(k),
        k.sum(axis=0),
        float(np.sum(k * k)),
        np.sum(q * q, axis=0),
        w.sum(axis=0)[:, None],
        np.einsum("th,thd->hd", w, k),
        np.einsum("th,thd->hd", w, k * k),
    )


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
    sums = sums_of(layer(0), k)
    for center in (k.mean(axis=0), rng.standard_normal((2, 64)), np.zeros((2, 64))):
        assert sums.share(center) == pytest.approx(1 - np.sum((k - center) ** 2) / np.sum(k * k), abs=1e-12)
    assert sums_of(layer(0), np.zeros((1, 2, 64))).share(np.zeros((2, 64))) == 0


ROPES = {  # and the two coordinates of each pair
    "neox": (Rope(64, ROPE_NEOX, 4096, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0), np.arange(32), np.arange(32, 64)),
    "adjacent": (Rope(64, 0, 4096, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0), np.arange(0, 64, 2), np.arange(1, 64, 2)),
    "a part": (Rope(32, ROPE_NEOX, 4096, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0), np.arange(16), np.arange(16, 32)),
    "none": (None, np.arange(0), np.arange(0)),
}


@pytest.mark.parametrize("name", ROPES)
def test_scales(name: str) -> None:
    """The error of scores, evaluated as it is; first by its formula, then of keys that the codec has had."""
    rope, a, b = ROPES[name]
    rng = np.random.default_rng(6)
    spread = np.exp(rng.standard_normal((2, 2, 64)))  # of queries and keys: of log-normal size, with sigma 1
    spread[..., b] *= spread[..., a]  # alike, but not the same, in the coordinates of a pair
    spread[:, 1] = 1  # a head with nothing to gain
    q, k = (rng.standard_normal((n, 2, 64)) * s for n, s in zip((200, 300), spread, strict=True))
    k += 3 * rng.standard_normal((2, 64))
    w = rng.gamma(0.5, size=(300, 2))  # few keys count for most
    sums = sums_of(layer(0, rope), k, q, w)
    x = k - k.mean(axis=0)

    def error(s: Doubles, head: int) -> float:
        """Of scales (2, 64), in the head."""
        seen = np.sum((q / s)[:, head] ** 2)
        return float(seen * np.sum(w[:, head, None] * (s * x)[:, head] ** 2))

    s, ones = sums.scale, np.ones((2, 64))
    np.testing.assert_array_equal(s[:, a], s[:, b])
    np.testing.assert_allclose(np.exp(np.log(s).mean(axis=-1)), 1)
    np.testing.assert_array_equal(s[1], 1)
    gain = error(s, 0) / error(ones, 0)
    assert gain < 0.5
    assert sums.gain == pytest.approx((gain + 1) / 2)
    for _ in range(20):  # no other scales are better, of which a pair has one
        other = s * np.exp(0.1 * rng.standard_normal((2, 64)))
        other[:, a] = other[:, b]
        assert error(other, 0) > error(s, 0)

    def coded(s: Doubles) -> float:
        decoded = codec.decode(codec.encode((x * s)[:, 0], TYPES["tq3_tcq"]), TYPES["tq3_tcq"])
        wrong = (q / s)[:, 0] @ (decoded - (x * s)[:, 0]).T
        return float(np.sum(w[:, 0] * wrong**2))

    assert coded(s) / coded(ones) == pytest.approx(gain, rel=0.2)


@pytest.mark.parametrize(("above", "scaled"), [(0.02, False), (-0.02, True)])
def test_small_gains_are_left(above: float, scaled: bool) -> None:
    """A quarter of the coordinates that queries see less: the gain is (3 + r)^2 / 4 / (3 + r^2) for a ratio of r."""
    gain = calibrate.WORTH + above
    r = min(np.roots([1 - 4 * gain, 6, 9 - 12 * gain]).real, key=lambda r: (r < 0, r))
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (400, 2, 64))
    q = signs * np.where(np.arange(64) % 4, 1.0, r)
    k = np.concatenate([signs, -signs])
    sums = sums_of(layer(0), k, q)
    assert np.all(sums.scale == 1) != scaled
    assert sums.gain == pytest.approx(gain if scaled else 1)


@pytest.mark.parametrize("what", ["no query", "no key", "one coordinate", "no weight"])
def test_scales_of_what_is_empty(what: str) -> None:
    rng = np.random.default_rng(3)
    q, k, w = rng.standard_normal((50, 2, 64)), rng.standard_normal((50, 2, 64)), np.ones((50, 2))
    if what == "no query":
        q[:] = 0
    elif what == "no key":
        k[:] = 0
    elif what == "no weight":
        w[:] = 0
    else:
        q[..., 1:] = 0
        k[..., :-1] = 0
    s = sums_of(layer(0), k, q, w).scale
    assert np.all((s >= 1 / 1024) & (s <= 1024))
    np.testing.assert_allclose(np.log(s).mean(axis=-1), 0, atol=1e-9)
    if what != "one coordinate":
        np.testing.assert_array_equal(s, 1)


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
    sums = {i: sums_of(layer(i), np.zeros((1, 2, 64))) for i in range(3)}
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


def beginnings(model: Path, text: Path, folder: Path) -> np.ndarray:
    """Medians of keys at position 0 (layers, heads, dim)."""
    request = Request(model, text, folder / "kv.st", context=16, max_tokens=1024, force=True)
    with capture(request) as kv:
        assert np.sum(kv.positions == 0) == 64
        return np.stack(
            [np.median(kv.k_pre(index)[kv.positions == 0].astype(np.float64), axis=0) for index in kv.layers]
        )


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
    np.testing.assert_array_equal(found.centers.scale, 1)  # its queries look at all coordinates alike
    assert found.centers.first is not None
    first = beginnings(model, text, tmp_path)
    np.testing.assert_allclose(
        found.centers.first.reshape(want.shape), first, rtol=0, atol=1e-3 * np.max(np.abs(first))
    )
    assert all(0.5 < row["first"] < 1.5 for row in shown["layers"])  # random keys are alike nowhere
    assert all(row["scaled"] == 1 for row in shown["layers"])
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


def test_few_beginnings(fork: Fork, random_model: RandomModel, tmp_path: Path) -> None:
    """They give position 0 no center of its own, and that is said; what the file brings is what programs say of it."""
    short, out = tmp_path / "short.txt", tmp_path / "out.gguf"
    short.write_text("Once upon a time there was a town by the sea. " * 8)
    printed = run("-m", random_model(Llama(64)), "-o", out, "-f", short, "--tokens", 100, "--bin", fork.bin_dir)
    assert "too short for a center of position 0's keys" in printed
    found = metadata.read(out)[1]
    assert found is not None
    assert found.centers.key is not None
    assert found.centers.first is None
    err = fork.complete(out, n=1, cache=("tq3_tcq", "f16")).err
    assert "centered and scaled by the calibration in the file" in err
    assert "position 0 apart" not in err


def powers(kv: Capture, layer: Layer, head: int) -> tuple[Doubles, Doubles]:
    """Squares of the queries that read a key head, and of its centered keys by p(1 - p), (dim,) each."""
    n, every = len(kv.tokens), kv.k_pre(layer.index, head).astype(np.float64)
    readers = range(head * layer.group, (head + 1) * layer.group)
    q = np.stack([kv.q(layer.index, r).astype(np.float64)[16:] for r in readers])
    score = layer.scale * q @ kv.k(layer.index, head).astype(np.float64).T
    score[:, np.arange(n) > np.arange(16, n)[:, None]] = -np.inf
    p = np.exp(score - score.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    weight = np.sum(p * (1 - p), axis=(0, 1))
    weight[0] = 0  # that key has a center of its own
    return np.sum(q**2, axis=(0, 1)), weight @ (every - every[16:].mean(axis=0)) ** 2


def test_a_model_that_looks_at_a_part_of_its_keys(
    fork: Fork, divergence: Divergence, random_model: RandomModel, text: Path, tmp_path: Path
) -> None:
    """Scales are those of a direct evaluation, and the same bits give better distributions."""
    m = Biased(head_dim=128, n_head=4, n_head_kv=2)
    model, out, ones = random_model(m), tmp_path / "out.gguf", tmp_path / "ones.gguf"
    shown = json.loads(run("-m", model, "-o", out, "-f", text, "--tokens", 500, "--bin", fork.bin_dir, "--json"))
    found = metadata.read(out)[1]
    assert found is not None
    assert found.centers.key is not None
    assert found.centers.scale is not None
    scale = found.centers.scale.reshape(2, 2, 2, 64)  # layers, heads, parts of a pair, pairs
    np.testing.assert_array_equal(scale[:, :, 0], scale[:, :, 1])  # pairs of NEOX
    part = tmp_path / "piece.txt"
    part.write_text(next(pieces(text.read_text(), 1)))
    with capture(Request(model, part, tmp_path / "kv.st", context=500, force=True)) as kv:
        for index, layer in kv.layers.items():
            gains = []
            for head in range(2):
                q, k = (power.reshape(2, 64).mean(axis=0) for power in powers(kv, layer, head))
                s = (q / k) ** 0.25
                gains.append(np.sum(np.sqrt(q * k)) ** 2 / np.sum(q) / np.sum(k))
                np.testing.assert_allclose(scale[index, head, 0], s / np.exp(np.log(s).mean()), rtol=1e-3)
            assert max(gains) < calibrate.WORTH
            assert shown["layers"][index]["scaled"] == pytest.approx(np.mean(gains), rel=1e-3)
    metadata.stamp(out, ones, Params(), centers=Centers("mean", found.centers.key))
    for file in (out, ones):
        divergence.bases[file, 256, 2] = divergence.base(model, 256, 2)
    scaled, plain = (divergence.measure(file, ("tq3_tcq", "f16"), chunks=2) for file in (out, ones))
    assert scaled / plain == pytest.approx(np.mean([row["scaled"] for row in shown["layers"]]), abs=0.1)


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
