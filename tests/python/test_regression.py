"""Divergence of the cache types from f16, bounded by a committed baseline, on both paths through attention.

The text and the models are fixed, so a run differs from the baseline only by rounding between processors; the bound
is three standard errors of the baseline. It holds in both directions: a type that is suddenly better is not the type
that was measured. After a change that is meant to change the numbers, write the baseline anew and commit it:

    GGML_TQ_WRITE_BASELINE=1 .venv/bin/pytest tests/python/test_regression.py
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROSE, Divergence, Fork
from random_models import Biased, Llama

from ggml_tq import metadata
from ggml_tq.cache_types import CODEBOOK_TYPES
from ggml_tq.center import Centers
from ggml_tq.eval.perplexity import PROGRAM
from ggml_tq.eval.runs import PATHS, Figure, Pair, PathKind
from ggml_tq.params import DEFAULT, Params, Quantizer
from ggml_tq.trellis import trellis

BASELINE = Path(__file__).parents[1] / "data" / "kld_baseline.json"
WRITE = os.environ.get("GGML_TQ_WRITE_BASELINE") == "1"
SIGMAS = 3

OURS = tuple(f"tq{bits}{kind}" for bits in (4, 3, 2) for kind in ("", "_mse", "_tcq"))
# q4_0 has nothing of ours: if it moves, the measurement has
RUNS: dict[str, dict[PathKind, tuple[str, ...]]] = {
    # head dim 64; seconds a run
    "smollm2": {"batched": ("q4_0", "tq4", "tq3", "tq3_mse", "tq3_tcq", "tq2"), "decode": ("tq3_tcq",)},
    "random-128": dict.fromkeys(PATHS, ("q4_0", *OURS, "q8_0/tq3", "tq4/tq3")),  # head dim 128
    "biased": dict.fromkeys(PATHS, ("tq4_tcq", "tq3_tcq/f16")),  # keys of large biases, which are taken off
    "scaled": dict.fromkeys(PATHS, ("tq4_tcq", "tq3_tcq/f16")),  # the same model with scales that its queries ask for
}
SIZES = {"smollm2": (512, 1), "random-128": (512, 3), "biased": (512, 3), "scaled": (512, 3)}  # context and chunks
BIASED = Biased()
CASES = [(model, pair, path) for model, paths in RUNS.items() for path, pairs in paths.items() for pair in pairs]
BOTH = [(model, pair) for model, paths in RUNS.items() for pair in paths["decode"]]
TEXT = hashlib.sha256((PROSE * 2).encode()).hexdigest()


@dataclass
class Measure:
    """Results of this session, each measured once."""

    divergence: Divergence
    models: dict[str, Path]
    found: dict[tuple[str, str, PathKind], dict[str, Figure]] = field(default_factory=dict)

    def __call__(self, model: str, pair: str, path: PathKind) -> tuple[float, float]:
        """Mean KLD and its standard error."""
        if (model, pair, path) not in self.found:
            self.found[model, pair, path] = self.run(self.models[model], model, pair, path)
        value, error = self.found[model, pair, path]["kld"]
        assert value is not None, f"{model}, {pair}, {path}: not finite"
        return value, error or 0

    def run(self, file: Path, model: str, pair: str, path: PathKind) -> dict[str, Figure]:
        parsed = Pair.parse(pair)
        ctx, chunks = SIZES[model]
        return self.divergence.figures(file, (parsed.k, parsed.v), ctx=ctx, chunks=chunks, path=path)


def scaled_centers() -> Centers:
    """The biases, and scales that are small where queries hardly look (Biased makes them so)."""
    m = BIASED.key_bias()
    s = np.ones_like(m)
    s[..., BIASED.biased()] = 0.2
    return Centers("mean", m.ravel(), s.ravel())


@pytest.fixture(scope="module")
def measure(
    divergence: Divergence,
    smollm2: Path,
    random_model: Callable[[object], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Measure]:
    models = {"smollm2": smollm2, "random-128": random_model(Llama(128)), "biased": random_model(BIASED)}
    models["scaled"] = tmp_path_factory.mktemp("models") / "scaled.gguf"
    metadata.stamp(models["biased"], models["scaled"], DEFAULT, centers=scaled_centers())
    measured = Measure(divergence, models)
    yield measured
    if WRITE:
        lines = {f"{m} {pair} {path}": measured(m, pair, path) for m, pair, path in CASES}
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        BASELINE.write_text(json.dumps({"text_sha256": TEXT, "kld": lines}, indent=1) + "\n")


@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    if WRITE:
        pytest.skip("writing the baseline")
    data: dict[str, Any] = json.loads(BASELINE.read_text())
    assert data["text_sha256"] == TEXT, "the baseline is of another text: write it anew"
    return data["kld"]


def deviation(measured: tuple[float, float], expected: tuple[float, float]) -> float:
    """In standard errors of the baseline."""
    return (measured[0] - expected[0]) / expected[1]


@pytest.mark.parametrize(("model", "pair", "path"), CASES)
def test_divergence(measure: Measure, baseline: dict[str, Any], model: str, pair: str, path: PathKind) -> None:
    off = deviation(measure(model, pair, path), baseline[f"{model} {pair} {path}"])
    assert abs(off) <= SIGMAS, f"{off:+.1f} standard errors from the baseline"


@pytest.mark.parametrize(("model", "pair"), BOTH)
def test_decode_agrees_with_batches(measure: Measure, model: str, pair: str) -> None:
    """Both paths read the same packed bytes; decoding also rounds queries to int8, at 4 bits a percent of the KLD."""
    batched, decode = (measure(model, pair, path) for path in PATHS)
    assert abs(deviation(decode, batched)) <= 2


@pytest.mark.parametrize("model", RUNS)
def test_more_bits_are_better(measure: Measure, model: str) -> None:
    for kind in ("", "_mse", "_tcq"):
        names = [f"tq{bits}{kind}" for bits in (4, 3, 2)]
        kld = [measure(model, name, "batched")[0] for name in names if name in RUNS[model]["batched"]]
        assert kld == sorted(kld)


@pytest.mark.parametrize("path", PATHS)
def test_scales_are_better(measure: Measure, path: PathKind) -> None:
    """A quarter of the coordinates is seen 25 times less: of the error's power (3 + 0.04)^2 / 4^2 / 0.75 are left."""
    plain, scaled = (measure(model, "tq3_tcq/f16", path)[0] for model in ("biased", "scaled"))
    assert scaled / plain == pytest.approx(0.77, abs=0.1)


