"""Centered keys in the fork (docs/format.md, section 10): what is stored, what attention makes of it, in every path.

Models with a large key bias lose most of their bits to it unless it is taken off; the measure is the divergence of the
next token's distribution from that of an f16 cache. Where a model's keys have no mean, any centers must do: whatever is
taken off on one side and not added on the other shows as noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from conftest import THREADS, Divergence, Fork, Json, Server, free_port, listening, wait_until
from numpy.typing import NDArray
from random_models import N_VOCAB, Biased, DeepSeek2, Gemma3, Llama, Model
from typer.testing import CliRunner

from ggml_tq import codec, metadata
from ggml_tq.cache_types import TYPES
from ggml_tq.capture import ROPE_NEOX, Rope
from ggml_tq.center import Centers, Turn, make_table
from ggml_tq.cli import app
from ggml_tq.gguf_file import Header, read_header
from ggml_tq.hparams import key_shapes
from ggml_tq.params import DEFAULT
from ggml_tq.state import Stream, read_state

RandomModel = Callable[[Model], Path]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Tokens = list[int]

BIASED = {
    "64": Biased(),
    "64-mha": Biased(n_head_kv=4),
    "64-mqa": Biased(n_head_kv=1),
    "128": Biased(head_dim=128, n_head=2, n_head_kv=1),
    "256": Biased(head_dim=256, n_head=2, n_head_kv=2),
    "a part of a head turns": Biased("stablelm", rope_dim=32),
    "adjacent pairs, factors": Biased("llama", rope_factors=True),
    "adjacent pairs, one projection, a part turns": Biased("chatglm", rope_dim=32),
    "yarn": Biased(yarn=4.0),
}
BOUND = {"tq4_tcq": 0.025, "tq3_tcq": 0.08, "tq4_mse": 0.04, "tq4_qjl": 0.06}  # about twice what is found
SIGMA = 0.7
# for BOUND where scales have nothing to do with what queries look at: the error is exp(4 SIGMA^2) = 7.1 times as great;
# of rows that are scaled and queries that are not, the divergence is 0.65 to 0.96
COST = 3
NEOX = ("qwen2", "stablelm", "gemma3")


def stamped(model: Path, output: Path, centers: Centers) -> Path:
    metadata.stamp(model, output, DEFAULT, centers=centers)
    return output


def pairs(header: Header) -> tuple[slice, slice]:
    """The two coordinates of all pairs that RoPE turns in a head of a random model."""
    arch = header.get("general.architecture")
    n = header.get(f"{arch}.rope.dimension_count")
    return (slice(n // 2), slice(n // 2, n)) if arch in NEOX else (slice(0, n, 2), slice(1, n, 2))


def scales(model: Path, seed: int = 7) -> Floats:
    """Log-normal scales, those of a pair alike."""
    header, rng = read_header(model), np.random.default_rng(seed)
    a, b = pairs(header)
    parts = []
    for shape in key_shapes(header.entries):
        s = rng.lognormal(0, SIGMA, (shape.heads, shape.dim)).astype(np.float32)
        s[:, b] = s[:, a]
        parts.append(s.ravel())
    return np.concatenate(parts)


def arbitrary(model: Path, rms: float = 1.0, seed: int = 5) -> Centers:
    """Means that are those of no keys, scales, and means for position 0."""
    s = scales(model)
    m, first = (rms * np.random.default_rng(seed).standard_normal((2, len(s)))).astype(np.float32)
    return Centers("mean", m, s, first)


def scaled(random_model: RandomModel, m: Biased, output: Path) -> Path:
    """The model with its biases as means, scales, and other means for position 0."""
    model, bias = random_model(m), m.key_bias().ravel()
    first = bias + np.float32(0.3) * np.random.default_rng(6).standard_normal(len(bias)).astype(np.float32)
    return stamped(model, output, Centers("mean", bias, scales(model), first))


def tokens(n: int, seed: int = 0) -> Tokens:
    return [int(t) for t in np.random.default_rng(seed).integers(300, N_VOCAB, n)]


# the next token is 300, which is text of its own: what the server holds back has no probabilities
PROBABILITIES = {"n_probs": N_VOCAB, "logit_bias": [[300, 1000.0]]}


def distributions(answer: Json) -> list[Doubles]:
    """Logarithms of each next token's probabilities (N_VOCAB,), before any sampler."""
    found = []
    for step in answer["completion_probabilities"]:
        p = np.full(N_VOCAB, -np.inf)
        for entry in step["top_logprobs"]:
            p[entry["id"]] = entry["logprob"]
        found.append(p)
    return found


