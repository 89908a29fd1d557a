"""The study bench against brute force and known answers, on synthetic captures and a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fork
from numpy.typing import NDArray
from random_models import DeepSeek2, Llama
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ggml_tq import calibrated, metadata
from ggml_tq.calibrated import CalibratedError
from ggml_tq.capture import CaptureError, Request, Rope, capture, load_capture
from ggml_tq.center import Centers
from ggml_tq.cli import app
from ggml_tq.gguf_file import read_header
from ggml_tq.hparams import key_shapes
from ggml_tq.params import DEFAULT, Params
from ggml_tq.quantizers import QuantizerError, Recipe, parse, upstream_rotation
from ggml_tq.reference.scalar import Q4_0, Q8_0
from ggml_tq.study import KeyScore, LayerScores, Study, StudyError, study

Floats = NDArray[np.float32]
EXACT = Recipe("exact")
ROPE = {
    "n_dims": 64, "mode": 2, "n_ctx_orig": 4096, "freq_base": 1e4, "freq_scale": 1.0, "ext_factor": 0.0,
    "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "sections": [0, 0, 0, 0], "offset": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A synthetic layer of Gaussian queries, keys and values."""

    chunks: tuple[int, ...] = (700,)
    n_head: int = 4
    n_head_kv: int = 2
    dim: int = 64
    scale: float = 0.125
    soft_cap: float = 0.0
    window: int = 0
    max_bias: float = 0.0
    sinks: bool = False
    v_in_k: bool = False


def write(path: Path, shape: Shape = Shape(), key: Callable[[Floats], Floats] = lambda k: k, **k_pre: Floats) -> Path:
    rng = np.random.default_rng(7)
    n = sum(shape.chunks)

    def normal(heads: int) -> Floats:
        return rng.standard_normal((n, heads, shape.dim), dtype=np.float32)

    layer = {"n_head": shape.n_head, "n_head_kv": shape.n_head_kv, "head_dim_k": shape.dim, "head_dim_v": shape.dim}
    layer |= {name: getattr(shape, name) for name in ("v_in_k", "scale", "soft_cap", "max_bias", "window")}
    layer |= {"readers": 1, **({"rope": ROPE} if k_pre else {})}
    tensors: dict[str, NDArray[Any]] = {
        "q.3": normal(shape.n_head),
        "k.3": key(normal(shape.n_head_kv)),
        "v.3": normal(shape.n_head_kv),
        "positions": np.concatenate([np.arange(c) for c in shape.chunks]).astype(np.int32),
        "chunk": np.repeat(np.arange(len(shape.chunks)), shape.chunks).astype(np.int32),
        "tokens": np.zeros(n, dtype=np.int32),
    }
    if shape.sinks:
        tensors["sinks.3"] = np.linspace(-1, 5, shape.n_head, dtype=np.float32)
    tensors |= {f"{name}.3": x for name, x in k_pre.items()}
    save_file(tensors, path, {"format": "ggml-tq-capture 1", "model": "synthetic", "layers": json.dumps({"3": layer})})
    return path


@dataclass(frozen=True)
class Shrink:
    """Keys times 1 - a, exactly."""

    a: float
    name: str = "shrink"
    bits: float = 1.0

    def reconstruct(self, x: Floats) -> Floats:
        return (x * np.float32(1 - self.a)).astype(np.float32)


@dataclass(frozen=True)
class Noise:
    """Independent noise of standard deviation ``sigma`` on each coordinate."""

    sigma: float
    name: str = "noise"
    bits: float = 1.0

    def reconstruct(self, x: Floats) -> Floats:
        noise = np.random.default_rng(x.size).standard_normal(x.shape, dtype=np.float32)
        return x + np.float32(self.sigma) * noise


@dataclass(frozen=True)
class Own(Recipe):
    """A recipe of one of the quantizers above."""

    own: Any = None

    def _build(self, role: str, dim: int) -> Any:  # noqa: ANN401
        return self.own


def scores(path: Path, *pairs: tuple[Recipe, Recipe], **options: Any) -> LayerScores:  # noqa: ANN401
    with load_capture(path) as c:
        return study(c, pairs, **options).layers[0]


def key_score(path: Path, key: Recipe, **options: Any) -> KeyScore:  # noqa: ANN401
    return scores(path, (key, EXACT), **options).keys[key.name]


