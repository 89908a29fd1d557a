#!/usr/bin/env python3
"""``ggml-tq eval``, ``retrieval`` and ``bench`` where Python packages cannot be installed: the same runs and records.

evaluate.py quality   --bin DIR --text FILE --types f16,q4_0,tq3_tcq -o OUT.jsonl MODEL...
evaluate.py retrieval --bin DIR --text FILE --types f16,q4_0,tq3_tcq -o OUT.jsonl MODEL...
evaluate.py bench     --bin DIR             --types f16,q4_0,tq3_tcq -o OUT.jsonl MODEL...
evaluate.py parity    --bin DIR --text FILE --types f16,q4_0,tq3_tcq -o OUT.jsonl MODEL...

parity: divergence of the GPU's logits from the CPU's with the same cache, and of that cache from f16 on the GPU.
Weights in F32 (llama-quantize --allow-requantize MODEL OUT F32) keep what is not the cache's out of it.

From the standard library; tables and plots are made of the records elsewhere. retrieval wants llama-server, which
build.sh builds when it is named. A run that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "python"))

from ggml_tq.eval import bench, haystack, matrix, perplexity, retrieval, runs


def quality(args: argparse.Namespace, model: Path, pair: runs.Pair) -> str:
    program = perplexity.Program(args.bin)
    bases = perplexity.BaseCache(args.scratch, lambda text: print(text, flush=True))
    session = matrix.Session(
        program, runs.Store(args.output), bases, args.threads, runs.source(program.version(), args.build)
    )
    plan = matrix.Plan(model, args.text, (pair,), (args.context,), (args.path,), args.tokens, tuple(args.flags.split()))
    session.run(session.jobs([plan]))
    return f"{args.context} {args.path}: KLD {session.store.read()[0][-1].figures['kld']}"


def needles(args: argparse.Namespace, model: Path, pair: runs.Pair) -> str:
    program = perplexity.Program(args.bin, retrieval.PROGRAM)
    records = retrieval.store(args.output)
    session = retrieval.Session(program, records, args.threads, runs.source(program.version(), args.build))
    plan = retrieval.Plan(
        model=model,
        text=args.text,
        pairs=(pair,),
        tasks=haystack.TASKS,
        lengths=runs.whole_numbers(args.lengths, "lengths", least=1),
        depths=(0, 0.25, 0.5, 0.75, 1),
        trials=args.trials,
        seed=0,
        digits=retrieval.DIGITS,
        flags=tuple(args.flags.split()),
    )
    jobs = session.jobs(plan)
    session.run(plan, jobs)
    keys = {job.key for job in jobs}
    answers = [a for r in records.read()[0] if r.key in keys for a in r.answers]
    return f"{sum(a.correct for a in answers)} of {len(answers)} right"


def speed(args: argparse.Namespace, model: Path) -> str:
    plan = bench.Plan(
        model=model,
        pairs=tuple(map(runs.Pair.parse, args.types.split(","))),
        depths=runs.whole_numbers(args.depths, "depths"),
        prompt=args.prompt,
        generate=args.generate,
        repetitions=args.repetitions,
        threads=args.threads,
        flags=tuple(args.flags.split()),
    )
    plan.check()
    session = bench.Session(args.bin, bench.store(args.output), args.build)
    session.run(plan, session.settings(plan))
    return f"{len(session.rounds.read()[0])} rounds"


def parity(args: argparse.Namespace, model: Path, pair: runs.Pair) -> str:
    program = perplexity.Program(args.bin)
    bases = perplexity.BaseCache(args.scratch, lambda text: print(text, flush=True))
    session = matrix.Session(program, runs.Store(args.output), bases, args.threads, {})
    plan = matrix.Plan(model, args.text, (pair,), (args.context,), runs.PATHS, args.tokens, tuple(args.flags.split()))
    gpu = session.settings(plan, args.context)
    sizes = {"context": gpu.context, "chunks": gpu.chunks, "threads": gpu.threads}
    f16 = bases.get(program, gpu, model, args.text)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        cpu = perplexity.compute_base(
            program,
            model,
            args.text,
            Path(folder) / "logits",
            flags=perplexity.options(args.context, "-ngl", "0", "-dev", "none"),
            pair=pair,
            **sizes,
        )

        def kld(base: perplexity.Base, path: runs.PathKind) -> runs.Figure:
            return perplexity.compare(program, model, base, pair, path, flags=gpu.flags, **sizes)[1]["kld"]

        record = {"batched": kld(cpu, "batched"), "decode": kld(cpu, "decode"), "from_f16": kld(f16, "batched")}
    where = {"model": gpu.model, "text": gpu.text, "cpu": gpu.cpu, "gpu": gpu.gpu, **sizes}
    with args.output.open("a") as file:
        file.write(json.dumps({**where, "pair": str(pair), **record}) + "\n")
    return f"GPU from CPU {record['batched']}, one at a time {record['decode']}; from f16 {record['from_f16']}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "retrieval", "bench", "parity"))
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--types", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-t", "--threads", type=int, default=16)
    parser.add_argument("--flags", default="-ngl 99")
    parser.add_argument("--build", default="", help="what to record of the build, such as its commit")
    parser.add_argument("--text", type=Path, help="all but bench")
    parser.add_argument("-c", "--context", type=int, default=2048, help="quality, parity")
    parser.add_argument("--path", choices=runs.PATHS, default="batched", help="quality")
    parser.add_argument("--tokens", type=int, default=matrix.TOKENS, help="quality, parity")
    parser.add_argument(
        "--scratch", type=Path, default=Path("/tmp/eval-cache"), help="quality: where f16 logits are kept"
    )
    parser.add_argument("--lengths", default="512,1024", help="retrieval")
    parser.add_argument("--trials", type=int, default=8, help="retrieval")
    parser.add_argument("--depths", default=",".join(map(str, bench.DEPTHS)), help="bench")
    parser.add_argument("--prompt", type=int, default=512, help="bench")
    parser.add_argument("--generate", type=int, default=128, help="bench")
    parser.add_argument("--repetitions", type=int, default=5, help="bench")
    args = parser.parse_args()
    if args.what != "bench" and args.text is None:
        parser.error("--text is missing")
    return args


def main() -> int:
    args = parse()
    failed = 0
    for model in args.models:
        for types in [args.types] if args.what == "bench" else args.types.split(","):
            start = time.monotonic()
            try:
                if args.what == "bench":
                    said = speed(args, model)
                else:
                    what = {"quality": quality, "retrieval": needles, "parity": parity}[args.what]
                    said = what(args, model, runs.Pair.parse(types))
            except runs.EvalError as error:
                failed += 1
                said = str(error)
            print(f"{model.name} {types}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
