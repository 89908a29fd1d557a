#!/usr/bin/env python3
"""Measure what was not built: splits by channel, codebooks a layer, types a layer, exact recent keys.

Each argument is CALIBRATION.safetensors:TEST.safetensors:MODEL.gguf, two captures of the same layers of a model, and
the model as ``ggml-tq calibrate`` wrote it. Whatever is chosen is chosen on the first capture and measured on the
second. Adds what is missing to docs/results/study-candidates.json, and writes the tables of
docs/decisions/0009-what-was-not-built.md; without arguments the tables alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ggml_tq import calibrated
from ggml_tq.cache_types import TYPES
from ggml_tq.calibrate import normalized, pairs
from ggml_tq.calibrated import Calibrated
from ggml_tq.candidates import Native, OfHeads, Split, assign, booked, loudest
from ggml_tq.capture import Capture, Floats, Layer, load_capture
from ggml_tq.eval.report import put_between, replace_file, short_name
from ggml_tq.params import DEFAULT, Params
from ggml_tq.quantizers import Recipe
from ggml_tq.reference.protocol import Quantizer
from ggml_tq.reference.trellis import Trellis
from ggml_tq.study import ExactAttention, Study, study, tiles

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "study-candidates.json"
RECORD = RESULTS.parent.parent / "decisions" / "0009-what-was-not-built.md"
WIDTHS = (2, 3, 4)
SKIP = 256  # queries of each chunk that do not count
SEEDS = (8391739247574479720, 1)  # of rotations: one is not enough to tell close candidates apart
PARTS = (4, 2)  # 1 of so many channels gets a bit more
WINDOWS = (32, 128)
Tables = dict[str, Any]


def short(x: float) -> float:
    return float(f"{x:.5g}")


def mean_kl(result: Study, name: str) -> float:
    return float(np.mean([layer.keys[name].kl for layer in result.layers]))


def mean_output(result: Study, name: str) -> float:
    return float(np.mean([layer.values[name].output for layer in result.layers]))


def prepared(capture: Capture, layer: Layer, head: int, cal: Calibrated) -> Floats:
    """A head's keys as the quantizer gets them."""
    center, scale = cal.of_head(layer, head, capture.positions)
    return (capture.k(layer.index, head) - center) * scale


def each_head(capture: Capture, layers: Iterable[int]) -> list[tuple[Layer, int]]:
    return [(capture.layers[i], head) for i in layers for head in range(capture.layers[i].n_head_kv)]


# ---- (a) splits


def trellis(dim: int, b: int, seed: int) -> Quantizer:
    """The cache type; in smaller blocks, each with a scale, where 64 does not divide ``dim``."""
    if dim % 64 == 0:
        return Native(TYPES[f"tq{b}_tcq"], Params(rotation_seed=seed))
    return Trellis(dim, b, "32x32", block=min(dim & -dim, 64), seed=seed)


