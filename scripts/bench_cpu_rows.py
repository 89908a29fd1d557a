#!/usr/bin/env python3
"""Rows on the CPU, beside its memory: runs bench-cpu-rows and, for attention as a whole, bench-cpu-attention.

    scripts/bench_cpu_rows.py             # measures, and writes docs/results/cpu-rows.{jsonl,md}
    scripts/bench_cpu_rows.py --report    # the tables only

The programs are not in `make build`: cmake --build build --target bench-cpu-rows bench-cpu-attention
Records replace older ones when all are there. Every implementation that the machine has, types in turn. Rows of 1024
values are those of 8 heads of 128, rows of 192 those of 3 heads of 64 (SmolLM2): three blocks are then all that a
trellis search has side by side.
"""

import argparse
import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from bench_cpu_attention import ROOT, cpu_name

OPS = {
    "encode": "Encode (`tq_encode`)",
    "decode": "Decode (`tq_decode`)",
    "dot": "Scores of one query (`tq_dot`)",
    "keys": "Tiles of keys, 4 queries",
    "values": "Tiles of values, 4 queries",
}
TYPES = [f"tq{bits}_{kind}" for kind in ("mse", "qjl", "tcq") for bits in (2, 3, 4)]
Record = dict[str, Any]


def measure(programs: Path, rows: list[int], rounds: int, out: Path) -> None:
    about = {"cpu": cpu_name(), "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat()}
    attention = ["-d", "128", "-g", "4", "-c", "8192", "-r", str(rounds), "f16", *TYPES]
    new = out.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:

        def run(command: list[str]) -> list[Record]:
            load = round(os.getloadavg()[0], 1)
            text = " ".join([f"bin/{command[0]}", *command[1:]])
            print(text, flush=True)
            result = subprocess.run(
                [str(programs / command[0]), *command[1:]], check=True, capture_output=True, text=True
            )
            records = [json.loads(line) for line in result.stdout.splitlines()]
            for record in records:
                file.write(json.dumps({**about, "load": load, "command": text, **record}) + "\n")
            file.flush()
            return records

        tiles: list[str] = []
        for n in rows:
            records = run(["bench-cpu-rows", "--json", "-n", str(n), "-r", str(rounds)])
            tiles = list(dict.fromkeys(r["implementation"] for r in records if r["op"] == "keys"))
        for name in tiles:
            run(["bench-cpu-attention", "--json", "--tiles", name, *attention])
    new.replace(out)


def rows_table(records: list[Record], op: str) -> list[str]:
    """Rows: types; columns: implementations."""
    mine = [r for r in records if r["op"] == op]
    implementations = list(dict.fromkeys(r["implementation"] for r in mine))
    floats = any(r["float_gb_s"] for r in mine)
    columns = ["type"]
    for name in implementations:
        columns += [f"{name}, ns a value", "packed GB/s", *["floats GB/s"] * floats]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    for tq in dict.fromkeys(r["type"] for r in mine):
        cells = [tq]
        for name in implementations:
            r = next(r for r in mine if (r["type"], r["implementation"]) == (tq, name))
            cells += [f"{r['ns']:.3g}", f"{r['packed_gb_s']:.2f}", *[f"{r['float_gb_s']:.2f}"] * floats]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(path: Path) -> None:
    records: list[Record] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    loads = sorted({r["load"] for r in records})
    commands = "\n".join(dict.fromkeys(r["command"] for r in records))
    lines = [
        "# Rows on the CPU",
        "",
        "Time of one thread: nanoseconds a value, and bytes a second of packed rows and of the floats that they are",
        "made of or become. Implementations are the library's, in turn in one process; medians of rounds, of the",
        "processor's own time. Tiles are unpacked and multiplied with the numbers of four queries. Attention is",
        "FLASH_ATTN_EXT over 8192 cells, 8 key heads of 128, four query heads on each; the least of the rounds' times.",
        "",
        f"{records[0]['cpu']}, {records[0]['date']}; load averages {loads[0]} to {loads[-1]}.",
        "Written by `scripts/bench_cpu_rows.py`, which ran",
        "",
        "```",
        commands,
        "```",
        "",
        f"Records: [{path.name}]({path.name}).",
    ]
    for n in dict.fromkeys(r["row"] for r in records if "row" in r):
        mine = [r for r in records if r.get("row") == n]
        memory = {r["op"]: r["float_gb_s"] for r in mine if r["op"] in ("read", "copy")}
        lines += ["", f"## Rows of {n}", ""]
        lines += [f"Memory: reads {memory['read']:.1f} GB/s, copies {memory['copy']:.1f} GB/s."]
        for op in OPS if n == records[0]["row"] else ["encode"]:  # only searches depend on it
            lines += ["", f"### {OPS[op]}", "", *rows_table(mine, op)]
    attention = [r for r in records if "tiles" in r]
    tiles = list(dict.fromkeys(r["tiles"] for r in attention))
    lines += ["", "## Attention", ""]
    columns = ["type"]
    for name in tiles:
        columns += [f"{name}, µs", "packed GB/s"]
    lines += ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    for tq in dict.fromkeys(r["type"] for r in attention):
        cells = [tq]
        for name in tiles:
            r = next(r for r in attention if (r["type"], r["tiles"]) == (tq, name))
            cells += [f"{r['least_us']:.0f}", f"{r['bytes'] / r['least_us'] * 1e-3:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build", help="build directory with bin/bench-cpu-rows and -attention"
    )
    parser.add_argument("--rows", default="1024,192", help="values a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--report", action="store_true", help="write the tables only")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/cpu-rows.jsonl")
    args = parser.parse_args()
    if not args.report:
        measure(args.build / "bin", [int(n) for n in args.rows.split(",")], args.rounds, args.out)
    report(args.out)


if __name__ == "__main__":
    main()
