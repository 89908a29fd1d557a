#!/usr/bin/env python3
"""Obtain, verify and patch the pinned upstream llama.cpp. Standard library only: CMake runs this before any
package exists.

    upstream.py prepare --out DIR --cache DIR [--llama-cpp CHECKOUT]

writes the patched source tree to DIR. Only files whose content changes are written, so an incremental build stays
incremental when one patch changes. The patches are plain unified diffs; a hunk is a hook. A hunk may have moved
(its line numbers are a hint), but its old lines must be found exactly: there is no fuzz.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FORK = Path(__file__).resolve().parent.parent / "ggml-tq" / "fork"
STAMP = ".ggml-tq-source"
# parts of upstream that no build here reads; together half of the tree
SKIP = ("models/", "media/", "docs/", ".git", ".github/", ".devops/", "gguf-py/", "conversion/")


class Stop(Exception):
    """An error for the user: one message, no traceback."""


@dataclass
class Hunk:
    """One hook: `old` must be found in the upstream file, `new` takes its place (lists of lines with endings)."""

    patch: str
    path: str
    line: int
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    added: int = 0  # lines


def read_patch(file: Path) -> list[Hunk]:
    """Parse a unified diff (as written by `git format-patch`) into hunks."""
    hunks: list[Hunk] = []
    path = ""
    old_left = new_left = 0
    for line in file.read_text().splitlines(keepends=True):
        if old_left > 0 or new_left > 0:
            mark, text = line[:1], line[1:]
            if mark in (" ", "\n", "-"):
                hunks[-1].old.append(text if mark != "\n" else line)
                old_left -= 1
            if mark in (" ", "\n", "+"):
                hunks[-1].new.append(text if mark != "\n" else line)
                new_left -= 1
            hunks[-1].added += mark == "+"
        elif line.startswith("+++ b/"):
            path = line[6:].rstrip()
        elif m := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            hunks.append(Hunk(file.name, path, int(m[1])))
            old_left, new_left = int(m[2] or 1), int(m[3] or 1)
    return hunks


def find(lines: list[str], hunk: Hunk, start: int, hint: int) -> int | None:
    """Index in `lines`, from `start` on, of the hunk's old lines: `hint` if they stand there, else the one place
    where they do; None if there is none or if there are several."""
    n = len(hunk.old)
    places = [i for i in range(start, len(lines) - n + 1) if lines[i : i + n] == hunk.old]
    if hint in places:
        return hint
    return places[0] if len(places) == 1 else None


def apply_hunks(text: str, hunks: list[Hunk]) -> tuple[str, list[tuple[Hunk, int | None]]]:
    """Apply one file's hunks in order. Returns the new text and, for each hunk, how far it moved (None: not found)."""
    lines = text.splitlines(keepends=True)
    report: list[tuple[Hunk, int | None]] = []
    shift = start = 0
    for hunk in hunks:
        hint = hunk.line - 1 + shift
        at = find(lines, hunk, start, hint)
        report.append((hunk, None if at is None else at - hint))
        if at is not None:
            lines[at : at + len(hunk.old)] = hunk.new
            shift += at - hint + len(hunk.new) - len(hunk.old)
            start = at + len(hunk.new)
    return "".join(lines), report


def read_series(patches: Path) -> dict[str, list[list[Hunk]]]:
    """All hunks by upstream path, one list for each patch that touches the file, in series order."""
    series: dict[str, list[list[Hunk]]] = {}
    for file in sorted(patches.glob("*.patch")):
        by_path: dict[str, list[Hunk]] = {}
        for hunk in read_patch(file):
            by_path.setdefault(hunk.path, []).append(hunk)
        for path, hunks in by_path.items():
            series.setdefault(path, []).append(hunks)
    if not series:
        raise Stop(f"no patches in {patches}")
    return series


def patch_text(text: str, groups: list[list[Hunk]]) -> tuple[str, list[tuple[Hunk, int | None]]]:
    report: list[tuple[Hunk, int | None]] = []
    for hunks in groups:
        text, part = apply_hunks(text, hunks)
        report += part
    return text, report


