#!/usr/bin/env python3
"""What `make run` shows: a real model answers in llama-cli with a tq3 cache, then a table against f16.

    demo.py [--prompt TEXT] [--type tq3]

The programs are this repository's build (build/bin, or $GGML_TQ_BUILD/bin), the model is SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("GGML_TQ_BUILD", ROOT / "build")) / "bin"
MODEL = Path(os.environ.get("GGML_TQ_DATA", ROOT / "models")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192


def measure(cache_type: str, prompt: str) -> tuple[float, str, float]:
    """Generate 64 tokens with llama-completion. Returns cache size in MiB, resolved types, tokens a second."""
    command = [
        BIN / "llama-completion",
        "-m",
        MODEL,
        "-no-cnv",
        "-p",
        prompt,
        "-n",
        "64",
        "--temp",
        "0",
        "--ignore-eos",
        "-lv",
        "4",
        "-c",
        str(CONTEXT),
        "-ctk",
        cache_type,
        "-ctv",
        cache_type,
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    cache = re.search(r"llama_kv_cache: size = +([\d.]+) MiB.*K \((\w+)\).*V \((\w+)\)", done.stdout)
    speed = re.search(r" eval time =.*?([\d.]+) tokens per second", done.stdout.replace("prompt eval", "prompt"))
    if done.returncode != 0 or not cache or not speed:
        raise SystemExit(f"error: llama-completion failed with {cache_type}:\n{done.stdout[-2000:]}")
    return float(cache[1]), f"{cache[2]} / {cache[3]}", float(speed[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Explain in three sentences why the sea is salty.")
    parser.add_argument("--type", default="tq3", help="cache type for keys and values (default: tq3)")
    args = parser.parse_args()
    for needed in (BIN / "llama-cli", BIN / "llama-completion", MODEL):
        if not needed.exists():
            print(f"error: {needed} is missing; run `make run`", file=sys.stderr)
            return 1

    console = Console()
    command = [
        BIN / "llama-cli",
        "-m",
        MODEL,
        "-st",
        "-p",
        args.prompt,
        "-n",
        "96",
        "--temp",
        "0",
        "-c",
        str(CONTEXT),
        "-ctk",
        args.type,
        "-ctv",
        args.type,
    ]
    console.rule(f"llama-cli --cache-type-k {args.type} --cache-type-v {args.type}")
    status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if status != 0:
        print(f"error: llama-cli failed (exit status {status})", file=sys.stderr)
        return 1

    table = Table(title=f"{MODEL.name}: cache of {CONTEXT} tokens, generation at the start of the context")
    for column in ("-ctk / -ctv", "keys / values", "cache MiB", "f16 =", "tokens/s"):
        table.add_column(column, justify="left" if "/ " in column else "right")
    reference = 0.0
    for cache_type in ("f16", "q8_0", args.type):
        with console.status(f"measuring {cache_type}"):
            size, resolved, speed = measure(cache_type, args.prompt)
        reference = reference or size
        table.add_row(cache_type, resolved, f"{size:.1f}", f"{reference / size:.2f}x", f"{speed:.0f}")
    console.print(table)
    console.print(
        f"Chat:   {BIN / 'llama-cli'} -m {MODEL} -ctk {args.type} -ctv {args.type}", highlight=False, soft_wrap=True
    )
    console.print(
        "Tests:  make test      Types:  .venv/bin/ggml-tq types      Read:  README.md, docs/format.md", highlight=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
