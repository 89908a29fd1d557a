"""Distortion of every reference quantizer on random vectors, and the time that encoding takes.

On uniform unit vectors x with e = decoded - x this measures

- D = E|e|^2, which no code of R stored bits a coordinate can bring below 4^-R (TurboQuant, arXiv:2504.19874,
  Theorem 3; Shannon's distortion-rate function);
- dim * E<y, e>^2 for unit vectors y at cosine 1/2 to x, the mean over those y taken in closed form. For y in random
  directions it would be D itself, which hides bias; TurboQuant's Theorem 2 is about any y;
- the slope E<x, decoded>, 1 where inner products are unbiased.

The results are a JSON file; the table and the plot come from it alone.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ggml_tq import codec
from ggml_tq.cache_types import BLOCK, TYPES
from ggml_tq.eval.report import replace_file
from ggml_tq.eval.runs import cpu
from ggml_tq.quantizers import CacheType
from ggml_tq.reference import Entry, TurboQuantMse, TurboQuantProd, catalogue
from ggml_tq.reference.protocol import CHUNK

DIMS = (128, 64)
WIDTHS = range(1, 9)
VECTORS = 32768  # for each point
SPEED_VECTORS, SPEED_DIM = 1_000_000, 128
SEED = 20250428  # of the vectors
COSINE = 0.5

Results = dict[str, Any]


class DistortionError(Exception):
    """Results that are missing or not what this version writes; one line for the user."""


class Measure(NamedTuple):
    """One row of the results."""

    dim: int
    family: str
    width: int  # bits of the codes, 0 where the algorithm has one size only
    name: str
    bits: float  # stored, a coordinate
    distortion: float  # D
    error: float  # standard error of D
    inner: float  # dim * E<y, e>^2 at cosine 1/2
    slope: float


def entries(dim: int) -> Iterator[Entry]:
    """The reference quantizers, and the cache types themselves."""
    yield from catalogue(dim, WIDTHS)
    if dim % BLOCK == 0:
        for tq in TYPES.values():
            yield Entry(f"cache type {tq.name}", 0, CacheType(tq))


def sphere(rows: int, dim: int) -> NDArray[np.float32]:
    """Uniform unit vectors (rows, dim)."""
    x = np.random.default_rng([SEED, dim]).standard_normal((rows, dim))
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), dtype=np.float32)


def measure(entry: Entry, x: NDArray[np.float32]) -> Measure:
    """One quantizer on unit vectors (rows, dim)."""
    dim = x.shape[-1]
    e = entry.quantizer.reconstruct(x).astype(np.float64) - x
    square, along = np.sum(e * e, axis=-1), np.sum(e * x, axis=-1)
    # y = c x + sqrt(1 - c^2) z with z uniform, orthogonal to x: E_z <z, e>^2 = (|e|^2 - <x, e>^2) / (dim - 1)
    inner = COSINE**2 * along**2 + (1 - COSINE**2) * (square - along**2) / (dim - 1)
    return Measure(
        dim,
        entry.family,
        entry.width,
        entry.quantizer.name,
        float(entry.quantizer.bits),
        float(np.mean(square)),
        float(np.std(square) / math.sqrt(len(x))),
        float(dim * np.mean(inner)),
        float(1 + np.mean(along)),
    )


class Speed(NamedTuple):
    """Encoding of ``SPEED_VECTORS`` vectors of ``SPEED_DIM``, float32."""

    what: str
    arrays: str  # numpy or torch
    seconds: float  # elapsed
    cpu_seconds: float  # of all threads


def speeds() -> Iterator[tuple[str, str, Callable[[Any], Any]]]:
    """What is timed: (name, kind of arrays, encoder)."""
    coders = (
        TurboQuantMse(SPEED_DIM, 4),
        TurboQuantMse(SPEED_DIM, 4, "dense"),
        TurboQuantProd(SPEED_DIM, 4),
        TurboQuantProd(SPEED_DIM, 4, "hadamard"),
    )
    for coder in coders:
        for kind in ("numpy", "torch"):
            yield f"{coder.name}, {coder.rotation} rotation", kind, coder.encode
    for tq in TYPES.values():
        if tq.bits == 4:
            yield f"cache type {tq.name}, bit-exact", "numpy", partial(codec.encode, tq=tq)


def time_encoder(what: str, kind: str, encode: Callable[[Any], Any], vectors: int = SPEED_VECTORS) -> Speed:
    """Encodes ``vectors`` random vectors, a cache-sized piece at a time. torch runs on one thread.

    Raises ImportError where torch is wanted and missing.
    """
    x: Any = np.random.default_rng(SEED).standard_normal((vectors, SPEED_DIM), dtype=np.float32)
    step = CHUNK // SPEED_DIM
    threads = 1
    if kind == "torch":
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        x = torch.from_numpy(x)
    try:
        encode(x[:step])  # codebooks and matrices
        start, start_cpu = time.perf_counter(), time.process_time()
        for i in range(0, vectors, step):
            encode(x[i : i + step])
        return Speed(what, kind, time.perf_counter() - start, time.process_time() - start_cpu)
    finally:
        if kind == "torch":
            torch.set_num_threads(threads)


def results(measures: list[Measure], times: list[Speed]) -> Results:
    """The recorded form, as JSON has it."""
    return {
        "vectors": VECTORS,
        "seed": SEED,
        "cosine": COSINE,
        "numpy": np.__version__,
        "measures": [_rounded(m) for m in measures],
        "speed": {
            "vectors": SPEED_VECTORS,
            "dim": SPEED_DIM,
            "cpu": cpu(),
            "date": date.today().isoformat(),
            "times": [_rounded(t) for t in times],
        },
    }


def _rounded(row: Measure | Speed) -> dict[str, Any]:
    """Six digits: the seventh differs between processors, as sums are ordered otherwise."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row._asdict().items()}


