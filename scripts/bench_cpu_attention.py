#!/usr/bin/env python3
"""Attention alone on the CPU, in f16's speed: runs bench-cpu-attention over a matrix of shapes, types and tiles.

    scripts/bench_cpu_attention.py             # measures, and writes docs/results/cpu-attention.{jsonl,md}
    scripts/bench_cpu_attention.py --quick --append --build DIR --build-name NAME --tiles NAMES  # others beside
    scripts/bench_cpu_attention.py --report    # the table only

The program is not in `make build`: cmake --build build --target bench-cpu-attention
Types of one shape are run in turn within one process; a ratio is the median over its rounds. Two threads wait asleep
(OMP_WAIT_POLICY=passive), or else on a busy machine an op takes as long as a turn of the scheduler.
"""

import argparse
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = ["tq4_tcq", "tq3_tcq", "tq2_tcq", "tq4_mse", "tq3_mse", "tq4_qjl"]
UPSTREAM = ["q8_0", "q4_0"]
Record = dict[str, Any]


def shapes(quick: bool) -> list[list[str]]:
    """Arguments of the program: one token behind caches of several depths, and batches of 512 behind 8192 cells."""
    result: list[list[Any]] = []
    for d, group, cells, threads, center in itertools.product(
        (64, 128, 256), (4, 8), (1024, 8192, 32768), (1, 2), (False, True)
    ):
        if (threads == 2 and cells != 8192) or (quick and (group, cells, threads) != (4, 8192, 1)):
            continue
        types = ["f16", *UPSTREAM, *OURS] if cells == 8192 and not center else ["f16", *OURS]
        result.append(["-d", d, "-g", group, "-c", cells, "-t", threads, "-r", 7, *["--center"] * center, *types])
    for d, center in itertools.product((64, 128, 256), (False, True)):
        result.append(
            ["-d", d, "-g", 4, "-c", 8192 + 512, "-q", 512, "-t", 1, "-r", 3, *["--center"] * center, "f16", *OURS]
        )
    return [[str(a) for a in args] for args in result]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def measure(program: Path, build: str, tiles: list[str], quick: bool, append: bool, out: Path) -> None:
    """Records replace those of out, or are added to them, when all are there."""
    about = {"build": build, "cpu": cpu_name()}
    new = out.with_suffix(".new")
    new.write_text(out.read_text(encoding="utf-8") if append and out.exists() else "", encoding="utf-8")
    with new.open("a", encoding="utf-8") as file:
        for args in shapes(quick):
            for name in tiles:
                load = round(os.getloadavg()[0], 1)
                command = [str(program), "--json", "--tiles", name, *args]
                env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
                result = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
                for line in result.stdout.splitlines():
                    file.write(json.dumps({**about, "load": load, **json.loads(line)}) + "\n")
                file.flush()
            print(" ".join(args), flush=True)
    new.replace(out)


def table(records: list[Record]) -> str:
    """Rows: shapes; columns: types. f16 in microseconds, the others in its speed."""
    keys = ("build", "tiles", "queries", "cells", "head_dim", "group", "centered", "threads")
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        rows.setdefault(tuple(r[k] for k in keys), {})[r["type"]] = r
    lines = []
    section = None
    for key in sorted(rows, key=lambda k: (k[0], k[1], k[2], k[6], k[4], k[5], k[3], k[7])):
        build, tiles, queries, cells, head_dim, group, centered, threads = key
        if section != (build, tiles, queries, centered):
            section = (build, tiles, queries, centered)
            what = "one query" if queries == 1 else f"{queries} queries"
            lines += ["", f"## {build}, {tiles} tiles, {what}{', centered keys' if centered else ''}", ""]
            columns = ["head dim", "heads a key head", "cells", "threads", "f16, µs", *UPSTREAM, *OURS]
            lines += ["| " + " | ".join(columns) + " |", "|--:" * len(columns) + "|"]
        row = rows[key]
        speeds = " | ".join(f"{row[t]['speed']:.2f}" if t in row else "" for t in UPSTREAM + OURS)
        lines.append(f"| {head_dim} | {group} | {cells} | {threads} | {row['f16']['us']:.0f} | {speeds} |")
    return "\n".join(lines)


def report(path: Path) -> None:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    loads = sorted({r["load"] for r in records})
    cpus = ", ".join(sorted({r["cpu"] for r in records}))
    text = f"""# Attention alone on the CPU

Time of one FLASH_ATTN_EXT over 8 key heads; f16 in microseconds, other types in its speed (more is faster). Types of
a row were run in turn in one process; shown are medians of ratios within rounds. Centered keys: of our types, f16's are
not. Tiles are the library's implementations, chosen by name; upstream's types are as the build has them.

{cpus}, {os.cpu_count()} cores; load averages {loads[0]} to {loads[-1]}.
Rows of one query and of 2048 cells are of the program of 2026-11-28, batches behind 8192 cells and AVX-VNNI of the
one after it.

Written by `scripts/bench_cpu_attention.py`; records: [{path.name}]({path.name}).
"""
    path.with_suffix(".md").write_text(text + table(records) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build", help="build directory with bin/bench-cpu-attention"
    )
    parser.add_argument("--build-name", default="native build", help="what the results call it")
    parser.add_argument("--tiles", default="avx512,avx2", help="implementations")
    parser.add_argument("--quick", action="store_true", help="8192 cells, groups of 4 and one thread only")
    parser.add_argument("--append", action="store_true", help="keep what is recorded")
    parser.add_argument("--report", action="store_true", help="write the table only")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/cpu-attention.jsonl")
    args = parser.parse_args()
    if not args.report:
        program = args.build / "bin/bench-cpu-attention"
        measure(program, args.build_name, args.tiles.split(","), args.quick, args.append, args.out)
    report(args.out)


if __name__ == "__main__":
    main()
