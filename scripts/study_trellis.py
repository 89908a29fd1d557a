#!/usr/bin/env python3
"""Compare trellis codes with scalar ones on captured keys and values: docs/results/study-trellis.json and .md.

Each argument is a file of ``ggml-tq capture``. Only rows at equal bytes are compared: blocks of 64 coordinates with one
binary16 scale, 2.25, 3.25 and 4.25 bits; upstream's types stand beside them. ``--render`` makes the page from the
recorded figures.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ggml_tq.capture import load_capture
from ggml_tq.quantizers import Center, Recipe
from ggml_tq.study import Study, study
from ggml_tq.study_report import rows, title

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "study-trellis.json"
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
LONGER = "trellis 32x32, search, block 128"  # where the head dim has room for it: 0.125 bits less
UPSTREAM = ("q4_0", "q4_0-norot", "q8_0")


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
                **{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(row).items()},
            }
            for (label, width), center, row in zip(labels, centers, rows(result), strict=True)
        ],
    }


# ---- the page


def _by(rows_: list[dict[str, Any]], **want: object) -> dict[str, Any] | None:
    return next((r for r in rows_ if all(r[k] == v for k, v in want.items())), None)


def _cell(row: dict[str, Any] | None, key: str) -> str:
    return "-" if row is None else f"{row[key]:.3g}"


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
    lines += ["", "“other scale”: least squares for keys, unbiased for values."]
    ratios = [
        [_by(m["rows"], label=label, width=b, center="rope") for b in WIDTHS]
        for m in models
        for label in ("Lloyd-Max, unbiased", "trellis 32x32, search")
    ]
    gains = [
        [new["kl"] / old["kl"] - 1 for old, new in zip(ratios[i], ratios[i + 1], strict=True) if old and new]
        for i in range(0, len(ratios), 2)
    ]
    texts = (f"{name}: " + ", ".join(f"{g:+.0%}" for g in gain) for name, gain in zip(names, gains, strict=True))
    lines += ["", f"KL of trellis 32x32 with search against Lloyd-Max, unbiased, at {WIDTHS} bits: " + "; ".join(texts)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captures", nargs="*", type=Path, metavar="KV.safetensors")
    parser.add_argument("--skip", type=int, default=1536, help="queries of each chunk that do not count")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.render:
        if not args.captures:
            parser.error("no capture")
        data = {
            "command": "`scripts/study_trellis.py`",
            "numpy": np.__version__,
            "models": [measured(path, args.skip, args.jobs) for path in args.captures],
        }
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