def dump(data: Results) -> str:
    """JSON with one line for each row."""
    head = {k: v for k, v in data.items() if k not in ("measures", "speed")}
    speed = {k: v for k, v in data["speed"].items() if k != "times"}
    lines = ["{", *(f'  "{k}": {json.dumps(v)},' for k, v in head.items()), '  "measures": [']
    lines += [",\n".join(f"    {json.dumps(m)}" for m in data["measures"]), "  ],", '  "speed": {']
    lines += [f'    "{k}": {json.dumps(v)},' for k, v in speed.items()] + ['    "times": [']
    lines += [",\n".join(f"      {json.dumps(t)}" for t in data["speed"]["times"]), "    ]", "  }", "}"]
    return "\n".join(lines) + "\n"


def load(path: Path) -> tuple[Results, list[Measure], list[Speed]]:
    """Reads a results file; raises DistortionError for one that is missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        measures = [Measure(**m) for m in data["measures"]]
        times = [Speed(**t) for t in data["speed"]["times"]]
    except OSError as e:
        raise DistortionError(f"{path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise DistortionError(f"{path}: not a file of distortion results") from e
    return data, measures, times


# ---- the table and the plot


def table(data: Results, measures: list[Measure], times: list[Speed]) -> str:
    """Markdown of recorded results."""
    parts = [
        "# Distortion and inner-product error of every algorithm",
        f"{data['vectors']} uniform unit vectors for each figure, seed {data['seed']}. Generated by "
        "`scripts/distortion.py` from [distortion.json](distortion.json).",
        "- **D** is the squared error relative to the vector's own square. Shannon's bound is 4^-R for R bits.\n"
        f"- **Inner-product error** is dim · E⟨y, e⟩² for unit vectors y at cosine {data['cosine']:g} to x. For random "
        "y it would be D; here bias counts too.\n"
        "- **Slope** is E⟨x, x̂⟩ for unit x: 1 where inner products are unbiased.\n"
        "- **Stored bits** are bits a coordinate with every norm, scale and radius as binary16. dB is D above the "
        "bound at the stored bits.\n"
        f"- The largest standard error of D is {100 * _worst(measures, 4):.1g} % up to 4 bits of code, and "
        f"{100 * _worst(measures, 8):.1g} % up to 8.\n"
        "- Each S is drawn once, and prod's slopes differ from 1 by that draw; with orthogonal S also by the paper's "
        "weight, which is for Gaussian S (0.2 % at dimension 128).",
        "![Distortion over stored bits](distortion.png)",
    ]
    for dim in sorted({m.dim for m in measures}, reverse=True):
        rows = [m for m in measures if m.dim == dim]
        wide = [m for m in rows if _has_width(m)]
        parts.append(f"## Dimension {dim}")
        bound = ["Shannon, 4^-b", *(_figure(4.0**-b) for b in WIDTHS)]
        parts.append("D at b bits of code:\n\n" + _matrix(wide, bound, lambda m: _figure(m.distortion)))
        parts.append("Inner-product error · dim:\n\n" + _matrix(wide, bound, lambda m: _figure(m.inner)))
        parts.append("Slope:\n\n" + _matrix(wide, None, lambda m: f"{m.slope:.4f}"))
        parts.append(
            "dB above the bound at the stored bits:\n\n"
            + _matrix(wide, None, lambda m: f"{_decibels(m.distortion, m.bits):.2f}")
        )
        single = [m for m in rows if not _has_width(m)]
        body = [
            [
                m.name if m.width else m.family,
                f"{m.bits:g}",
                _figure(m.distortion),
                f"{_decibels(m.distortion, m.bits):.2f}",
                _figure(m.inner),
                f"{m.slope:.4f}",
            ]
            for m in single
        ]
        parts.append(_markdown(["others", "stored bits", "D", "dB", "inner · dim", "slope"], body))
    speed = data["speed"]
    million = speed["vectors"] / 1e6
    parts += [
        "## Throughput",
        f"Encoding {million:g} million vectors of {speed['dim']} in float32. {speed['cpu']}, {speed['date']}; torch on "
        "one thread, NumPy's matrix products on all. Elapsed time includes waiting for other work on the machine.",
        _markdown(
            ["encoder", "arrays", "elapsed s", "processor s"],
            [[t.what, t.arrays, f"{t.seconds:.1f}", f"{t.cpu_seconds:.1f}"] for t in times],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _has_width(m: Measure) -> bool:
    """Whether its D compares with 4^-width: not PolarQuant's, which stores 1 to 2 bits more, as radii and angles."""
    return 0 < m.width <= m.bits < m.width + 1


