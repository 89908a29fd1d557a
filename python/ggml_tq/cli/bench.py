"""``ggml-tq bench``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ggml_tq import data
from ggml_tq.cli.app import app
from ggml_tq.cli.eval import OWN_RESULTS, default_bin_dir, measuring
from ggml_tq.eval import bench, bench_report
from ggml_tq.eval.bench import Plan, Round, Session
from ggml_tq.eval.report import short_name
from ggml_tq.eval.runs import Pair, split_flags, whole_numbers

TYPES = "f16,q8_0,q4_0,tq4_tcq,tq3_tcq,tq2_tcq"


@app.command("bench")
def measure(
    model: Annotated[Path | None, typer.Option("-m", "--model", help="GGUF model. (default: smollm2)")] = None,
    types: Annotated[
        str, typer.Option("--types", help="Cache types, separated by commas; K/V where they differ. f16 is added.")
    ] = TYPES,
    depths: Annotated[
        str, typer.Option("-d", "--depths", help="Tokens in the cache before a measurement, separated by commas.")
    ] = ",".join(map(str, bench.DEPTHS)),
    prompt: Annotated[int, typer.Option("-p", "--prompt", help="Tokens of the prompt to measure; 0: none.")] = 512,
    generate: Annotated[int, typer.Option("-n", "--generate", help="Tokens to generate; 0: none.")] = 128,
    parallel: Annotated[
        str | None,
        typer.Option("--parallel", help="Numbers of sequences, such as 1,4,16: llama-batched-bench measures them."),
    ] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Rounds at each depth.")] = 5,
    threads: Annotated[int, typer.Option("-t", "--threads", help="Threads: part of the settings.")] = os.cpu_count()
    or 1,
    flags: Annotated[str, typer.Option("--flags", help="Further options of the program, such as '-ngl 99'.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="JSON lines; a table and a plot go beside it. (default: results/speed-MODEL-…)"
        ),
    ] = None,
    bin_dir: Annotated[
        Path | None,
        typer.Option("--bin", help="Folder of llama-bench. (default: $GGML_TQ_BUILD/bin, or build/bin)"),
    ] = None,
    build: Annotated[str, typer.Option("--build", help="What to record of the build, such as its commit.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON lines.")] = False,
) -> None:
    """Measure the speed and size of cache types over depth, against f16 in the same round.

    A round runs every type once; it is recorded when it is whole. Rounds that the output already holds with the same
    settings are skipped, so an interrupted command goes on where it was. Keep the machine quiet.
    """
    console = Console(stderr=True)

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    with measuring("rounds"):
        plan = Plan(
            model=model or data.data_dir() / data.ASSETS["smollm2"].file,
            pairs=tuple(map(Pair.parse, types.split(","))),
            depths=whole_numbers(depths, "depths"),
            prompt=prompt,
            generate=generate,
            parallel=whole_numbers(parallel, "numbers of sequences") if parallel else (),
            repetitions=repetitions,
            threads=threads,
            flags=split_flags(flags),
        )
        plan.check()
        session = Session(bin_dir or default_bin_dir(), bench.store(Path()), build)
        settings = session.settings(plan)
        if output is None:
            backend = "gpu" if settings.gpu else "cpu"
            output = OWN_RESULTS / f"speed-{short_name(plan.model.name).lower()}-{backend}.jsonl"
        session.rounds = bench.store(output)
        half = session.rounds.read()[1]
        if half is not None:
            say(f"{output}: dropped a half-written last line of {len(half)} characters")

        def on_start(pair: Pair, depth: int, repetition: int) -> None:
            say(f"depth {depth}, round {repetition + 1} of {repetitions}: {pair}")

        def on_round(r: Round) -> None:
            f16 = next(run for run in r.runs if run.pair == bench.F16)
            for run in r.runs:
                ratios = (
                    f"{test} {speed:.1f} t/s, {speed / f16.speeds[test]:.2f}" for test, speed in run.speeds.items()
                )
                say(f"  {run.pair}: {'; '.join(ratios)} of f16")

        session.on_start, session.on_round = on_start, on_round
        session.run(plan, settings)
        found = session.rounds.read()[0]
        bench_report.write(found, output.with_suffix(".md"), [output])
        mine = [r for r in found if r.settings.key() == settings.key()]
        if as_json:
            for r in mine:
                typer.echo(json.dumps(r.to_json()))
        else:
            typer.echo("".join(map(bench_report.table, bench_report.groups(mine))), nl=False)