def parts(dim: int) -> list[int]:
    """What can be split off in blocks of 32 at least: smaller ones spend too much on scales."""
    return [p for p in PARTS if dim // p >= 32]


def split(x: Floats, b: int, part: int, seed: int, turned: tuple[slice, slice]) -> Split:
    """The ``1/part`` loudest channels get b + 1 bits."""
    dim = x.shape[-1]
    n = dim // part
    return Split(dim, loudest(x, n, turned), trellis(n, b + 1, seed), trellis(dim - n, b, seed + 1))


def splits(calibration: Capture, test: Capture, layers: Sequence[int], cal: Calibrated, jobs: int) -> Tables:
    """Means over SEEDS: KL of keys with and without scales, output error of values."""
    heads = each_head(calibration, layers)
    nothing = (slice(0, 0), slice(0, 0))
    out: Tables = {"scaled": {}, "unscaled": {}, "values": {}}
    for what, by in (("scaled", cal), ("unscaled", cal.without_scales())):
        keys: list[Recipe] = []
        for seed in SEEDS:
            for b in WIDTHS:
                plain: dict[tuple[int, int], Quantizer] = {
                    (la.index, h): trellis(la.head_dim_k, b, seed) for la, h in heads
                }
                keys.append(OfHeads(f"plain {b} {seed}", "cal", plain))
            for b in (2, 3):
                for part in parts(heads[0][0].head_dim_k):
                    own: dict[tuple[int, int], Quantizer] = {
                        (la.index, h): split(prepared(calibration, la, h, by), b, part, seed, pairs(la))
                        for la, h in heads
                    }
                    keys.append(OfHeads(f"split {b}+1/{part} {seed}", "cal", own))
        values: list[Recipe] = []
        for key in keys:
            label, b_part, seed_text = key.quantizer.split()
            seed, b = int(seed_text), int(b_part[0])
            of_values: dict[tuple[int, int], Quantizer] = {
                (la.index, h): trellis(la.head_dim_v, b, seed)
                if label == "plain"
                else split(calibration.v(la.index, h), b, int(b_part[-1]), seed, nothing)
                for la, h in heads
            }
            values.append(OfHeads(key.quantizer, "none", of_values))
        exact = [Recipe("exact")] * len(keys)
        found = study(
            test,
            list(zip(keys, values if what == "scaled" else exact, strict=True)),
            layers,
            SKIP,
            jobs=jobs,
            calibrated=by,
        )
        for name in dict.fromkeys(k.quantizer.rsplit(" ", 1)[0] for k in keys):
            out[what][name] = short(float(np.mean([mean_kl(found, f"{name} {s}+cal") for s in SEEDS])))
            if what == "scaled":
                out["values"][name] = short(float(np.mean([mean_output(found, f"{name} {s}") for s in SEEDS])))
        if what == "scaled":
            some = {k.quantizer.rsplit(" ", 1)[0]: k for k in keys}
            dim = heads[0][0].head_dim_k
            out["bits"] = {name: k.build("key", dim).bits for name, k in some.items()}
    return out


def graded(x: Floats, seed: int, turned: tuple[slice, slice]) -> dict[str, Split]:
    """tq3_tcq's bytes given out by channel: louder half 4 bits, the others 2; or by quarters 4, 3, 3, 2."""
    dim = x.shape[-1]
    found = {
        "4/2": Split(dim, loudest(x, dim // 2, turned), trellis(dim // 2, 4, seed), trellis(dim // 2, 2, seed + 1))
    }
    if 4 in parts(dim):
        n = dim // 4
        top = loudest(x, n, turned)
        others = [c for c in range(dim) if c not in top]
        middle = [others.index(c) for c in loudest(x, 3 * n, turned) if c in others]
        rest = Split(dim - n, tuple(middle), trellis(2 * n, 3, seed), trellis(n, 2, seed + 1))
        found["4/3/3/2"] = Split(dim, top, trellis(n, 4, seed + 2), rest)
    return found


def grades(calibration: Capture, test: Capture, layers: Sequence[int], cal: Calibrated, jobs: int) -> Tables:
    """Means over SEEDS of the KL of keys."""
    heads = each_head(calibration, layers)
    out: Tables = {}
    for what, by in (("scaled", cal), ("unscaled", cal.without_scales())):
        own: dict[str, dict[tuple[int, int], Quantizer]] = {}
        for seed in SEEDS:
            for la, h in heads:
                for name, one in graded(prepared(calibration, la, h, by), seed, pairs(la)).items():
                    own.setdefault(f"{name} {seed}", {})[la.index, h] = one
        every: list[tuple[Recipe, Recipe]] = [(OfHeads(n, "cal", q), Recipe("exact")) for n, q in own.items()]
        found = study(test, every, layers, SKIP, jobs=jobs, calibrated=by)
        names = dict.fromkeys(n.rsplit(" ", 1)[0] for n in own)
        out[what] = {n: short(float(np.mean([mean_kl(found, f"{n} {s}+cal") for s in SEEDS]))) for n in names}
    return out


# ---- (b) codebooks


def books(calibration: Capture, test: Capture, layers: Sequence[int], cal: Calibrated, jobs: int) -> Tables:
    signs = DEFAULT.rotation_signs
    every: list[tuple[Recipe, Recipe]] = []
    for b in WIDTHS:
        tq = TYPES[f"tq{b}_mse"]
        keys, values = {}, {}
        for i in layers:
            heads = [h for _, h in each_head(calibration, [i])]
            layer = calibration.layers[i]
            of_keys = booked(
                tq, np.concatenate([normalized(prepared(calibration, layer, h, cal), signs) for h in heads])
            )
            of_values = booked(tq, normalized(calibration.v(i), signs))
            for h in heads:
                keys[i, h], values[i, h] = of_keys, of_values
        every.append((Recipe(tq.name, "cal"), Recipe(tq.name)))
        every.append((OfHeads(f"booked {b}", "cal", keys), OfHeads(f"booked {b}", "none", values)))
    found = study(test, every, layers, SKIP, jobs=jobs, calibrated=cal)
    return {
        what: {str(b): [short(figure(found, name + plus)) for name in (f"tq{b}_mse", f"booked {b}")] for b in WIDTHS}
        for what, figure, plus in (("keys", mean_kl, "+cal"), ("values", mean_output, ""))
    }


# ---- (c) types a layer


def grid(capture: Capture, cal: Calibrated, jobs: int) -> Study:
    heads = [(la.index, h) for la, h in each_head(capture, capture.layers)]
    own = {b: dict.fromkeys(heads, Native(TYPES[f"tq{b}_tcq"])) for b in WIDTHS}
    every: list[tuple[Recipe, Recipe]] = [
        (OfHeads(f"tq{k}_tcq", "cal", own[k]), OfHeads(f"tq{v}_tcq", "none", own[v])) for k in WIDTHS for v in WIDTHS
    ]
    return study(capture, every, skip=SKIP, jobs=jobs, calibrated=cal)


def costs(result: Study, figure: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(layers, widths): of keys their KL or output error, of values their output error."""
    names = [f"tq{b}_tcq" for b in WIDTHS]
    return np.array(
        [
            [layer.values[n].output if figure == "values" else getattr(layer.keys[n + "+cal"], figure) for n in names]
            for layer in result.layers
        ]
    )


def assigned(of_calibration: Study, of_test: Study) -> Tables:
    """Mean cost of the test at equal mean bits: spread blindly, as calibration says, and as the test itself would."""
    out: Tables = {}
    for figure in ("kl", "values"):
        known, truth = costs(of_calibration, figure), costs(of_test, figure)
        n = np.arange(len(truth))
        rows = {}
        for mean in (2.5, 3.0, 3.5):
            total = round(mean * len(truth))
            low = int(total // len(truth))
            part = total / len(truth) - low  # of the layers at low + 1, whichever they are
            blind = truth.mean(axis=0)
            blindly = (1 - part) * blind[low - 2] + (part * blind[low - 1] if part else 0)
            rows[str(mean)] = [
                short(blindly),
                *(short(float(truth[n, assign(c, WIDTHS, total) - 2].mean())) for c in (known, truth)),
            ]
        out[figure] = rows
    # keys and values of all layers from one purse, in the coin of the attention output
    known, truth = (np.concatenate([costs(s, "output"), costs(s, "values")]) for s in (of_calibration, of_test))
    layers = len(truth) // 2
    both = {}
    for mean in (2.5, 3.0, 3.5):
        row = []
        for c in (known, truth):
            widths = assign(c, WIDTHS, round(mean * 2 * layers))
            row.append(output_of(of_test, widths[:layers].tolist(), widths[layers:].tolist()))
        both[str(mean)] = row
    out["both"] = both
    out["uniform"] = {f"{k}/{v}": output_of(of_test, [k] * layers, [v] * layers) for k in WIDTHS for v in WIDTHS}
    return out


def output_of(result: Study, keys: Sequence[int], values: Iterable[int]) -> float:
    found = [
        layer.outputs[f"tq{k}_tcq+cal / tq{v}_tcq"] for layer, k, v in zip(result.layers, keys, values, strict=True)
    ]
    return short(float(np.mean(found)))


# ---- exact recent keys


def window_kl(capture: Capture, layers: Sequence[int], cal: Calibrated) -> dict[str, float]:
    """KL of tq3_tcq with the last n keys exact, each query's own among them; 0: none."""
    quantizer = Native(TYPES["tq3_tcq"])
    means: dict[int, list[float]] = {n: [] for n in (0, *WINDOWS)}
    for layer, head in each_head(capture, layers):
        _, scale = cal.of_head(layer, head, capture.positions)
        x = prepared(capture, layer, head, cal)
        dk = (quantizer.reconstruct(x) - x) / scale
        k, v, sinks = capture.k(layer.index, head), capture.v(layer.index, head), capture.sinks(layer.index)
        for q_head in range(head * layer.group, (head + 1) * layer.group):
            q = capture.q(layer.index, q_head)
            kls: dict[int, list[Floats]] = {n: [] for n in means}
            for chunk in capture.chunks():
                for tile in tiles(chunk, SKIP, layer.window):
                    exact = ExactAttention(layer, q, k, v, tile, None if sinks is None else float(sinks[q_head]))
                    e = exact.logit_error(dk)
                    i = np.arange(tile.queries.start, tile.queries.stop)[:, None]
                    recent = i - np.arange(tile.keys.start, tile.keys.stop)
                    for n in means:
                        kls[n].append(exact.perturb(np.where(recent < n, np.float32(0), e))[0].astype(np.float32))
            for n in means:
                means[n].append(float(np.mean(np.concatenate(kls[n]))))
    return {str(n): short(float(np.mean(x))) for n, x in means.items()}


# ---- all of it


def measure(text: str, done: list[Tables], jobs: int) -> Iterator[str]:
    """Put what is missing of one model into ``done``, a section at a time."""
    paths = [Path(p) for p in text.split(":")]
    cal = calibrated.load(paths[2])
    with load_capture(paths[0]) as calibration, load_capture(paths[1]) as test:
        every = list(test.layers)
        layers = every if len(every) <= 10 else every[::3]
        head: Tables = {
            "model": test.metadata.get("model", paths[1].name),
            "model_sha256": test.metadata.get("model_sha256"),
            "calibration": calibration.metadata.get("text"),
            "test": test.metadata.get("text"),
            "tokens": [len(calibration.positions), len(test.positions)],
            "layers": layers,
            "all_layers": every,
            "head_dim": test.layers[every[0]].head_dim_k,
        }
        out = next((m for m in done if m["model"] == head["model"]), head)
        if out is head:
            done.append(out)
        sections: dict[str, Callable[[], Tables]] = {
            "window": lambda: window_kl(test, layers, cal),
            "books": lambda: books(calibration, test, layers, cal, jobs),
            "grades": lambda: grades(calibration, test, layers, cal, jobs),
            "splits": lambda: splits(calibration, test, layers, cal, jobs),
            "assigned": lambda: assigned(grid(calibration, cal, jobs), grid(test, cal, jobs)),
        }
        for name, section in sections.items():
            if name not in out:
                out[name] = section()
                yield f"{head['model']}: {name}"


# ---- pages


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    cells = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def compared(own: float, other: float) -> str:
    return f"{own:.3g} / {other:.3g} ({own / other:.2f})"


def pages(models: Sequence[Tables]) -> dict[str, str]:
    """The record's tables, by their mark; models of which a section is missing are left out."""
    models = [m for m in models if all(name in m for name in ("window", "books", "grades", "splits", "assigned"))]
    names = [f"{short_name(m['model'])} ({m['head_dim']})" for m in models]

    def against_plain(m: Tables, what: str, own: float, bits: float) -> str:
        """A figure, and that of plain types a layer at the same mean bits, whichever layers have the larger one."""
        plain = [m["splits"][what][f"plain {b}"] for b in WIDTHS]
        return compared(own, float(np.interp(bits, [b + 0.25 for b in WIDTHS], plain)))

    rows: list[list[object]] = []
    for what, label in (("scaled", "K"), ("unscaled", "K, no scales"), ("values", "V")):
        for b in (2, 3):
            for part in PARTS:
                name = f"split {b}+1/{part}"
                cells = [
                    against_plain(m, what, m["splits"][what][name], m["splits"]["bits"][name])
                    if name in m["splits"][what]
                    else "-"
                    for m in models
                ]
                rows.append([f"{label}, {b} bits, 1/{part} of channels {b + 1}", *cells])
    marks = {"splits": table(["split / plain", *names], rows)}

    rows = []
    for what, label in (("scaled", "K"), ("unscaled", "K, no scales")):
        for name in ("4/2", "4/3/3/2"):
            cells = []
            for m in models:
                dim = m["head_dim"]
                own = graded(np.ones((1, dim), dtype=np.float32), SEEDS[0], (slice(0, 0), slice(0, 0)))
                found = m["grades"][what].get(name)
                cells.append("-" if found is None else against_plain(m, what, found, own[name].bits))
            rows.append([f"{label}, {name} bits", *cells])
    marks["grades"] = table(["by channel / plain", *names], rows)

    rows = []
    for what, label in (("keys", "K"), ("values", "V")):
        for b in WIDTHS:
            pair = [m["books"][what][str(b)] for m in models]
            rows.append([f"{label}, tq{b}_mse", *(compared(own, built) for built, own in pair)])
    marks["books"] = table(["own / built-in", *names], rows)

    rows = []
    for figure, label in (("kl", "K"), ("values", "V")):
        for mean in ("2.5", "3.0", "3.5"):
            three = [m["assigned"][figure][mean] for m in models]
            rows.append(
                [
                    f"{label}, mean {float(mean) + 0.25:g} bits",
                    *(compared(a, u) for u, a, _ in three),
                ]
            )
    for total, keys, values in ((2.5, 3, 2), (3.0, 3, 3), (3.5, 4, 3)):
        row: list[object] = [f"K+V, mean {total + 0.25:g} bits; tq{keys}/tq{values}"]
        for m in models:
            own, uniform = m["assigned"]["both"][str(total)][0], m["assigned"]["uniform"][f"{keys}/{values}"]
            row.append(compared(own, uniform))
        rows.append(row)
    marks["assigned"] = table(["a layer / alike", *names], rows)

    window = [m["window"] for m in models]
    marks["window"] = table(
        ["exact", *names],
        [
            ["none", *(w["0"] for w in window)],
            *([f"last {n}", *(f"{w[str(n)]:.3g} ({w[str(n)] / w['0']:.2f})" for w in window)] for n in WINDOWS),
        ],
    )
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="CALIBRATION:TEST:MODEL.gguf")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.models:
        found: list[Tables] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        for text in args.models:
            for what in measure(text, found, args.jobs):
                print(what, flush=True)
                replace_file(RESULTS, json.dumps(found, indent=1) + "\n")
    for name, content in pages(json.loads(RESULTS.read_text())).items():
        put_between(RECORD, name, content + "\n")


if __name__ == "__main__":
    main()