def _worst(measures: list[Measure], width: int) -> float:
    return max(m.error / m.distortion for m in measures if 0 < m.width <= width)


def _decibels(value: float, bits: float) -> float:
    """Above the bound 4^-bits."""
    return 10 * math.log10(value * 4.0**bits)


def _figure(value: float) -> str:
    """Four significant digits."""
    return f"{value:#.4g}" if value >= 1e-4 else f"{value:.3e}"


def _matrix(rows: list[Measure], first: list[str] | None, cell: Callable[[Measure], str]) -> str:
    """A line for each family, a column for each width."""
    body = [first] if first else []
    for family in dict.fromkeys(m.family for m in rows):
        found = {m.width: m for m in rows if m.family == family}
        extra = sorted({m.bits - m.width for m in found.values()})
        body.append(
            [
                f"{family} (+{' to '.join(f'{e:g}' for e in extra)})",
                *(cell(found[b]) if b in found else "" for b in WIDTHS),
            ]
        )
    return _markdown(["bits of code (and what is stored beside)", *map(str, WIDTHS)], body)


def _markdown(heads: list[str], body: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(measures: list[Measure], dim: int = DIMS[0]) -> bytes:
    """PNG: distortion and inner-product error above Shannon's bound at the stored bits, in dB."""
    from matplotlib.figure import Figure  # slow to import

    rows = [m for m in measures if m.dim == dim]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    panels[0].set(title=f"D, dimension {dim}", ylabel="dB above 4^-R, the bound for R stored bits", ylim=(0, 16))
    panels[1].set(title=f"inner-product error · dim at cosine {COSINE:g}, dimension {dim}")
    picks: tuple[Callable[[Measure], float], ...] = (lambda m: m.distortion, lambda m: m.inner)
    for axes, value in zip(panels, picks, strict=True):
        lines = dict.fromkeys(m.family for m in rows if m.width)
        for i, family in enumerate(lines):
            found = [m for m in rows if m.family == family]
            color = "black" if i % 11 == 10 else f"C{i % 11}"
            style = {"color": color, "marker": "os^vDPX*<>h"[i % 11], "ms": 4, "lw": 0.9, "label": family}
            axes.plot([m.bits for m in found], [_decibels(value(m), m.bits) for m in found], **style)
        for prefix, marker in (("cache type", "k+"), ("upstream's", "kx")):
            found = [m for m in rows if m.family.startswith(prefix)]
            label = f"{prefix} ({', '.join(m.family.split()[-1] for m in found)})"
            axes.plot([m.bits for m in found], [_decibels(value(m), m.bits) for m in found], marker, label=label)
        axes.set(xlabel="stored bits a coordinate")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80, metadata={"Software": None})
    return file.getvalue()


def render(path: Path) -> None:
    """Writes the table and the plot beside a results file, under its name with .md and .png."""
    data, measures, times = load(path)
    text, image = table(data, measures, times), plot(measures)
    scratch = path.with_suffix(".png.partial")
    scratch.write_bytes(image)
    scratch.replace(path.with_suffix(".png"))
    replace_file(path.with_suffix(".md"), text)
