#!/usr/bin/env python3
"""Put what a GPU machine without a network needs into build/gpu: scripts/gpu/build.sh there takes it from here.

pack.py source                     upstream as pinned, unpatched (7 MB): builds there, minutes
pack.py programs BUILD             what scripts/gpu/build.sh built here, in BUILD
pack.py file FILE [--part-mb N]    a model, in parts of N MiB: FILE.000, FILE.001, ... (cat puts it together)
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "build" / "gpu"
sys.path.insert(0, str(ROOT / "scripts"))

import upstream  # noqa: E402

# besides what upstream.py leaves out: nothing that a build reads
SKIP = ("benches/", "tools/ui/tests/", "tools/ui/src/", "tools/ui/package-lock.json", "tools/mtmd/test-")
PROGRAMS = ("llama-perplexity", "llama-bench", "llama-completion", "test-backend-ops", "test-backend")


def pack_source() -> Path:
    lock = json.loads((upstream.FORK / "upstream.lock").read_text())
    archive = upstream.fetch(lock, ROOT / "build" / "download")
    target = OUT / "upstream.tar.xz"
    with tarfile.open(target.with_suffix(".new"), "w:xz") as tar:
        for name, content in upstream.archive_files(archive, lock["subdirectory"]):
            if not name.startswith(SKIP):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    target.with_suffix(".new").rename(target)
    return target


def pack_programs(build: Path) -> Path:
    target = OUT / "programs.tar.xz"
    names = [*PROGRAMS, *sorted(p.name for p in (build / "bin").glob("lib*.so*"))]
    missing = [name for name in PROGRAMS if not (build / "bin" / name).exists()]
    if missing:
        raise upstream.Stop(f"not built in {build}: {', '.join(missing)}")
    with tarfile.open(target.with_suffix(".new"), "w:xz") as tar:
        for name in names:
            tar.add(build / "bin" / name, name)
    target.with_suffix(".new").rename(target)
    return target


def pack_file(file: Path, part_mb: int) -> Path:
    with file.open("rb") as f:
        n = 0
        while data := f.read(part_mb << 20):
            (OUT / f"{file.name}.{n:03}").write_bytes(data)
            n += 1
    return OUT / f"{file.name}.000"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("source")
    p = commands.add_parser("programs")
    p.add_argument("build", type=Path)
    p = commands.add_parser("file")
    p.add_argument("file", type=Path)
    p.add_argument("--part-mb", type=int, default=48)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        if args.command == "source":
            target = pack_source()
        elif args.command == "programs":
            target = pack_programs(args.build)
        else:
            target = pack_file(args.file, args.part_mb)
    except upstream.Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
