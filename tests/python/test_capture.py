"""What llama-tq-capture records, against the same models computed in NumPy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import THREADS, Fork
from numpy.typing import NDArray
from random_models import DeepSeek2, Gemma3, Llama, Model
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ggml_tq.capture import Capture, CaptureError, Request, Rope, capture, load_capture
from ggml_tq.cli import app

pytestmark = pytest.mark.usefixtures("fork")
RandomModel = Callable[[Model], Path]
Doubles = NDArray[np.float64]


@pytest.fixture
def build(fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_TQ_BUILD", str(fork.bin_dir.parent))


class Reference:
    """A random Llama, token by token, in float64 from the file's weights. Nothing here is ggml_tq's."""

    def __init__(self, path: Path, model: Llama) -> None:
        self.model = model
        self.w = {t.name.removesuffix(".weight"): t.data.astype(np.float64) for t in gguf.GGUFReader(path).tensors}

    @staticmethod
    def norm(x: Doubles) -> Doubles:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)  # all norm weights are 1

    def rope(self, x: Doubles) -> Doubles:
        """(tokens, heads, dim): neighbours as complex numbers, turned by position."""
        dim = x.shape[-1]
        turn = np.exp(1j * np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim))
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    def run(self, tokens: NDArray[np.int32]) -> list[dict[str, Doubles]]:
        """q, k, k_pre and v of every layer for one chunk."""
        m, out = self.model, []
        x = self.w["token_embd"][tokens]
        for il in range(m.n_layer):
            w = {name: self.w[f"blk.{il}.{name}"] for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
            h = self.norm(x)
            q, k, v = ((h @ w[f"attn_{c}"].T).reshape(len(x), -1, m.head_dim) for c in "qkv")
            layer = {"q": self.rope(q), "k_pre": k, "k": self.rope(k), "v": v}
            out.append(layer)
            attended = []
            for head in range(m.n_head):
                kv = head * m.n_head_kv // m.n_head
                s = layer["q"][:, head] @ layer["k"][:, kv].T / m.head_dim**0.5
                s[np.triu_indices(len(x), 1)] = -np.inf
                p = np.exp(s - s.max(axis=1, keepdims=True))
                attended.append(p / p.sum(axis=1, keepdims=True) @ v[:, kv])
            x = x + np.concatenate(attended, axis=1) @ w["attn_output"].T
            h = self.norm(x)
            gate, up = (h @ self.w[f"blk.{il}.ffn_{c}"].T for c in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blk.{il}.ffn_down"].T
        return out


def record(model: Path, text: Path, output: Path, **options: object) -> Capture:
    return capture(Request(model, text, output, threads=int(THREADS), **options))  # type: ignore[arg-type]


def differs(got: NDArray, want: NDArray) -> float:
    assert got.shape == want.shape
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_against_numpy(random_model: RandomModel, prose: Path, tmp_path: Path, heads: tuple[int, int]) -> None:
    """Two layers: the second one's keys are right only if the first one's heads, values and scale are."""
    model = Llama(64, n_head=heads[0], n_head_kv=heads[1])
    path = random_model(model)
    with record(path, prose, tmp_path / "kv.st", context=48, max_tokens=112) as c:
        assert [s.stop - s.start for s in c.chunks()] == [48, 48, 16]
        assert c.positions.tolist() == [*range(48), *range(48), *range(16)]
        assert list(c.layers) == [0, 1]
        for chunk in c.chunks():
            for il, want in enumerate(Reference(path, model).run(c.tokens[chunk])):
                assert c.layers[il].scale == pytest.approx(64**-0.5)
                assert (c.layers[il].group, c.layers[il].window) == (heads[0] // heads[1], 0)
                got = {"q": c.q(il), "k": c.k(il), "k_pre": c.k_pre(il), "v": c.v(il)}
                for name, x in want.items():  # activations are rounded to f16 before products with f16 weights
                    assert differs(got[name][chunk], x) < 3e-3, (il, name)


@pytest.mark.usefixtures("build")
def test_more_than_a_batch(random_model: RandomModel, prose: Path, tmp_path: Path) -> None:
    """Tokens 513 to 600 are another graph evaluation, and the second chunk is no continuation of the first."""
    model = random_model(Llama(64))
    with (
        record(model, prose, tmp_path / "a.st", context=600, max_tokens=800) as a,
        record(model, prose, tmp_path / "b.st", context=800) as b,
    ):
        assert [s.stop - s.start for s in a.chunks()] == [600, 200]
        assert np.array_equal(a.tokens, b.tokens)
        assert differs(a.k(1)[:600], b.k(1)[:600]) < 1e-5
        assert differs(a.k_pre(0), b.k_pre(0)) < 1e-5  # what a token alone decides
        assert differs(a.k_pre(1)[600:], b.k_pre(1)[600:]) > 0.1


@pytest.mark.usefixtures("build")
def test_sliding_windows(random_model: RandomModel, prose: Path, tmp_path: Path) -> None:
    with record(random_model(Gemma3(window=64)), prose, tmp_path / "kv.st", context=200) as c:
        assert [layer.window for layer in c.layers.values()] == [64] * 5 + [0]
        ropes = [layer.rope for layer in c.layers.values()]
        for il, rope in enumerate(ropes):
            assert rope is not None
            assert rope.mode == 2  # NEOX: halves of the head, not neighbours
            again = rope.apply(c.k_pre(il).swapaxes(0, 1), c.positions).swapaxes(0, 1)
            assert differs(again, c.k(il)) < 1e-5


@pytest.mark.usefixtures("build")
def test_mla(random_model: RandomModel, prose: Path, tmp_path: Path) -> None:
    with record(random_model(DeepSeek2()), prose, tmp_path / "kv.st", context=64) as c:
        layer = c.layers[0]
        assert (layer.v_in_k, layer.n_head_kv, layer.head_dim_k, layer.head_dim_v) == (True, 1, 576, 512)
        assert np.array_equal(c.v(0), c.k(0)[..., :512])
        # the latent vector is normalized; RoPE is on a part of the key only, so there is no key before it
        assert np.mean(c.v(0) ** 2) == pytest.approx(1, rel=0.01)
        with pytest.raises(CaptureError, match="no keys before RoPE"):
            c.k_pre(0)


@pytest.mark.usefixtures("build")
def test_two_head_dims(random_model: RandomModel, prose: Path, tmp_path: Path) -> None:
    with record(random_model(DeepSeek2(mla=False)), prose, tmp_path / "kv.st", context=32) as c:
        assert (c.q(1).shape, c.k(1).shape, c.v(1).shape) == ((32, 2, 192), (32, 2, 192), (32, 2, 128))


@pytest.mark.usefixtures("build")
def test_real_model(smollm2: Path, prose: Path, tmp_path: Path) -> None:
    with (
        record(smollm2, prose, tmp_path / "a.st", layers="0,29", context=300) as a,
        record(smollm2, prose, tmp_path / "b.st", layers="29", context=300, dtype="f16") as b,
    ):
        assert a.metadata["arch"] == "llama"
        assert a.metadata["model"] == smollm2.name
        assert a.metadata["model_sha256"].startswith("b179c9523d0e6a0f")
        assert (list(a.layers), list(b.layers)) == ([0, 29], [29])
        assert (a.q(0).shape, a.k(29).shape) == ((300, 9, 64), (300, 3, 64))
        for il, layer in a.layers.items():
            assert layer.rope is not None
            again = layer.rope.apply(a.k_pre(il).swapaxes(0, 1), a.positions).swapaxes(0, 1)
            assert differs(again, a.k(il)) < 1e-5
        assert np.array_equal(a.k(29, 2), a.k(29)[:, 2])
        assert np.array_equal(b.k(29), a.k(29).astype(np.float16).astype(np.float32))


# ---- what is refused


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "none.gguf"}, r"none\.gguf is missing"),
        ({"model": "text"}, r"cannot load .*text: .*magic"),
        ({"text": "none.txt"}, r"none\.txt is missing"),
        ({"text": "empty"}, r"empty has no tokens"),
        ({"output": "no/kv.st"}, r"no is not a directory"),
        ({"output": "text"}, r"text exists; --force replaces it"),
        ({"layers": "0,2"}, r"--layers 0,2: the model's layers are 0 to 1"),
        ({"layers": "0,x"}, r"--layers 0,x: want numbers"),
        ({"layers": "0,"}, r"--layers 0,: want numbers"),
        ({"dtype": "q8"}, r"--dtype q8: want f32 or f16"),
    ],
)
def test_refusals(random_model: RandomModel, tmp_path: Path, change: dict[str, str], message: str) -> None:
    (tmp_path / "text").write_text("one two three")
    (tmp_path / "empty").write_text("")
    before = sorted(tmp_path.iterdir())
    given = {"model": str(random_model(Llama(64))), "text": "text", "output": "kv.st", "context": "32", **change}
    files = {key: tmp_path / given[key] for key in ("model", "text", "output")}
    args = ["-m", files["model"], "-f", files["text"], "-o", files["output"], "-c", given["context"], "-t", THREADS]
    args += [x for key in ("layers", "dtype") if key in change for x in (f"--{key}", change[key])]
    done = CliRunner().invoke(app, ["capture", *map(str, args)])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1, done.output
    assert done.output.startswith("error: ")
    assert re.search(message, done.output), done.output
    assert sorted(tmp_path.iterdir()) == before


def test_the_program_by_itself(fork: Fork, random_model: RandomModel, prose: Path, tmp_path: Path) -> None:
    model, out = random_model(Llama(64)), tmp_path / "kv.st"
    args = ("-m", model, "-f", prose, "-o", out, "-c", 32, "-t", THREADS)
    assert "--layers LIST" in fork.run("llama-tq-capture", "--help").ok().out
    fork.run("llama-tq-capture", *args, "--meta", "who=me").ok()
    assert load_capture(out).metadata["who"] == "me"
    first = out.read_bytes()
    for message, more in (
        ("exists; --force replaces it", ()),
        ("--max-tokens 0: want a positive number", ("--force", "--max-tokens", 0)),
        ("--meta x: want KEY=VALUE", ("--force", "--meta", "x")),
        ("--layers needs a value", ("--force", "--layers")),
    ):
        fork.refuses(message, "llama-tq-capture", *args, *more)
    fork.refuses("want a model", "llama-tq-capture", "-m", model, "-o", out)
    assert out.read_bytes() == first
    fork.run("llama-tq-capture", *args, "--force", "--max-tokens", 16).ok()
    assert len(load_capture(out).tokens) == 16
    assert sorted(tmp_path.iterdir()) == [out]


def test_command(
    build: None, random_model: RandomModel, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["capture", "-m", str(random_model(Llama(64))), "-f", str(prose), "-o", str(tmp_path / "kv.st"), "-c", "32"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "32 tokens, 2 layers, 4/2 heads of 64" in done.output
    monkeypatch.setenv("GGML_TQ_BUILD", str(tmp_path))
    assert "error: llama-tq-capture is not built" in CliRunner().invoke(app, args).output


def test_files_that_are_no_capture(random_model: RandomModel, prose: Path, tmp_path: Path, build: None) -> None:
    path = tmp_path / "kv.st"
    record(random_model(Llama(64)), prose, path, context=16)
    whole = path.read_bytes()
    cut = tmp_path / "cut.st"
    for size in (0, 4, 1000, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(CaptureError, match="cannot read"):
            load_capture(cut)
    with pytest.raises(CaptureError, match="cannot read"):
        load_capture(tmp_path / "none.st")
    x = np.zeros((4, 2, 8), dtype=np.float32)
    save_file({"k.0": x}, cut)
    with pytest.raises(CaptureError, match="is not a capture"):
        load_capture(cut)
    layers = json.loads(load_capture(path).metadata["layers"])
    save_file({"k.0": x, "q.0": x}, cut, {"format": "ggml-tq-capture 1", "layers": json.dumps(layers)})
    with pytest.raises(CaptureError, match="is not a whole capture"):
        load_capture(cut)


# ---- RoPE, where no model here has it


def rope(**options: object) -> Rope:
    plain = {"n_dims": 8, "mode": 2, "n_ctx_orig": 64, "freq_base": 100.0, "freq_scale": 1.0, "ext_factor": 0.0}
    return Rope(**{**plain, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, **options})  # type: ignore[arg-type]


def test_rope_of_a_part_of_the_head() -> None:
    x = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    positions = np.arange(5, dtype=np.int32)
    y = rope(offset=4).apply(x, positions)
    assert np.array_equal(y[:, :4], x[:, :4])
    assert np.array_equal(y[:, 12:], x[:, 12:])
    assert np.allclose(y[:, 4:12], rope().apply(x[:, 4:12].copy(), positions))


def test_yarn_and_factors() -> None:
    """Fast pairs turn as without YaRN, slow ones freq_scale times as fast, and all grow; factors divide the angle."""
    positions = np.arange(3, dtype=np.int32)
    plain = np.arctan2(*rope(n_dims=64, n_ctx_orig=4096, freq_base=1e4).angles(positions)[::-1])
    cos, sin = rope(n_dims=64, n_ctx_orig=4096, freq_base=1e4, freq_scale=0.25, ext_factor=1.0).angles(positions)
    turned = np.arctan2(sin, cos)
    assert np.allclose(turned[:, 0], plain[:, 0])
    assert np.allclose(turned[:, -1], plain[:, -1] / 4)
    assert np.allclose(np.hypot(cos, sin), 1 + 0.1 * np.log(4))
    cos, sin = rope(factors=np.full(4, 2.0, dtype=np.float32)).angles(positions)
    assert np.allclose(np.arctan2(sin, cos) * 2, np.arctan2(*rope().angles(positions)[::-1]))
