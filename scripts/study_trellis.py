#!/usr/bin/env python3
"""Compare trellis codes with scalar ones on captured keys and values.

Each argument is a file of ``ggml-tq capture``. Writes docs/results/study-trellis.json, .md, and the table of
docs/decisions/0005-trellis-codes.md; ``--seeds`` adds further rotations to recorded figures, ``--render`` makes both
pages from them. Rows of one width have equal bytes: blocks of 64 coordinates with a binary16 scale; upstream's types
stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ggml_tq.capture import load_capture
from ggml_tq.eval.report import put_between
from ggml_tq.quantizers import Center, Recipe
from ggml_tq.reference.trellis import TABLES, table
from ggml_tq.reference.trellis_training import fit, sphere
from ggml_tq.study import Study, study
from ggml_tq.study_report import rows, title

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "study-trellis.json"
RECORD = RESULTS.parent.parent / "decisions" / "0005-trellis-codes.md"
WIDTHS = (2, 3, 4)
CENTERS: tuple[Center, ...] = ("none", "mean", "rope")
SMALL = {2: "8x8", 3: "16x8", 4: "32x8"}  # Ungerboeck's labels, the least levels
PLAIN = {2: "64x16", 3: "64x8", 4: "64x4"}  # the label is the register

# Label, then the quantizer of keys and of values; {b} is the width.
CODES = {
    "Lloyd-Max (`tq{b}_mse`)": ("tq{b}_mse", "tq{b}_mse"),
    "QJL (`tq{b}_qjl`)": ("tq{b}_qjl", "tq{b}_qjl"),
    "Lloyd-Max, unbiased": ("Trellis(b={b},code=scalar,search=1)", "Trellis(b={b},code=scalar,search=1)"),
    "Lloyd-Max, search": (
        "Trellis(b={b},code=scalar,search=5)",
        "Trellis(b={b},code=scalar,search=5,scale=biased)",
    ),
    "trellis {small}, search": (
        "Trellis(b={b},code={small},search=5)",
        "Trellis(b={b},code={small},search=5,scale=biased)",
    ),
    "trellis {plain}": (
        "Trellis(b={b},code={plain},search=1)",
        "Trellis(b={b},code={plain},search=1,scale=biased)",
    ),
    "trellis {plain}, search": (
        "Trellis(b={b},code={plain},search=5)",
        "Trellis(b={b},code={plain},search=5,scale=biased)",
    ),
    "trellis 32x32": ("Trellis(b={b},code=32x32,search=1)", "Trellis(b={b},code=32x32,search=1,scale=biased)"),
    "trellis 32x32, search": (
        "Trellis(b={b},code=32x32,search=5)",
        "Trellis(b={b},code=32x32,search=5,scale=biased)",
    ),
    "trellis 32x32, search, other scale": (
        "Trellis(b={b},code=32x32,search=5,scale=biased)",
        "Trellis(b={b},code=32x32,search=5,scale=unbiased)",
    ),
    "trellis 64x32, search": (
        "Trellis(b={b},code=64x32,search=5)",
        "Trellis(b={b},code=64x32,search=5,scale=biased)",
    ),
}
EVERY_CENTER = ("QJL (`tq{b}_qjl`)", "Lloyd-Max, unbiased", "trellis 32x32, search")
RANKED = [label for label, (key, _) in CODES.items() if key.startswith("Trellis") and "scale" not in key]
SEEDS = (1, 2, 3)  # of rotations beside the default one
LONGER = "trellis 32x32, search, block 128"  # where the head dim has room for it: 0.125 bits less
UPSTREAM = ("q4_0", "q4_0-norot", "q8_0")


def _short(x: object) -> object:
    if isinstance(x, float):
        return float(f"{x:.5g}") if np.isfinite(x) else None  # as JSON has it
    return x


def _filled(text: str, b: int) -> str:
    return text.format(b=b, small=SMALL[b], plain=PLAIN[b])


def recipes(dim: int) -> dict[tuple[Recipe, Recipe], tuple[str, int]]:
    """(keys, values) to be studied, with a label and a width (upstream's: 0)."""
    found: dict[tuple[Recipe, Recipe], tuple[str, int]] = {}
    for center in CENTERS:
        for name in UPSTREAM if center == "none" else UPSTREAM[:1]:
            found[Recipe(name, center), Recipe(name)] = (name, 0)
    for b in WIDTHS:
        for label, (key, value) in CODES.items():
            for center in CENTERS if label in EVERY_CENTER else ("rope",):
                found[Recipe(_filled(key, b), center), Recipe(_filled(value, b))] = (_filled(label, b), b)
        if dim % 128 == 0:
            key = f"Trellis(b={b},code=32x32,search=5,block=128)"
            value = f"Trellis(b={b},code=32x32,search=5,block=128,scale=biased)"
            found[Recipe(key, "rope"), Recipe(value)] = (LONGER, b)
    return found


def reseeded() -> dict[tuple[Recipe, Recipe], tuple[str, int]]:
    """Keys under further rotations: one rotation's figures are as wide apart as two good codes."""
    found = {}
    for b in WIDTHS:
        for label in RANKED:
            for seed in SEEDS:
                key = _filled(CODES[label][0], b).replace(")", f",seed={seed})")
                found[Recipe(key, "rope"), Recipe("f16")] = (_filled(label, b), b)
    return found


def add_seeds(model: dict[str, Any], path: Path, skip: int, jobs: int) -> None:
    """Put each code's KL under every rotation, the default one first, into its row "seeds"."""
    every = reseeded()
    with load_capture(path) as capture:
        progress = lambda n, total: print(path.name, n, total, flush=True)  # noqa: E731
        found = rows(study(capture, list(every), skip=skip, jobs=jobs, progress=progress))
    for (label, width), row in zip(every.values(), found, strict=True):
        recorded = _by(model["rows"], label=label, width=width, center="rope")
        assert recorded is not None
        recorded.setdefault("seeds", [recorded["kl"]]).append(float(f"{row.kl:.5g}"))


def measured(path: Path, skip: int, jobs: int) -> dict[str, Any]:
    """One capture's figures, of queries from position ``skip`` of each chunk on."""
    with load_capture(path) as capture:
        dim = next(iter(capture.layers.values())).head_dim_k
        every = recipes(dim)
        result: Study = study(
            capture, list(every), skip=skip, jobs=jobs, progress=lambda n, total: print(path.name, n, total, flush=True)
        )
    labels = list(every.values())
    centers = [key.center for key, _ in every]
    return {
        "title": title(result),
        "model": result.metadata.get("model", path.name),
        "head_dim": dim,
        "rows": [
            {
                "label": label,
                "width": width,
                "center": center,
                **{k: _short(v) for k, v in asdict(row).items()},
            }
            for (label, width), center, row in zip(labels, centers, rows(result), strict=True)
        ],
    }


# ---- the page


def _by(rows_: list[dict[str, Any]], **want: object) -> dict[str, Any] | None:
    return next((r for r in rows_ if all(r[k] == v for k, v in want.items())), None)


def _cell(row: dict[str, Any] | None, key: str) -> str:
    if row is None:
        return "-"
    return "n/a" if row[key] is None else f"{row[key]:.3g}"


def _spread(x: list[float]) -> str:
    return f"{np.mean(x):.3g} ± {np.std(x, ddof=1):.1g}"


def page(data: dict[str, Any]) -> str:
    """Markdown tables of the recorded figures."""
    models = data["models"]
    names = [m["model"] for m in models]
    lines = ["# Trellis codes and scalar ones on real keys and values", ""]
    lines += [f"- {m['title']}" for m in models]
    lines += [
        "",
        "Keys: KL divergence of the attention distribution in nats, mean (and of the worst head). Values: squared",
        "error of the attention output, relative. All rows of a width have the same bytes (blocks of 64, a binary16",
        f"scale), but for block 128. `ggml_tq.study` defines the figures; {data['command']} wrote this page.",
    ]
    for center, what in (
        ("rope", "Keys without their mean before RoPE"),
        ("mean", "Keys without their mean after RoPE"),
        ("none", "Keys as they are"),
    ):
        lines += ["", f"## {what}", "", "| bits | keys | " + " | ".join(names) + " |"]
        lines += ["|--:|---|" + "--:|" * len(names)]
        for width in (0, *WIDTHS):
            for label in dict.fromkeys(r["label"] for m in models for r in m["rows"] if r["width"] == width):
                found = [_by(m["rows"], label=label, width=width, center=center) for m in models]
                if any(found):
                    bits = next(r["key_bits"] for r in found if r)
                    cells = ["-" if r is None else f"{_cell(r, 'kl')} ({_cell(r, 'kl_max')})" for r in found]
                    lines.append(f"| {bits:g} | {label} | " + " | ".join(cells) + " |")
    lines += ["", "## Values", "", "| bits | values | " + " | ".join(names) + " |", "|--:|---|" + "--:|" * len(names)]
    for width in (0, *WIDTHS):
        for label in dict.fromkeys(r["label"] for m in models for r in m["rows"] if r["width"] == width):
            found = [
                _by(m["rows"], label=label, width=width, center="rope") or _by(m["rows"], label=label, width=width)
                for m in models
            ]
            if any(found):
                bits = next(r["value_bits"] for r in found if r)
                lines.append(f"| {bits:g} | {label} | " + " | ".join(_cell(r, "output_value") for r in found) + " |")
    lines += [
        "",
        "“other scale”: least squares for keys, unbiased for values. n/a: so far off that all of a distribution's",
        "weight moved to keys whose exact probability is 0 in binary32, for which the bench has no figure.",
        "",
        "## Four rotations",
        "",
        "KL of keys without their mean before RoPE under four rotations: mean, and the standard deviation of one.",
        "",
        "| bits | keys | " + " | ".join(names) + " |",
        "|--:|---|" + "--:|" * len(names),
    ]
    for width in WIDTHS:
        for label in RANKED:
            found = [_by(m["rows"], label=_filled(label, width), width=width, center="rope") for m in models]
            cells = [_spread(r["seeds"]) if r and "seeds" in r else "-" for r in found]
            lines.append(f"| {width + 0.25:g} | {_filled(label, width)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(data: dict[str, Any]) -> str:
    """One table for the decision record: keys centred before RoPE, and values."""
    models = data["models"]
    heads = [f"{what}, {m['model'].split('-Instruct')[0].split('-instruct')[0]}" for what in "KV" for m in models]
    lines = ["| bits | code | " + " | ".join(heads) + " |", "|--:|---|" + "--:|" * len(heads)]
    for width in (0, *WIDTHS):
        for label in dict.fromkeys(r["label"] for m in models for r in m["rows"] if r["width"] == width):
            found = [_by(m["rows"], label=label, width=width, center="rope" if width else "none") for m in models]
            if label != LONGER:
                bits = next(r["key_bits"] for r in found if r)
                keys = [_spread(r["seeds"]) if r and "seeds" in r else _cell(r, "kl") for r in found]
                cells = [*keys, *(_cell(r, "output_value") for r in found)]
                lines.append(f"| {bits:g} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gaussian() -> str:
    """Rows of the record's first table, from the trained tables and, for scalar codes, measured here."""
    recorded = json.loads(resources.files("ggml_tq.reference").joinpath(TABLES).read_text())["tables"]
    u = sphere(32768, 64, 1999).astype(np.float32)  # what the trainer measures on
    scalar = {b: table("scalar", b, 64) for b in WIDTHS}
    errors = [[fit(u, t.graph, t.values().reshape(-1), n).distortion for t in scalar.values()] for n in (1, 5)]
    lines = ["| code | 2 bits | 3 bits | 4 bits | 2, search | 3, search | 4, search |", "|---|" + "--:|" * 6]
    lines += ["| Lloyd-Max | " + " | ".join(f"{x:.4f}" for row in errors for x in row) + " |"]
    for code in dict.fromkeys(name.partition("-")[0] for name in recorded):
        found = [recorded.get(f"{code}-{b}b") for b in WIDTHS]
        cells = [f"{t['distortion'][k]:.4f}" if t else "" for k in ("plain", "search5") for t in found]
        lines.append(f"| {code} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captures", nargs="*", type=Path, metavar="KV.safetensors")
    parser.add_argument("--skip", type=int, default=1536, help="queries of each chunk that do not count")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--seeds", action="store_true", help="measure only more rotations")
    args = parser.parse_args()
    if not args.render and not args.captures:
        parser.error("no capture")
    if args.seeds:
        data = json.loads(RESULTS.read_text())
        for model, path in zip(data["models"], args.captures, strict=True):
            add_seeds(model, path, args.skip, args.jobs)
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    elif not args.render:
        data = {
            "command": "`scripts/study_trellis.py`",
            "numpy": np.__version__,
            "models": [measured(path, args.skip, args.jobs) for path in args.captures],
        }
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    data = json.loads(RESULTS.read_text())
    RESULTS.with_suffix(".md").write_text(page(data))
    put_between(RECORD, "gaussian", gaussian() + "\n")
    put_between(RECORD, "study", summary(data) + "\n")


if __name__ == "__main__":
    main()