def moved_centroid(name: str) -> Params:
    """The built-in parameters with the smallest positive centroid of a type half way to the next, or 1.5 times it."""
    quantizer = DEFAULT.quantizers[name]
    c = quantizer.centroids.copy()
    i = len(c) // 2
    c[i] += (c[i + 1] - c[i]) / 2 if i + 1 < len(c) else c[i] / 2
    return Params(quantizers={**DEFAULT.quantizers, name: Quantizer(c, quantizer.kappa)})


@pytest.mark.parametrize("name", CODEBOOK_TYPES)
def test_a_moved_centroid_is_noticed(measure: Measure, baseline: dict[str, Any], tmp_path: Path, name: str) -> None:
    """The bounds are tight enough to fail when one centroid of a codebook is wrong (measured: by 3.9 to 23 errors)."""
    broken = tmp_path / "broken.gguf"
    metadata.stamp(measure.models["random-128"], broken, moved_centroid(name))
    pair = name.removesuffix("_qjl")  # tqN: keys of tqN_qjl
    kld = measure.run(broken, "random-128", pair, "batched")["kld"][0]
    assert kld is not None
    assert deviation((kld, 0), baseline[f"random-128 {pair} batched"]) > SIGMAS


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere programs load libraries, or are signed")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_wrong_trellis_level_is_noticed(
    measure: Measure, baseline: dict[str, Any], tmp_path: Path, bits: int
) -> None:
    """The sign of the largest level (measured: by 8 to 16 errors), in a copy of the program: it is no parameter.

    Smaller errors of one level of 32 do not all show here: encoding chooses among what is there. The library's golden
    vectors use each of the 32.
    """
    levels = trellis(bits).levels
    moved = levels.copy()
    moved.flat[levels.argmax()] *= -1
    program = Path(measure.divergence.fork.program(PROGRAM))
    data = program.read_bytes()
    assert levels.tobytes() in data, "the table is not in the program"  # once for each kind of processor
    broken = tmp_path / PROGRAM
    broken.write_bytes(data.replace(levels.tobytes(), moved.tobytes()))
    broken.chmod(0o755)
    model, (ctx, chunks) = measure.models["random-128"], SIZES["random-128"]
    divergence = Divergence(Fork(tmp_path), measure.divergence.prose, tmp_path)
    divergence.bases[model, ctx, chunks] = measure.divergence.base(model, ctx, chunks)
    kld = divergence.measure(model, (f"tq{bits}_tcq", f"tq{bits}_tcq"), ctx=ctx, chunks=chunks)
    assert deviation((kld, 0), baseline[f"random-128 tq{bits}_tcq batched"]) > SIGMAS


DAMAGES = ["no centers", "zeros for a head", "another sign", "another's means", "no scales", "reciprocals"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_center_is_noticed(measure: Measure, baseline: dict[str, Any], tmp_path: Path, damage: str) -> None:
    """One of 4 heads, or all, in the file that brings them, with a hash that fits (measured: by 13 errors and more)."""
    good = scaled_centers()
    assert good.key is not None
    assert good.scale is not None
    m, s = (v.reshape(BIASED.key_bias().shape).copy() for v in (good.key, good.scale))
    match damage:
        case "zeros for a head":
            m[1, 0] = 0
        case "another sign":
            m[1, 0] *= -1
        case "another's means":
            m[1, 0] = m[1, 1]
        case "no scales":
            s[:] = 1
        case "reciprocals":
            s[1, 0] = 1 / s[1, 0]
    broken = tmp_path / "broken.gguf"
    centers = Centers("none") if damage == "no centers" else Centers("mean", m.ravel(), s.ravel())
    metadata.stamp(measure.models["biased"], broken, DEFAULT, centers=centers)
    ctx, chunks = SIZES["scaled"]
    measure.divergence.bases[broken, ctx, chunks] = measure.divergence.base(measure.models["biased"], ctx, chunks)
    for path in PATHS:
        kld = measure.run(broken, "scaled", "tq3_tcq/f16", path)["kld"][0]
        assert kld is not None
        assert deviation((kld, 0), baseline[f"scaled tq3_tcq/f16 {path}"]) > SIGMAS