def distribution(server: Server, prompt: Tokens, slot: int = 0, **options: object) -> Doubles:
    (p,) = distributions(server.complete(prompt, 1, slot, **PROBABILITIES, **options))
    return p


def divergence_of(want: Sequence[Doubles], got: Sequence[Doubles]) -> float:
    """Mean KL divergence."""
    return float(np.mean([np.sum(np.exp(p) * (p - q)) for p, q in zip(want, got, strict=True)]))


def cached(k: str, *more: object) -> tuple[object, ...]:
    """Options of a server with keys of a type."""
    return ("-c", 512, "-np", 1, "-ctk", k, "-ctv", "f16", "--cache-ram", 0, *more)


# ---- what is stored


def frequencies(m: Biased) -> tuple[Doubles, float]:
    factors = np.geomspace(1, 8, m.n_rot // 2).astype(np.float32) if m.rope_factors else None
    scale, ext = (1 / m.yarn, 1.0) if m.yarn else (1.0, 0.0)
    # with YaRN upstream sets the factor so that the magnitude is that of the ramp alone
    rope = Rope(m.n_rot, ROPE_NEOX, 64 if m.yarn else 2048, 1e4, scale, ext, 1.0, 32.0, 1.0, factors=factors)
    return rope.frequencies()


@pytest.mark.parametrize("name", ["64", "128", *list(BIASED)[5:]])
def test_rows_are_those_of_the_reference(fork: Fork, random_model: RandomModel, tmp_path: Path, name: str) -> None:
    """Bit for bit, in the first layer, whose keys do not depend on the cache; positions of two pages."""
    model = BIASED[name]
    freqs, magnitude = frequencies(model)
    prompt = "Once upon a time there was a " * 43
    file = random_model(model)
    mean = arbitrary(file, 20)

    def stored(file: Path, k: str) -> Stream:
        saved = tmp_path / f"{k}.bin"
        saved.unlink(missing_ok=True)
        fork.complete(file, "--prompt-cache", saved, prompt=prompt, n=1, ctx=1024, cache=(k, "f16"))
        (stream,) = read_state(saved).streams
        return stream

    exact = stored(file, "f32")
    assert exact.positions[-1] > 256
    shape = len(exact.positions), model.n_head_kv, model.head_dim
    keys = exact.k[0].data.view(np.float32).reshape(shape)
    turn = Turn(make_table(freqs), neox=model.arch in NEOX)
    assert mean.key is not None
    assert mean.scale is not None
    assert mean.first is not None
    every = (mean.key, mean.scale, mean.first)
    of_layer = [np.split(v.copy(), model.n_layer)[0].reshape(shape[1:]) for v in every]
    bias = model.key_bias()[0]
    for k, source, hash_, (center, scale, first) in (
        ("tq4_mse", file, Centers("bias").hash, (bias.copy(), np.float32(1), bias.copy())),
        ("tq3_tcq", stamped(file, tmp_path / "mean.gguf", mean), mean.hash, of_layer),
    ):
        for m in (center, first):
            m[..., : model.n_rot] *= np.float32(magnitude)
        packed = stored(source, k)
        np.testing.assert_array_equal(packed.positions, np.arange(shape[0]))
        x = (keys - turn.apply(center, exact.positions, first)) * scale
        assert x.dtype == np.float32
        same = np.all(packed.k[0].data == codec.encode(x.reshape(shape[0], -1), TYPES[k]), axis=1)
        assert packed.k[0].hash_bits == (DEFAULT.hash ^ hash_) & 0xFFFFF
        # upstream's frequency base and scale are binary32, so that a bit of the table may differ
        assert same.mean() > 0.98, same
        if not model.yarn:
            assert same.all()


# ---- what attention makes of it


@pytest.mark.parametrize("name", BIASED)
def test_biases_cost_no_bits(random_model: RandomModel, divergence: Divergence, tmp_path: Path, name: str) -> None:
    model = random_model(BIASED[name])
    none = stamped(model, tmp_path / "none.gguf", Centers("none"))
    divergence.bases[none, 256, 1] = divergence.base(model, 256, 1)  # centers do not matter to it
    for k, bound in BOUND.items():
        centered = divergence.measure(model, (k, "f16"))
        assert 0 < centered < bound, k
        assert divergence.measure(none, (k, "f16")) > 8 * centered, k


@pytest.mark.parametrize("k", ["tq3_tcq", "tq4_qjl"])
@pytest.mark.parametrize("name", ["128", "a part of a head turns", "adjacent pairs, factors"])
def test_paths_agree(random_model: RandomModel, divergence: Divergence, tmp_path: Path, name: str, k: str) -> None:
    """Tiles of 64 tokens, rows, and both; each graph of one token is reused 511 times."""
    model = scaled(random_model, BIASED[name], tmp_path / "scaled.gguf")
    divergence.bases[model, 512, 1] = divergence.base(random_model(BIASED[name]), 512, 1)
    tiles = divergence.measure(model, (k, "f16"), ctx=512)
    assert 0 < tiles < COST * BOUND[k]
    for ubatch in (1, 48, 65, 100):
        assert divergence.measure(model, (k, "f16"), "-ub", ubatch, ctx=512) == pytest.approx(tiles, rel=0.06), ubatch


@pytest.mark.parametrize("options", [("-b", 256), ("-b", 1024, "--kv-unified"), ("-b", 1024, "--no-kv-unified")])
def test_several_sequences(
    random_model: RandomModel, divergence: Divergence, tmp_path: Path, options: tuple[object, ...]
) -> None:
    """Cells of one cache, or caches of their own; a cell's index is no position."""
    model = scaled(random_model, BIASED["64"], tmp_path / "scaled.gguf")
    divergence.bases[model, 256, 4] = divergence.base(random_model(BIASED["64"]), 256, 4)
    found = divergence.measure(model, ("tq4_tcq", "f16"), *options, chunks=4)
    assert 0 < found < COST * BOUND["tq4_tcq"]
    assert found == pytest.approx(divergence.measure(model, ("tq4_tcq", "f16"), chunks=4), rel=0.06)


@pytest.mark.parametrize("name", ["64", "256", "adjacent pairs, one projection, a part turns", "yarn"])
def test_means_that_are_the_biases(
    random_model: RandomModel, divergence: Divergence, tmp_path: Path, name: str
) -> None:
    """The same bits, wherever centers come from; those of other layers are worse."""
    m = BIASED[name]
    model, bias = random_model(m), m.key_bias()
    want = divergence.figures(model, ("tq4_tcq", "f16"))
    for label, values in (("same", bias), ("swapped", bias[::-1])):
        file = stamped(model, tmp_path / f"{label}.gguf", Centers("mean", values.ravel()))
        divergence.bases[file, 256, 1] = divergence.base(model, 256, 1)
        found = divergence.figures(file, ("tq4_tcq", "f16"))
        if label == "same":
            assert found == want
        else:
            kld, right = found["kld"][0], want["kld"][0]
            assert kld is not None
            assert right is not None
            assert 8 * right < kld < 2  # noise, but not nonsense


ARBITRARY: dict[str, Model] = {
    "64": Llama(64),
    "192": Llama(192, n_head=4, n_head_kv=1),
    "512": Llama(512, n_layer=1),
    "windows": Gemma3(),
    "windows, a part of a head turns": Gemma3(rope_dim=128),
}


@pytest.mark.parametrize("name", ARBITRARY)
def test_any_means_give_right_scores(
    random_model: RandomModel, divergence: Divergence, tmp_path: Path, name: str
) -> None:
    """They and their scales cost bits. Not undone they would be noise: the divergence is then 0.65 and more."""
    model = random_model(ARBITRARY[name])
    rms = 0.5 if isinstance(ARBITRARY[name], Gemma3) else 1.0  # its keys are normalized
    file = stamped(model, tmp_path / "mean.gguf", arbitrary(model, rms))
    divergence.bases[file, 256, 1] = divergence.base(model, 256, 1)
    without, tiles = (divergence.measure(f, ("tq4_tcq", "f16")) for f in (model, file))
    assert 0 < without < tiles < 4 * COST * without
    assert divergence.measure(file, ("tq4_tcq", "f16"), "-ub", 1) == pytest.approx(tiles, rel=0.1)


@pytest.mark.parametrize("options", [(), ("--swa-full",)])
def test_windows_reuse_cells(
    random_model: RandomModel, divergence: Divergence, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Cells of sliding windows get new positions."""
    model = random_model(Gemma3())
    file = stamped(model, tmp_path / "mean.gguf", arbitrary(model, 0.5))
    divergence.bases[file, 512, 1] = divergence.base(model, 512, 1)
    without, found = (
        divergence.measure(f, ("tq4_tcq", "f16"), "-b", 64, "-ub", 64, *options, ctx=512) for f in (model, file)
    )
    assert without < found < 4 * COST * without


def test_no_rope_at_all(random_model: RandomModel, divergence: Divergence, tmp_path: Path) -> None:
    """A layer that does not turn its keys has centers that do not turn, and no pairs: every coordinate has a scale."""
    m = Biased("granite", rope_dim=0)
    model = random_model(m)
    assert 0 < divergence.measure(model, ("tq4_tcq", "f16")) < BOUND["tq4_tcq"]
    means = m.key_bias().ravel()
    s = np.random.default_rng(7).lognormal(0, SIGMA, len(means)).astype(np.float32)
    file = stamped(model, tmp_path / "mean.gguf", Centers("mean", means, s))
    divergence.bases[file, 256, 1] = divergence.base(model, 256, 1)
    assert 0 < divergence.measure(file, ("tq4_tcq", "f16")) < COST * BOUND["tq4_tcq"]


def test_far_positions(fork: Fork, random_model: RandomModel, tmp_path: Path) -> None:
    """Beyond 65536, where the third part of the table comes in; in one sliding window, so that it takes a second."""
    m = Gemma3(head_dim=64, rope_dim=64, n_layer=1)
    model = random_model(m)
    centers = arbitrary(model, 3.0)
    file = stamped(model, tmp_path / "mean.gguf", centers)
    context = ("-c", 66560, "--override-kv", "gemma3.context_length=int:66560", "--ctx-checkpoints", 0)
    start = tokens(65600)
    prompts = [start, *(start + tokens(n, n) for n in range(1, 9))]
    found, keys = {}, {}
    for name, k in (("f16", "f16"), ("f32", "f32"), ("tq4_tcq", "tq4_tcq")):
        options = (*cached(k, *context)[2:], "--slot-save-path", tmp_path)
        with fork.server(tmp_path / f"{name}.log", "-m", file, *options) as server:
            found[name] = [distribution(server, p) for p in (prompts if name != "f32" else prompts[:1])]
            assert server.slot(0, "save", f"{name}.bin")[0] == 200
        state = read_state(tmp_path / f"{name}.bin")
        keys[name] = state.streams[-1]
    assert 0 < divergence_of(found["f16"], found["tq4_tcq"]) < 0.25
    packed, exact = keys["tq4_tcq"], keys["f32"]
    known = {int(p): i for i, p in enumerate(exact.positions)}
    both = [(i, known[int(p)]) for i, p in enumerate(packed.positions) if int(p) in known and p > 65536]
    assert len(both) > 32
    rows, columns = map(list, zip(*both, strict=True))
    assert centers.key is not None
    assert centers.scale is not None
    turn = Turn(make_table(frequencies(Biased())[0]), neox=True)
    x = exact.k[0].data.view(np.float32)[columns] - turn.apply(centers.key, packed.positions[rows], centers.first)
    x *= centers.scale
    same = np.all(packed.k[0].data[rows] == codec.encode(x, TYPES["tq4_tcq"]), axis=1)
    assert same.mean() > 0.9


# ---- positions that move


A, B, C = tokens(70, 1), tokens(50, 2), tokens(120, 3)
TAILS = [tokens(2, 10 + i) for i in range(16)]


def shifted(fork: Fork, log: Path, model: Path, k: str) -> tuple[list[Doubles], list[Doubles]]:
    """After A, C and each tail: of a fresh cache, and of one that held A, B, C before, where C moves to B's place.

    Of a model of one layer both hold the same keys and values, up to what is lost by encoding them twice.
    """
    options = cached(k, "--cache-reuse", 16, "-fa", "on", "-lv", 5)
    with fork.server(log, "-m", model, *options) as server:
        fresh = [distribution(server, A + C + tail, cache_prompt=False) for tail in TAILS]
        distribution(server, A + B + C, cache_prompt=False)
        moved = [distribution(server, A + C + tail) for tail in TAILS]
        assert log.read_text(errors="replace").count("applying K-shift") == 1
    return fresh, moved


@pytest.mark.parametrize(
    "m",
    [Biased(n_layer=1), Biased("stablelm", rope_dim=32, n_layer=1), Biased("llama", rope_factors=True, n_layer=1)],
    ids=["neox", "a part", "factors"],
)
def test_shift(fork: Fork, random_model: RandomModel, tmp_path: Path, m: Biased) -> None:
    model = random_model(m)
    want, again = shifted(fork, tmp_path / "f16.log", model, "f16")
    assert divergence_of(want, again) < 1e-4
    for name, file, worst in (("bias", model, 0.01), ("mean", scaled(random_model, m, tmp_path / "mean.gguf"), 0.05)):
        fresh, moved = shifted(fork, tmp_path / f"{name}.log", file, "tq4_tcq")
        assert 0 < divergence_of(want, fresh) < worst
        assert divergence_of(want, moved) < 3 * divergence_of(want, fresh)
    none = stamped(model, tmp_path / "none.gguf", Centers("none"))
    _, moved_none = shifted(fork, tmp_path / "none.log", none, "tq4_tcq")
    assert divergence_of(want, moved_none) > 3 * divergence_of(want, moved)


@pytest.mark.parametrize("m", [Biased(n_layer=1), Biased("stablelm", rope_dim=32, n_layer=1)], ids=["neox", "a part"])
def test_shift_to_and_from_position_0(fork: Fork, random_model: RandomModel, tmp_path: Path, m: Biased) -> None:
    """Whose center is another: rows go over from one to the other. Not done, it is 8 times as bad and more."""
    model, bias = random_model(m), m.key_bias().ravel()
    far = bias + 3 * np.random.default_rng(6).standard_normal(len(bias)).astype(np.float32)
    for centers, worst in ((Centers("mean", bias, scales(model), far), 0.05), (Centers("none"), 0.3)):
        file = stamped(model, tmp_path / f"{centers.kind}.gguf", centers)
        out = fork.run("test-shift", file, "tq4_tcq", last="halves").ok().out
        found = {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", out, re.MULTILINE)}
        assert list(found) == ["still", "leaves", "arrives", "returns", "halves"]
        assert 0 < found["still"] < worst
        for name, kld in found.items():
            assert 0 < kld < 4 * found["still"], name


def test_shift_of_keys_whose_last_part_turns(fork: Fork, random_model: RandomModel, tmp_path: Path) -> None:
    """Upstream turns the last coordinates of such heads, centers would turn with the first: the keys have none."""
    model = random_model(DeepSeek2(mla=False, n_layer=1))
    file = stamped(model, tmp_path / "mean.gguf", arbitrary(model, 2.0))
    want, again = shifted(fork, tmp_path / "f16.log", model, "f16")
    assert divergence_of(want, again) < 1e-3
    fresh, moved = shifted(fork, tmp_path / "tq.log", file, "tq4_tcq")
    assert "keys are not centered (this architecture's cannot be)" in (tmp_path / "tq.log").read_text()
    assert divergence_of(want, moved) < 4 * divergence_of(want, fresh)
    assert [p.tobytes() for p in fresh] == [p.tobytes() for p in shifted(fork, tmp_path / "x", model, "tq4_tcq")[0]]


@pytest.mark.parametrize("options", [("--no-kv-unified",), ("--kv-unified",)])
def test_slots(fork: Fork, random_model: RandomModel, tmp_path: Path, options: tuple[str, ...]) -> None:
    """A slot's distributions do not depend on what the other one holds; a copied sequence is as good."""
    model = scaled(random_model, BIASED["64"], tmp_path / "scaled.gguf")
    prompts = [A + tail for tail in TAILS[:4]]
    with fork.server(tmp_path / "f16.log", "-m", model, *cached("f16")) as server:
        want = [distribution(server, p) for p in prompts]
    two = ("-m", model, *cached("tq4_tcq"), "-np", 2, *options)
    with fork.server(tmp_path / "tq.log", *two) as server:
        alone = [distribution(server, p, 1, cache_prompt=False) for p in prompts]
        server.complete(B + C, 24, 0, cache_prompt=False)
        beside = [distribution(server, p, 1, cache_prompt=False) for p in prompts]
        # two sequences in a batch, token by token; as long as each other, so that both are split as if alone
        two_prompts = [A, C[: len(A)]]
        status, answer = server.request(
            "POST", "/completion", PROBABILITIES | {"prompt": two_prompts, "n_predict": 24, "cache_prompt": False}
        )
        assert status == 200
        for entry, p in zip(cast("list[Json]", answer), two_prompts, strict=True):
            one = distributions(server.complete(p, 24, 1, cache_prompt=False, **PROBABILITIES))
            assert len(one) == 24
            assert divergence_of(one, distributions(entry)) < 1e-4
    assert 0 < divergence_of(want, alone) < 0.1
    assert divergence_of(alone, beside) < 1e-3


def test_copied_sequences(fork: Fork, random_model: RandomModel, tmp_path: Path) -> None:
    """Upstream's test of saving, restoring and copying."""
    options = ("-p", "Once upon a time", "-n", 16, "-c", 256, "-t", THREADS, "-ctk", "tq4_tcq", "-ctv", "tq4")
    m = Biased(head_dim=128, n_layer=12)
    model = scaled(random_model, m, tmp_path / "scaled.gguf")  # its last test wants a state of 12 kB
    fork.run("test-save-load-state", "-m", model, *options, last="All tests passed", cwd=tmp_path).ok()


# ---- state files


@pytest.fixture
def kinds(random_model: RandomModel, tmp_path: Path) -> dict[str, Path]:
    """One model, its keys centered by its biases, by means and not at all; ``other`` has other scales, ``first`` says
    the same of position 0 as of the others.
    """
    model = random_model(BIASED["64"])
    near = BIASED["64"].key_bias().ravel() + np.float32(0.1)
    return {
        "bias": model,
        "mean": stamped(model, tmp_path / "mean.gguf", Centers("mean", near, scales(model))),
        "other": stamped(model, tmp_path / "other.gguf", Centers("mean", near, scales(model, 8))),
        "first": stamped(model, tmp_path / "first.gguf", Centers("mean", near, scales(model), near)),
        "none": stamped(model, tmp_path / "none.gguf", Centers("none")),
    }


@pytest.mark.parametrize(
    ("saved", "others"), [("bias", ["none", "mean"]), ("mean", ["other", "first", "bias"]), ("none", ["bias"])]
)
def test_states_of_other_centers_are_refused(
    fork: Fork, kinds: dict[str, Path], tmp_path: Path, saved: str, others: list[str]
) -> None:
    state = tmp_path / "state.bin"
    cache = ("tq4_tcq", "f16")
    expected = fork.complete(kinds[saved], "--prompt-cache", state, n=32, cache=cache).out
    before = state.read_bytes()
    message = r"key type \(the file holds tq4_tcq, .*parameters (\w{5}); this context uses tq4_tcq, .*parameters (?!\1)"
    for other in others:
        fork.refuses_completion(message, kinds[other], "--prompt-cache", state, cache=cache)
    assert state.read_bytes() == before
    assert fork.complete(kinds[saved], "--prompt-cache", state, n=32, cache=cache).out == expected
    # values know no centers
    values = tmp_path / "values.bin"
    fork.complete(kinds[saved], "--prompt-cache", values, n=4, cache=("f16", "tq4_tcq"))
    fork.complete(kinds[others[0]], "--prompt-cache", values, n=4, cache=("f16", "tq4_tcq"))


def test_slots_of_other_centers_are_refused(fork: Fork, kinds: dict[str, Path], tmp_path: Path) -> None:
    options = cached("tq4_tcq", "--slot-save-path", tmp_path)
    with fork.server(tmp_path / "mean.log", "-m", kinds["mean"], *options) as server:
        server.complete(A, 1)
        assert server.slot(0, "save", "slot.bin")[0] == 200
        want = distribution(server, A + B)
        server.complete(C, 1)
        assert server.slot(0, "restore", "slot.bin")[0] == 200
        assert divergence_of([want], [distribution(server, A + B)]) < 1e-3
    with fork.server(tmp_path / "other.log", "-m", kinds["other"], *options) as server:
        want = distribution(server, A + B)
        status, answer = server.slot(0, "restore", "slot.bin")
        assert status == 400
        assert "Unable to restore slot" in answer["error"]["message"]
        assert divergence_of([want], [distribution(server, A + B, cache_prompt=False)]) < 1e-3
        assert "the file holds tq4_tcq" in server.log.read_text()


# ---- what is said, and what is refused


@pytest.mark.parametrize("name", ["64", "a part of a head turns", "adjacent pairs, factors"])
def test_two_scales_of_a_pair_are_refused(fork: Fork, random_model: RandomModel, tmp_path: Path, name: str) -> None:
    """A shift would not leave the row scaled as it was. Coordinates that do not turn have scales of their own."""
    m = BIASED[name]
    model, dim = random_model(m), m.head_dim
    a, b = (list(range(dim))[part][3] for part in pairs(read_header(model)))
    centers = arbitrary(model)
    assert centers.key is not None
    assert centers.scale is not None
    s = centers.scale.copy()
    s[-dim + b] = np.nextafter(s[-dim + a], np.float32(9))  # the last layer's last head
    file = stamped(model, tmp_path / "mean.gguf", Centers("mean", centers.key, s))
    message = (
        rf"turboquant\.center\.scale: in layer 1 coordinates {a} and {b}, which RoPE turns together, have different"
    )
    fork.refuses_completion(message, file, n=1, cache=("tq3_tcq", "f16"))
    fork.refuses(message, "llama-server", "--port", free_port(), "-m", file, *cached("tq3_tcq"))
    fork.complete(file, n=1, cache=("f16", "tq3_tcq"))  # values know no scales


@pytest.mark.parametrize("program", ["llama-completion", "llama-server", "llama-batched-bench", "llama-bench"])
def test_without_flash_attention_centered_keys_are_refused(fork: Fork, kinds: dict[str, Path], program: str) -> None:
    off = ("-fa", 0) if program == "llama-bench" else ("-fa", "off", "-c", 256)
    if program == "llama-completion":
        off = (*off, "-p", "Once", "-n", 4, "-no-cnv")
    port = ("--port", free_port()) if program == "llama-server" else ()
    for kind in ("bias", "mean"):
        fork.refuses(
            "centered keys need flash attention.*--center none",
            program,
            "-m",
            kinds[kind],
            "-ctk",
            "tq4_tcq",
            *off,
            *port,
        )


def test_without_flash_attention_keys_that_are_not_centered_work(
    divergence: Divergence, fork: Fork, kinds: dict[str, Path], random_model: RandomModel
) -> None:
    off = ("-fa", "off")
    divergence.bases[kinds["none"], 256, 1] = divergence.base(kinds["bias"], 256, 1)
    with_fa = divergence.measure(kinds["none"], ("tq4_tcq", "f16"))
    assert divergence.measure(kinds["none"], ("tq4_tcq", "f16"), *off) == pytest.approx(with_fa, rel=0.1)
    fork.complete(kinds["bias"], *off, n=4, cache=("q8_0", "f16"))  # another type
    fork.complete(random_model(Llama(64)), *off, n=4, cache=("tq4_tcq", "f16"))  # no biases


def test_what_keys_are_centered_by_is_said(
    fork: Fork, kinds: dict[str, Path], random_model: RandomModel, tmp_path: Path
) -> None:
    stated = {
        "centered by the biases of the key projections": kinds["bias"],
        "centered and scaled by the calibration in the file": kinds["mean"],
        r"not centered \(the file says so\)": kinds["none"],
        r"not centered \(no means in the file, .*, and no key biases\)": random_model(Llama(64)),
    }
    for i, m in enumerate((DeepSeek2(), DeepSeek2(mla=False))):
        model = random_model(m)
        stamp = stamped(model, tmp_path / f"{i}.gguf", arbitrary(model))
        stated[r"not centered \(this architecture's cannot be\)" + i * "()"] = stamp
    for message, model in stated.items():
        cache = ("tq3_tcq", "tq3_tcq")
        assert re.search("keys are " + message, fork.complete(model, n=1, cache=cache).err), message
    assert "centered" not in fork.complete(kinds["bias"], n=1, cache=("f16", "tq3_tcq")).err
    assert "centered" not in fork.complete(kinds["bias"], n=1, cache=("q8_0", "f16")).err


def test_stamp_turns_centering_off_and_on(fork: Fork, random_model: RandomModel, tmp_path: Path) -> None:
    model = random_model(BIASED["64"])
    cache = ("tq4_tcq", "f16")
    text = {}
    for kind in ("none", "bias"):
        file = tmp_path / f"{kind}.gguf"
        result = CliRunner().invoke(app, ["stamp", str(model), "-o", str(file), "--center", kind])
        assert result.exit_code == 0, result.output
        text[kind] = fork.complete(file, n=48, cache=cache).out
    assert text["bias"] == fork.complete(model, n=48, cache=cache).out
    assert text["none"] != text["bias"]


# ---- other models and devices in the process


def test_draft_model_with_centers_of_its_own(fork: Fork, random_model: RandomModel, tmp_path: Path) -> None:
    """The target's text is what it writes alone, and the draft's are as good as those of the target's own copy."""
    target = random_model(BIASED["64"])
    means = BIASED["64"].key_bias().ravel() + np.float32(0.5)
    near = stamped(target, tmp_path / "mean.gguf", Centers("mean", means, scales(target)))
    options = ("-m", target, *cached("tq4_tcq", "--spec-type", "draft-simple"))
    with fork.server(tmp_path / "alone.log", "-m", target, *cached("tq4_tcq")) as server:
        alone = server.complete(A, 48)["content"]
    with fork.server(tmp_path / "draft.log", *options, "-md", near, "-ctkd", "tq4_tcq", "-ctvd", "f16") as server:
        drafted = server.complete(A, 48)
        log = server.log.read_text()
    assert "centered by the biases" in log
    assert "keys are centered and scaled by the calibration in the file" in log
    assert drafted["content"] == alone
    assert drafted["timings"]["draft_n_accepted"] > 20


@contextmanager
def remote(fork: Fork, folder: Path, n: int) -> Iterator[tuple[object, ...]]:
    """Options for n devices in other processes."""
    with ExitStack() as stack:
        ports = []
        for i in range(n):
            port = free_port()
            log = folder / f"rpc-{i}.log"
            process = stack.enter_context(
                fork.background(log, "ggml-rpc-server", "--host", "127.0.0.1", "--port", port)
            )
            wait_until(lambda port=port: listening(port), process, log)  # type: ignore[misc]
            ports.append(port)
        yield ("--rpc", ",".join(f"127.0.0.1:{port}" for port in ports), "-ngl", 99)


def test_a_remote_device(fork: Fork, divergence: Divergence, kinds: dict[str, Path], tmp_path: Path) -> None:
    with remote(fork, tmp_path, 1) as there_options:
        for kind in ("bias", "mean"):
            divergence.bases[kinds[kind], 256, 1] = divergence.base(kinds["bias"], 256, 1)
            for options in ((), ("-ub", 1)):
                here, there = (
                    divergence.measure(kinds[kind], ("tq4_tcq", "f16"), *o) for o in (options, options + there_options)
                )
                assert there == pytest.approx(here, rel=0.02)


def test_heads_split_among_devices(fork: Fork, divergence: Divergence, kinds: dict[str, Path], tmp_path: Path) -> None:
    """Each device has the centers of its heads; with those of others the divergence would be far above the bound."""
    with remote(fork, tmp_path, 2) as options:
        for kind in ("bias", "mean"):
            divergence.bases[kinds[kind], 256, 1] = divergence.base(kinds["bias"], 256, 1)
            assert (
                divergence.measure(kinds[kind], ("tq4_tcq", "f16"), *options, "-sm", "tensor") < COST * BOUND["tq4_tcq"]
            )
