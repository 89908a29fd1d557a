"""The recorded distortion table: complete, as measured, and rendered from its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ggml_tq import distortion as d
from ggml_tq.cli import app

RECORDED = Path(__file__).resolve().parents[2] / "docs" / "results" / "distortion.json"
REMEASURED = (
    "turboquant_mse-3b",
    "eden_unbiased-2b",
    "turboquant_prod_hadamard_paper-4b",
    "tq3_mse",
    "polarquant-4222",
)


def invoke(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["distortion", *map(str, args)])
    return done.exit_code, done.output


def test_is_complete_and_above_the_bound() -> None:
    _, measures, times = d.load(RECORDED)
    want = [(dim, e.family, e.width, e.quantizer.name, e.quantizer.bits) for dim in d.DIMS for e in d.entries(dim)]
    assert [(m.dim, m.family, m.width, m.name, pytest.approx(m.bits, abs=1e-5)) for m in measures] == want
    assert all(m.distortion > 4.0**-m.bits for m in measures)
    assert [(t.what, t.arrays) for t in times] == [(what, kind) for what, kind, _ in d.speeds()]
    # seconds, not minutes, but for a trellis: it goes over each coordinate ten times, with 64 branches; of the
    # recording's processor time, so that a busy machine does not count
    assert all(t.cpu_seconds < (300 if "tcq" in t.what else 30) for t in times)


@pytest.mark.parametrize("dim", d.DIMS)
def test_is_as_measured(dim: int) -> None:
    _, measures, _ = d.load(RECORDED)
    found = {m.name: m for m in measures if m.dim == dim}
    x = d.sphere(d.VECTORS, dim)
    for entry in d.entries(dim):
        if entry.quantizer.name in REMEASURED:
            m, want = d.measure(entry, x), found[entry.quantizer.name]
            for name in ("distortion", "error", "inner", "slope"):
                assert getattr(m, name) == pytest.approx(getattr(want, name), rel=1e-4), (entry, name)


def test_inner_is_the_mean_over_directions() -> None:
    """The closed form of the mean over y, against drawn y."""
    entry = next(e for e in d.entries(64) if e.quantizer.name == "turboquant_mse-1b")
    x = d.sphere(4000, 64)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((20, *x.shape))
    z -= np.sum(z * x, axis=-1, keepdims=True) * x
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    y = d.COSINE * x + np.sqrt(1 - d.COSINE**2) * z
    e = entry.quantizer.reconstruct(x).astype(np.float64) - x
    assert 64 * np.mean(np.sum(y * e, axis=-1) ** 2) == pytest.approx(d.measure(entry, x).inner, rel=0.02)


def test_table_and_plot_are_of_the_record(tmp_path: Path) -> None:
    copy = tmp_path / "distortion.json"
    copy.write_bytes(RECORDED.read_bytes())
    code, out = invoke("--render", "-o", copy)
    assert (code, out.strip()) == (0, str(copy.with_suffix(".md")))
    assert copy.with_suffix(".md").read_text() == RECORDED.with_suffix(".md").read_text()
    assert copy.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert RECORDED.with_suffix(".png").stat().st_size < 150_000
    assert d.dump(json.loads(copy.read_text())) == copy.read_text()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md", ".png"]


@pytest.mark.parametrize("content", [None, "", "{}", '{"measures": [{"dim": 1}]}', "[1]", b"\xff\xfe"])
def test_bad_records(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out = invoke("--render", "-o", path)
    assert code == 1
    assert out.startswith(f"error: {path}: ")
    assert len(out.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} <= {path.name}


def test_no_folder(tmp_path: Path) -> None:
    code, out = invoke("-o", tmp_path / "none" / "results.json")
    assert (code, out) == (1, f"error: {tmp_path / 'none'}: no such folder\n")


def test_measures_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, on few vectors; then the throughput alone."""
    monkeypatch.setattr(d, "VECTORS", 16)
    monkeypatch.setattr(d, "DIMS", (64,))
    monkeypatch.setattr(d, "time_encoder", lambda *job, real=d.time_encoder: real(*job, vectors=64))
    path = tmp_path / "results.json"
    code, out = invoke("-o", path, "--json")
    assert code == 0
    data, measures, times = d.load(path)
    assert json.loads(out[out.index("{") :]) == data
    assert len(measures) == len(list(d.entries(64)))
    assert all(t.seconds > 0 for t in times)

    monkeypatch.setattr(d, "measure", None)
    assert invoke("-o", path, "--time")[0] == 0
    assert d.load(path)[1] == measures