def brute_force(path: Path, key: Any, value: Any, skip: int) -> dict[str, float]:  # noqa: ANN401
    """KL and output errors query by query in float64, straight from their definitions."""
    kls, outs = [], []
    with load_capture(path) as c:
        layer, sinks = c.layers[3], c.sinks(3)
        q, k, v = (x.astype(np.float64) for x in (c.q(3), c.k(3), c.v(3)))
        kq = np.stack([key.reconstruct(c.k(3, h)) for h in range(layer.n_head_kv)], axis=1).astype(np.float64)
        vq = np.stack([value.reconstruct(c.v(3, h)) for h in range(layer.n_head_kv)], axis=1).astype(np.float64)

        def attend(i: int, start: int, h: int, keys: NDArray[np.float64]) -> NDArray[np.float64]:
            """Log-probabilities, the sink's last."""
            s = keys[start : i + 1, h // layer.group] @ q[i, h] * layer.scale
            s = layer.soft_cap * np.tanh(s / layer.soft_cap) if layer.soft_cap else s
            s = np.append(s, sinks[h] if sinks is not None else -np.inf)
            return s - s.max() - np.log(np.sum(np.exp(s - s.max())))

        for h in range(layer.n_head):
            kl, square, error = [], 0.0, np.zeros(3)
            for i, position in enumerate(c.positions):
                if position < skip:
                    continue
                start = i - min(position, layer.window - 1 if layer.window else position)
                log_p, log_pq = attend(i, start, h, k), attend(i, start, h, kq)
                p, pq = np.exp(log_p), np.exp(log_pq)
                seen = log_p > -np.inf
                kl.append(float(np.sum(p[seen] * (log_p[seen] - log_pq[seen]))))
                x, xq = v[start : i + 1, h // layer.group], vq[start : i + 1, h // layer.group]
                o = p[:-1] @ x
                square += o @ o
                error += [np.sum((o2 - o) ** 2) for o2 in (pq[:-1] @ x, p[:-1] @ xq, pq[:-1] @ xq)]
            kls.append(np.mean(kl))
            outs.append(error / square)
    names = ("output_key", "output_value", "output_both")
    return {
        "kl": float(np.mean(kls)),
        "kl_max": float(np.max(kls)),
        **dict(zip(names, np.mean(outs, axis=0), strict=True)),
    }


VARIANTS = {
    "plain": Shape(),
    "chunks": Shape(chunks=(330, 290, 100)),
    "window": Shape(window=50),
    "soft cap": Shape(soft_cap=2.0),
    "sinks": Shape(sinks=True),
    "mha": Shape(n_head=2, n_head_kv=2),
    "mqa": Shape(n_head=3, n_head_kv=1),
    "large logits": Shape(scale=4.0),
    "all": Shape(chunks=(400, 300), scale=0.5, soft_cap=5.0, window=300, sinks=True),
    "values in keys": Shape(v_in_k=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_brute_force(variant: str, tmp_path: Path) -> None:
    path = write(tmp_path / "kv.st", VARIANTS[variant])
    got = scores(path, (Recipe("q4_0-norot"), Recipe("q4_1-norot")), skip=250)
    key, value = Recipe("q4_0-norot").build("key", 64), Recipe("q4_1-norot").build("value", 64)
    want = brute_force(path, key, value, 250)
    assert got.keys["q4_0-norot"].kl == pytest.approx(want["kl"], rel=1e-4)
    assert got.keys["q4_0-norot"].kl_max == pytest.approx(want["kl_max"], rel=1e-4)
    assert got.keys["q4_0-norot"].output == pytest.approx(want["output_key"], rel=1e-4)
    assert got.values["q4_1-norot"].output == pytest.approx(want["output_value"], rel=1e-4)
    assert got.outputs["q4_0-norot / q4_1-norot"] == pytest.approx(want["output_both"], rel=1e-4)


def test_huge_errors(tmp_path: Path) -> None:
    """Where exp of the errors overflows binary32."""
    path = write(tmp_path / "kv.st", Shape(scale=2.0))
    broken = Own("broken", own=Noise(10.0))
    want = brute_force(path, broken.own, EXACT.build("value", 64), 600)
    got = key_score(path, broken, skip=600)
    assert want["kl"] > 300
    assert got.kl == pytest.approx(want["kl"], rel=1e-4)
    assert got.output == pytest.approx(want["output_key"], rel=1e-3)


def test_weight_that_moves_to_keys_without_any(tmp_path: Path) -> None:
    """Keys whose exact probability underflows binary32 take all of it: finite, and as in float64."""
    path = write(tmp_path / "kv.st", Shape(scale=60.0))
    broken = Own("broken", own=Noise(10.0))
    want = brute_force(path, broken.own, EXACT.build("value", 64), 600)
    got = key_score(path, broken, skip=600)
    assert want["kl"] > 1000
    assert got.kl == pytest.approx(want["kl"], rel=1e-3)


def test_exact_is_zero(tmp_path: Path) -> None:
    layer = scores(write(tmp_path / "kv.st", VARIANTS["all"]), (EXACT, EXACT), skip=250)
    assert layer.keys["exact"] == KeyScore(bits=32, **dict.fromkeys(list(KeyScore.__annotations__)[1:], 0.0))
    assert (layer.values["exact"].error, layer.values["exact"].output, layer.outputs["exact / exact"]) == (0, 0, 0)


def test_a_quantizer_that_shrinks(tmp_path: Path) -> None:
    got = key_score(write(tmp_path / "kv.st"), Own("shrink", own=Shrink(0.1)))
    assert got.error == pytest.approx(0.01, rel=1e-4)
    assert got.logit_slope == pytest.approx(-0.1, rel=1e-4)
    assert got.logit_variance == pytest.approx(0.01, rel=1e-4)
    assert abs(got.logit_bias) < 1e-3  # the logits' mean is near 0, so its tenth is too


def test_noise_of_known_variance(tmp_path: Path) -> None:
    """Noise of variance s^2 on keys of unit variance: logit variance s^2; KL about half the error's variance."""
    sigma, shape = 0.05, Shape(chunks=(1500,))
    got = key_score(write(tmp_path / "kv.st", shape), Own("noise", own=Noise(sigma)))
    assert got.error == pytest.approx(sigma**2, rel=0.02)
    assert got.logit_variance == pytest.approx(sigma**2, rel=0.03)
    assert abs(got.logit_slope) < 1e-3
    # logits and their errors have variances 1 and sigma^2; p is far from one-hot
    assert got.kl == pytest.approx(sigma**2 / 2, rel=0.05)


def test_a_shift_of_all_keys_is_no_logit_variance(tmp_path: Path) -> None:
    """Softmax does not see what all logits of a query share, so only the bias shows it."""

    @dataclass(frozen=True)
    class Shift:
        name: str = "shift"
        bits: float = 1.0

        def reconstruct(self, x: Floats) -> Floats:
            return x + np.float32(0.5)

    got = key_score(write(tmp_path / "kv.st"), Own("shift", own=Shift()))
    assert got.logit_variance < 1e-9
    assert got.kl < 1e-6
    assert got.error == pytest.approx(0.25, rel=0.02)


def test_bias(tmp_path: Path) -> None:
    """Queries with a mean, and keys shifted along it: every logit errs by the same."""
    path = write(tmp_path / "kv.st", key=lambda k: k + np.float32(1.0))
    with load_capture(path) as c:
        q = c.q(3).astype(np.float64)
        k = c.k(3).astype(np.float64)
    got = key_score(path, Own("shrink", own=Shrink(0.1)), skip=699)  # one query
    want = []
    for h in range(4):
        s = k[:, h // 2] @ q[699, h] * 0.125
        want.append(-0.1 * s.mean() / s.std())
    assert got.logit_bias == pytest.approx(np.mean(want), rel=1e-3)


# ---- centring


def test_mean(tmp_path: Path) -> None:
    """Nearly all energy in one vector: with it off, what is left is rounded at its own scale."""
    mean = np.random.default_rng(3).standard_normal(64).astype(np.float32) * 20
    path = write(tmp_path / "kv.st", key=lambda k: k + mean)
    layer = scores(path, *((r, EXACT) for r in parse("tq3_mse,tq3_mse+mean")))
    plain, centred = layer.keys["tq3_mse"], layer.keys["tq3_mse+mean"]
    assert np.allclose(layer.mean_share, 1 - 64 / (64 + mean @ mean), atol=1e-4)
    assert layer.rope_share is None
    d = 0.0345  # of the type on Gaussian numbers
    assert centred.error == pytest.approx(d * 64 / (64 + mean @ mean), rel=0.1)
    assert centred.logit_variance == pytest.approx(d, rel=0.1)
    assert plain.logit_variance > 20 * centred.logit_variance


def test_mean_is_of_the_calibration_tokens(tmp_path: Path) -> None:
    """Keys that jump after the calibration tokens are centred by what was before."""
    jump = np.where(np.arange(700) < 350, 0, 30).astype(np.float32)[:, None, None]
    path = write(tmp_path / "kv.st", key=lambda k: k + jump)
    half, full = (scores(path, (parse("q4_0+mean")[0], EXACT), calibration=n) for n in (350, 700))
    assert max(half.mean_share) < 0.1
    assert min(full.mean_share) > 0.45
    assert half.keys["q4_0+mean"].error > 0
    with load_capture(path) as c, pytest.raises(StudyError, match="no token to take means over: 10 of 700"):
        study(c, [(EXACT, EXACT)], calibration=10)


def test_mean_before_rope(tmp_path: Path) -> None:
    """A constant before RoPE turns with position: no mean after RoPE finds it, the one before RoPE finds all of it."""
    rng = np.random.default_rng(5)
    mean = rng.standard_normal((2, 64)).astype(np.float32) * 20
    k_pre = mean + rng.standard_normal((700, 2, 64), dtype=np.float32)
    # half-and-half pairs as complex numbers
    turn = np.exp(1j * np.arange(700)[:, None] * 1e4 ** (-np.arange(32) / 32))[:, None]
    z = (k_pre[..., :32] + 1j * k_pre[..., 32:]) * turn
    k = np.concatenate([z.real, z.imag], axis=-1).astype(np.float32)
    path = write(tmp_path / "kv.st", key=lambda _: k, k_pre=k_pre)
    layer = scores(path, *((r, EXACT) for r in parse("tq3_mse,tq3_mse+mean,tq3_mse+rope")))
    energy = np.sum(mean**2, axis=1)
    assert layer.rope_share == pytest.approx(energy / (energy + 64), abs=1e-4)
    assert max(layer.mean_share) < 0.9
    none, after, before = layer.keys.values()
    assert before.logit_variance < after.logit_variance / 3 < none.logit_variance / 3

    wrong = write(tmp_path / "wrong.st", key=lambda _: k[::-1].copy(), k_pre=k_pre)
    with pytest.raises(CaptureError, match="RoPE as recorded does not turn"):
        scores(wrong, (EXACT, EXACT))


def test_rope_of_neighbours() -> None:
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    rope = Rope(**{**ROPE, "mode": 0, "sections": (0, 0, 0, 0)})  # type: ignore[arg-type]
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * np.arange(9)[:, None] * 1e4 ** (-np.arange(32) / 32))
    y = rope.apply(x, np.arange(9, dtype=np.int32))
    assert np.allclose(y[:, 0::2] + 1j * y[:, 1::2], z, atol=1e-5)


def stamped(model: Path, output: Path, seed: int = 0) -> Centers:
    """A copy of a model with centers, scales and centers at position 0 at random, written into it."""
    header = read_header(model)
    size = sum(shape.size for shape in key_shapes(header.entries))
    rng = np.random.default_rng(seed)
    key, first = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
    centers = Centers("mean", key, np.exp(0.2 * rng.standard_normal(size)).astype(np.float32), first)
    return metadata.stamp(model, output, DEFAULT, centers=centers)


def test_calibrated(random_model: Callable[[object], Path], tmp_path: Path) -> None:
    """Keys are centered and scaled as section 10 of the format says, with another center at position 0."""
    model = tmp_path / "model.gguf"
    centers = stamped(random_model(Llama(64, n_layer=4)), model)
    assert centers.key is not None
    assert centers.scale is not None
    assert centers.first is not None
    shapes = key_shapes(read_header(model).entries)
    begin = sum(shape.size for shape in shapes[:3])
    assert (shapes[3].heads, shapes[3].dim) == (2, 64)
    m, s, m0 = (x[begin : begin + 128].reshape(2, 64) for x in (centers.key, centers.scale, centers.first))
    path = write(tmp_path / "kv.st", Shape(chunks=(400, 300)), k_pre=np.zeros((700, 2, 64), np.float32))
    with load_capture(path) as c:
        cal = calibrated.load(model)
        for head in (0, 1):
            got, scale = cal.of_head(c.layers[3], head, c.positions)
            # half-and-half pairs as complex numbers
            z = (m[head, :32] + 1j * m[head, 32:]) * np.exp(1j * c.positions[:, None] * 1e4 ** (-np.arange(32) / 32))
            want = np.concatenate([z.real, z.imag], axis=-1)
            want[c.positions == 0] = m0[head]
            assert np.allclose(got, want, atol=1e-4)
            assert np.array_equal(scale, s[head])
            assert np.array_equal(cal.without_scales().of_head(c.layers[3], head, c.positions)[1], np.ones(64))


def test_calibrated_keys_are_rounded_as_centered(random_model: Callable[[object], Path], tmp_path: Path) -> None:
    """Noise on scaled keys is divided by the scales; keys that are their centers are stored exactly, at 2 bits."""
    model = tmp_path / "model.gguf"
    stamped(random_model(Llama(64, n_layer=4)), model)
    cal = calibrated.load(model)
    k_pre = np.repeat(cal.key[3][None], 700, axis=0)
    k_pre[0] = cal.first[3]
    with load_capture(write(tmp_path / "0.st", k_pre=k_pre)) as c:
        k = np.stack([cal.of_head(c.layers[3], head, c.positions)[0] for head in (0, 1)], axis=1)
    path = write(tmp_path / "kv.st", key=lambda _: k, k_pre=k_pre)
    pairs = [(Recipe("tq2_mse", "cal"), EXACT), (Own("noise", "cal", Noise(0.1)), EXACT), (Recipe("tq2_mse"), EXACT)]
    got = scores(path, *pairs, calibrated=cal).keys
    assert got["tq2_mse"].error > 0.05
    assert got["tq2_mse+cal"].error < 1e-9
    scale = cal.scale[3]
    want = np.mean([0.01 * np.sum(scale[h] ** -2.0) / np.mean(np.sum(k[:, h] ** 2, axis=-1)) for h in (0, 1)])
    assert got["noise+cal"].error == pytest.approx(want, rel=0.02)

    code, out = run(path, "--keys", "tq2_mse,tq2_mse+cal", "--calibrated", model, "-j", 1, "--json")
    assert code == 0, out
    found = json.loads(out)["layers"][0]["keys"]
    assert found["tq2_mse"]["error"] == pytest.approx(got["tq2_mse"].error, rel=1e-4)
    assert found["tq2_mse+cal"]["error"] < 1e-9


def test_what_is_not_calibrated(random_model: Callable[[object], Path], tmp_path: Path) -> None:
    plain, own = random_model(Llama(64, n_layer=4)), tmp_path / "own.gguf"
    with pytest.raises(CalibratedError, match=r"has no calibrated centers: run ggml-tq calibrate"):
        calibrated.load(plain)
    metadata.stamp(plain, own, Params(rotation_seed=7), centers=stamped(plain, tmp_path / "model.gguf"))
    with pytest.raises(CalibratedError, match="has codebooks or seeds of its own"):
        calibrated.load(own)
    with pytest.raises(CalibratedError, match="nothing"):
        calibrated.load(tmp_path / "nothing.gguf")
    stamped(random_model(Llama(64)), tmp_path / "short.gguf")
    for shape, model in ((Shape(dim=128), "model.gguf"), (Shape(), "short.gguf")):
        with (
            load_capture(write(tmp_path / "kv.st", shape)) as c,
            pytest.raises(CalibratedError, match="the calibrated model has not"),
        ):
            study(c, [(Recipe("tq3_mse", "cal"), EXACT)], calibrated=calibrated.load(tmp_path / model))


# ---- quantizers by name


@pytest.mark.parametrize(
    ("dim", "key", "value"), [(64, 64, 64), (128, 128, 64), (192, 64, 64), (256, 256, 64), (576, 64, 64), (80, 0, 0)]
)
def test_upstreams_rotation(dim: int, key: int, value: int) -> None:
    assert (upstream_rotation(dim, "key"), upstream_rotation(dim, "value")) == (key, value)


def test_upstreams_types() -> None:
    """Against the reference's own q4_0 and q8_0, and a Hadamard matrix from its definition."""
    x = np.random.default_rng(2).standard_normal((50, 128)).astype(np.float32)
    sign = np.array([[(-1) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    h = (sign / np.sqrt(128)).astype(np.float32)
    for name, reference in (("q4_0", Q4_0()), ("q8_0", Q8_0())):
        (rotated,), (plain,) = parse(name), parse(f"{name}-norot")
        assert np.array_equal(plain.build("key", 128).reconstruct(x), reference.reconstruct(x))
        assert np.allclose(rotated.build("key", 128).reconstruct(x), reference.reconstruct(x @ h) @ h, atol=1e-5)
        assert rotated.build("key", 128).bits == reference.bits


def test_names() -> None:
    parsed = parse("tq3, q4_0+mean,Eden(b=2,scale=biased)+rope,lm3+none,Absmax(b=4,group=64)", center="rope")
    assert [r.name for r in parsed] == [
        "tq3+rope", "q4_0+mean", "Eden(b=2,scale=biased)+rope", "lm3", "Absmax(b=4,group=64)+rope",
    ]  # fmt: skip
    assert parsed[0].build("key", 64).name == "tq3_qjl"
    assert parsed[0].build("value", 64).name == "tq3_mse"
    assert (parsed[2].build("key", 128).bits, parsed[4].build("key", 128).bits) == (2.125, 4.25)
    x = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    for name, error in {"f16": 1e-7, "bf16": 1e-5, "lm3": 0.035, "tq2_mse": 0.125, "Eden(b=2)": 0.125}.items():
        got = parse(name)[0].build("key", 64).reconstruct(x)
        assert 0 < np.mean((got - x) ** 2) < error, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tq5", "unknown quantizer 'tq5': known are tq2_mse, .*q4_0.*Eden"),
        ("", "no quantizer named: known are tq2_mse"),
        ("tq3+median", r"'tq3\+median': want one of \+none, \+mean, \+rope, \+cal"),
        ("Eden(b=99)", r"Eden\(b=99\): "),
        ("Eden(bits=3)", r"Eden\(bits=3\): .*bits"),
        ("Eden(3)", "'3': want NAME=VALUE"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        parse(name)[0].build("key", 64)


# ---- what is refused, and the command


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (Shape(window=-1), {}, "layer 3 has a mask that is neither"),
        (Shape(max_bias=8.0), {}, "layer 3 uses ALiBi"),
        (Shape(), {"layers": [0]}, "layer 0 is not in the capture, which has 3"),
        (Shape(chunks=(200, 100)), {}, "the longest chunk has 200 tokens, none after the first 256"),
        (Shape(dim=80), {"pairs": "tq3"}, "tq3: 64 must divide the head dim 80"),
        (Shape(dim=80), {"pairs": "q4_0"}, "q4_0: 32 must divide the head dim 80"),
        (Shape(), {"pairs": "tq3+rope"}, r"tq3\+rope: layer 3 has no keys before RoPE"),
    ],
)
def test_refusals(shape: Shape, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    pairs = [(r, EXACT) for r in parse(options.pop("pairs", "exact"))]
    with (
        load_capture(write(tmp_path / "kv.st", shape)) as c,
        pytest.raises((StudyError, QuantizerError), match=message),
    ):
        study(c, pairs, **options)


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["study", *map(str, args)])
    return done.exit_code, done.output


def test_command(tmp_path: Path) -> None:
    path = write(tmp_path / "kv.st")
    options = ("--keys", "tq3,q4_0", "--values", "q8_0", "--center", "mean", "-j", 1)
    code, out = run(path, *options, "--json")
    assert code == 0, out
    found = json.loads(out)
    with load_capture(path) as c:  # the same without a process of its own
        here = study(c, [(r, Recipe("q8_0")) for r in parse("tq3+mean,q4_0+mean")])
    assert [r["key"] for r in found["rows"]] == ["tq3+mean", "q4_0+mean"]
    want = here.layers[0].keys["q4_0+mean"]
    assert found["layers"][0]["keys"]["q4_0+mean"]["kl"] == pytest.approx(want.kl, rel=1e-4)
    assert found["rows"][1]["output_both"] == pytest.approx(here.layers[0].outputs["q4_0+mean / q8_0"], rel=1e-4)

    results = tmp_path / "results"
    results.mkdir()
    code, out = run(path, *options, "-o", results)
    assert code == 0, out
    assert sorted(p.name for p in results.iterdir()) == ["study.json", "study.md", "study.png"]
    assert json.loads((results / "study.json").read_text()) == found
    assert f"| q4_0+mean | q8_0 | 4.5 | 8.5 | {want.error:.3g} |" in (results / "study.md").read_text()
    assert (results / "study.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(results / f"study.{suffix}") in out.replace("\n", "") for suffix in ("json", "md", "png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keys", "nope"), "unknown quantizer 'nope': known are tq2_mse"),
        (("--keys", "tq3,tq4,q8_0", "--values", "tq3,tq4"), "3 keys and 2 values: want one value"),
        (("--values", "tq3+mean"), "tq3+mean: only keys are centred"),
        (("--center", "median"), "--center median: want none, mean, rope, cal"),
        (("--keys", "tq3+cal"), "tq3+cal: wants --calibrated MODEL.gguf"),
        (("--calibrated", "none.gguf"), "none.gguf"),
        (("--layers", "7"), "layer 7 is not in the capture"),
        (("--layers", "one"), "--layers one: want numbers"),
        (("-o", "none/study"), "none is not a directory"),
    ],
)
def test_bad_commands(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, out = run(write(tmp_path / "kv.st"), *options)
    assert code == 1
    assert out.count("\n") == 1, out
    assert out.startswith(f"error: {message}"), out
    assert [p.name for p in tmp_path.iterdir()] == ["kv.st"]


def test_no_capture(tmp_path: Path) -> None:
    code, out = run(tmp_path / "none.st")
    assert (code, out.count("\n")) == (1, 1)
    assert out.startswith("error: cannot read ")


# ---- real keys


@pytest.fixture(scope="module")
def real(fork: Fork, smollm2: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("capture") / "kv.st"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGML_TQ_BUILD", str(fork.bin_dir.parent))
        kv = capture(Request(smollm2, prose, path, layers="20", context=640, threads=2))
    keys = parse("q8_0,q4_0,q4_0-norot,tq4_mse,tq3_mse,tq2_mse,tq4_qjl,tq3_qjl,tq3_mse+mean,tq3_mse+rope")
    with kv:
        return study(kv, [(k, Recipe(k.quantizer)) for k in keys], jobs=1)


def test_real_keys(real: Study) -> None:
    for layer in real.layers:
        kl = {name: k.kl for name, k in layer.keys.items()}
        assert kl["q8_0"] < kl["tq4_mse"] / 20 < kl["tq3_mse"] / 40 < kl["tq2_mse"] / 80
        assert kl["q4_0"] < kl["q4_0-norot"] / 2
        assert kl["tq4_mse"] < kl["tq4_qjl"] < kl["tq3_mse"] < kl["tq3_qjl"]
        assert kl["tq3_mse+rope"] < kl["tq3_mse"] * 0.8
        # the minimum-error scale shrinks by the distortion; the unbiased one does not
        assert layer.keys["tq3_mse"].logit_slope == pytest.approx(-0.0334, abs=0.012)
        assert abs(layer.keys["tq3_qjl"].logit_slope) < 0.012
        # in theory: the distortion of the type on Gaussian numbers
        assert layer.values["tq3_mse"].error == pytest.approx(0.0334, rel=0.15)
        assert min(layer.mean_share) > 0.3


def test_mla(
    fork: Fork,
    random_model: Callable[[object], Path],
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One tensor for both: the values are the keys' first part, as the cache would decode it."""
    monkeypatch.setenv("GGML_TQ_BUILD", str(fork.bin_dir.parent))
    with capture(Request(random_model(DeepSeek2()), prose, tmp_path / "kv.st", "0", context=288, threads=2)) as c:
        layer = study(c, [(r, replace(r)) for r in parse("tq4_qjl,tq2_qjl")]).layers[0]
    assert layer.keys["tq4_qjl"].kl < layer.keys["tq2_qjl"].kl / 5
    assert layer.values["tq4_qjl"].error < 0.02
