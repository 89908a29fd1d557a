#!/usr/bin/env python3
"""Say, hook by hook, whether the patch series applies to another upstream llama.cpp.

    check_upstream.py --llama-cpp DIR

Prints one line for each hook (hunk) and the number of lines the series adds. Exit status 0: all apply, 1: some do not.
Writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from upstream import FORK, Stop, patch_text, read_series


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="an upstream source tree")
    parser.add_argument("--patches", type=Path, default=FORK / "patches", help="the patch series")
    args = parser.parse_args()
    try:
        series = read_series(args.patches)
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return 1
    if not args.llama_cpp.is_dir():
        print(f"error: {args.llama_cpp} is not a directory", file=sys.stderr)
        return 1

    rows: list[tuple[str, str, int, str]] = []
    failed = added = 0
    for path, groups in series.items():
        file = args.llama_cpp / path
        text = file.read_bytes().decode() if file.exists() else ""
        for hunk, moved in patch_text(text, groups)[1]:
            if moved is None:
                status = "NOT FOUND" if file.exists() else "NO SUCH FILE"
                failed += 1
            else:
                status = "ok" if moved == 0 else f"ok, moved {moved:+d} lines"
            rows.append((hunk.patch, path, hunk.line, status))
            added += hunk.added
    for patch, path, line, status in sorted(rows):
        print(f"{patch:34} {f'{path}:{line}':44} {status}")
    print(f"{len(rows)} hooks in {len(series)} files, {added} added lines, {failed} do not apply")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