def sha256(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def fetch(lock: dict[str, str], cache: Path) -> Path:
    """The pinned archive, from `cache` or by pip (which verifies the hash before it opens the archive)."""
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / lock["archive"]
    if not archive.exists():
        print(f"-- fetching {lock['package']} {lock['version']} (source package, 77 MB)", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            requirement = Path(tmp) / "requirement.txt"
            requirement.write_text(f"{lock['package']}=={lock['version']} --hash=sha256:{lock['sha256']}\n")
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-binary",
                lock["package"],
                "--require-hashes",
                "--disable-pip-version-check",
                "-q",
                "-d",
                tmp,
                "-r",
                str(requirement),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0 or not (Path(tmp) / lock["archive"]).exists():
                raise Stop(f"pip could not fetch {lock['package']} {lock['version']}:\n{done.stdout.strip()}")
            (Path(tmp) / lock["archive"]).rename(archive)
    got = sha256(archive)
    if got != lock["sha256"]:
        raise Stop(
            f"{archive} is not the pinned upstream (changed or truncated):\n"
            f"  sha256 expected {lock['sha256']}\n  sha256 found    {got}\n"
            "  Delete the file to fetch it again."
        )
    return archive


def archive_files(archive: Path, subdirectory: str) -> Iterator[tuple[str, bytes]]:
    """(path inside upstream, content) of the archive's upstream tree."""
    prefix = subdirectory.rstrip("/") + "/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if member.isfile() and member.name.startswith(prefix) and not name.startswith(SKIP):
                content = tar.extractfile(member)
                assert content is not None  # isfile()
                yield name, content.read()


def checkout_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside upstream, content) of a checkout, without what git or a build put there."""
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root).as_posix()
        if file.is_file() and not name.startswith((*SKIP, "build")):
            yield name, file.read_bytes()


def prepare(out: Path, cache: Path, checkout: Path | None, patches: Path) -> None:
    lock = json.loads((FORK / "upstream.lock").read_text())
    series = read_series(patches)

    if checkout is not None:
        if not (checkout / "ggml" / "include" / "ggml.h").exists():
            raise Stop(f"{checkout} is not a llama.cpp checkout (no ggml/include/ggml.h)")
        files, source = checkout_files(checkout), ""
    else:
        source = lock["sha256"] + "".join(sha256(p) for p in sorted(patches.glob("*.patch"))) + sha256(Path(__file__))
        stamp = out / STAMP
        if stamp.exists() and stamp.read_text() == source:
            return
        files = archive_files(fetch(lock, cache), lock["subdirectory"])

    (out / STAMP).unlink(missing_ok=True)  # whatever stops us below, the next run starts over
    written = 0
    failed: list[Hunk] = []
    seen: set[str] = set()
    for name, content in files:
        seen.add(name)
        if name in series:
            text, report = patch_text(content.decode(), series[name])
            failed += [hunk for hunk, moved in report if moved is None]
            content = text.encode()
        target = out / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            written += 1

    failed += [groups[0][0] for path, groups in series.items() if path not in seen]
    if failed:
        places = "\n".join(f"  {h.patch}: {h.path}, near line {h.line}" for h in failed)
        raise Stop(
            f"{len(failed)} hook(s) do not apply to this upstream:\n{places}\n"
            "  scripts/check_upstream.py --llama-cpp DIR shows the whole series."
        )
    for stale in [f for f in out.rglob("*") if f.is_file() and f.relative_to(out).as_posix() not in seen]:
        stale.unlink()
    if source:
        (out / STAMP).write_text(source)
    print(f"-- upstream: {checkout or lock['description']}, {len(seen)} files, {written} written", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="write the patched source tree")
    p.add_argument("--out", type=Path, required=True, help="where the patched tree goes")
    p.add_argument("--cache", type=Path, required=True, help="where the fetched archive is kept")
    p.add_argument("--llama-cpp", type=Path, help="use this checkout instead of the pinned archive")
    p.add_argument("--patches", type=Path, default=FORK / "patches", help="the patch series")
    args = parser.parse_args()
    try:
        prepare(args.out, args.cache, args.llama_cpp, args.patches)
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
