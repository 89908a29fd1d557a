#!/usr/bin/env python3
"""``ggml-tq eval`` where Python packages cannot be installed: the same runs and records, from the standard library.

quality.py --bin DIR --text FILE --types f16,q4_0,tq3_tcq -o OUT.jsonl MODEL...

A run that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "python"))

from ggml_tq.eval import matrix, perplexity, runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-c", "--context", type=int, default=2048)
    parser.add_argument("--path", choices=runs.PATHS, default="batched")
    parser.add_argument("--tokens", type=int, default=matrix.TOKENS)
    parser.add_argument("-t", "--threads", type=int, default=16)
    parser.add_argument("--flags", default="-ngl 99")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/eval-cache"), help="where f16 logits are kept")
    parser.add_argument("--build", default="", help="what to record of the build, such as its commit")
    args = parser.parse_args()

    program = perplexity.Program(args.bin)
    session = matrix.Session(
        program,
        runs.Store(args.output),
        perplexity.BaseCache(args.scratch, lambda text: print(text, flush=True)),
        args.threads,
        runs.source(program.version(), args.build),
    )
    failed = 0
    for model in args.models:
        for pair in args.types.split(","):
            start = time.monotonic()
            plan = matrix.Plan(
                model,
                args.text,
                (runs.Pair.parse(pair),),
                (args.context,),
                (args.path,),
                args.tokens,
                tuple(args.flags.split()),
            )
            try:
                session.run(session.jobs([plan]))
                kld = session.store.read()[0][-1].figures["kld"]
                print(f"{model.name} {args.context} {args.path} {pair}: KLD {kld}", end="")
            except runs.EvalError as error:
                failed += 1
                print(f"{model.name} {args.context} {args.path} {pair}: {error}", end="")
            print(f" ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
