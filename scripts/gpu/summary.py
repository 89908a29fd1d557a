#!/usr/bin/env python3
"""Tables of what scripts/gpu/run.sh left in FOLDER: attention alone, stored tokens, CPU against GPU, a model's speed.

summary.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "python"))

from ggml_tq.eval import bench
from ggml_tq.eval.runs import Json


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [[str(x) for x in row] for row in rows]
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])


def read(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pair(row: Json) -> str:
    same = row["type_k"] == row["type_v"]
    return (row["type_k"] if same else f"{row['type_k']}/{row['type_v']}") + (", centered" if row["centered"] else "")


def kernels(rows: list[Json], shape: tuple[str, ...]) -> str:
    """Microseconds of an op, times the speed of f16 where the shape is the same, and bytes a second to a copy's."""
    found = [row for row in rows if "us" in row]
    f16 = {tuple(row[k] for k in shape): row["us"] for row in found if pair(row) == "f16"}
    lines = []
    for row in found:
        of = f16.get(tuple(row[k] for k in shape))
        ratio = f"{of / row['us']:.2f}" if of else "-"
        lines.append((*(row[k] for k in shape), pair(row), row["us"], ratio, row.get("of_copy", "-")))
    return table((*shape, "K / V", "us", "of f16's speed", "of a copy"), lines)


def parities(rows: list[Json]) -> str:
    names = ("batched", "decode", "from_f16")
    lines = ((r["pair"], *(r[n][0] if r[n] else "-" for n in names)) for r in rows)
    return table(("K / V", "GPU from CPU", "one at a time", "from f16"), lines)


def speeds(rounds: list[bench.Round]) -> str:
    """Tokens a second, median of rounds, and the median of ratios to f16 within rounds."""
    lines = []
    for depth in sorted({r.depth for r in rounds}):
        there = [{str(run.pair): run.speeds for run in r.runs} for r in rounds if r.depth == depth]
        for name in there[0]:
            for test in there[0][name]:
                speed = median(r[name][test] for r in there)
                ratio = median(r[name][test] / r[str(bench.F16)][test] for r in there)
                lines.append((depth, name, test, f"{speed:.1f}", f"{ratio:.2f}"))
    return table(("depth", "K / V", "test", "tokens/s", "of f16's"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    shape = ("n_head", "head_dim", "n_kv", "n_q", "n_stream")
    print("Attention\n\n" + kernels(read(folder / "attention.jsonl"), shape))
    print("\nStored keys and values\n\n" + kernels(read(folder / "set-rows.jsonl"), ("head_dim", "n_tokens")))
    print("\nLogits\n\n" + parities(read(folder / "parity.jsonl")))
    for path in sorted(folder.glob("speed*.jsonl")):
        rounds = bench.store(path).read()[0]
        print(f"\nSpeed: {rounds[0].settings.model}, {rounds[0].settings.gpu}\n\n" + speeds(rounds))


if __name__ == "__main__":
    main()
