"""``ggml-tq retrieval``."""

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
from ggml_tq.eval import retrieval, retrieval_report, runs
from ggml_tq.eval.haystack import TASKS, Task
from ggml_tq.eval.perplexity import Program
from ggml_tq.eval.retrieval import Plan, Record, Session
from ggml_tq.eval.runs import EvalError, Pair, split_flags, whole_numbers

RESULTS = OWN_RESULTS / "retrieval.jsonl"
TYPES = "f16,q8_0,q4_0,tq4_tcq,tq3_tcq,tq2_tcq"


def _depths(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted(float(n) for n in text.split(",")))
    except ValueError as e:
        raise EvalError(f"'{text}' are no depths: want numbers separated by commas") from e


def _tasks(text: str) -> tuple[Task, ...]:
    names = text.split(",")
    unknown = [n for n in names if n not in TASKS]
    if unknown:
        raise EvalError(f"task '{unknown[0]}': want {' or '.join(TASKS)}")
    return tuple(t for t in TASKS if t in names)


@app.command("retrieval")
def retrieve(
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="GGUF model that follows instructions. (default: smollm2)")
    ] = None,
    text: Annotated[Path | None, typer.Option("-f", "--text", help="Plain text of haystacks. (default: wiki)")] = None,
    types: Annotated[
        str, typer.Option("--types", help="Cache types, separated by commas; K/V where they differ. f16 is added.")
    ] = TYPES,
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks, separated by commas.")] = ",".join(TASKS),
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of a haystack, separated by commas.")] = "512,1024",
    depths: Annotated[str, typer.Option("--depths", help="Where facts are, from 0 to 1.")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option("--trials", help="Haystacks of each task and length.")] = 8,
    digits: Annotated[int, typer.Option("--digits", help="Digits of a number to find.")] = retrieval.DIGITS,
    seed: Annotated[int, typer.Option("--seed", help="Seed of haystacks.")] = 0,
    threads: Annotated[int, typer.Option("-t", "--threads", help="Threads: part of the settings.")] = os.cpu_count()
    or 1,
    flags: Annotated[str, typer.Option("--flags", help="Further options of llama-server, such as '-ngl 99'.")] = "",
    output: Annotated[
        Path, typer.Option("-o", "--output", help="JSON lines; a table and plots go beside it.")
    ] = RESULTS,
    bin_dir: Annotated[
        Path | None,
        typer.Option("--bin", help="Folder of llama-server. (default: $GGML_TQ_BUILD/bin, or build/bin)"),
    ] = None,
    build: Annotated[str, typer.Option("--build", help="What to record of the build, such as its commit.")] = "",
    report_only: Annotated[bool, typer.Option("--report-only", help="Only write table and plots again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON lines.")] = False,
) -> None:
    """Hide facts in long prompts and ask for them: needle in a haystack, and many keys (after RULER).

    Each haystack is recorded when its questions are answered. Those that the output already holds with the same
    settings are skipped, so an interrupted command goes on where it was. Every type is compared with f16 on the same
    haystacks.
    """
    console = Console(stderr=True)
    records = retrieval.store(output)

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    with measuring("haystacks"):
        keys = set()
        half = records.read()[1]
        if half is not None:
            say(f"{output}: a half-written last line of {len(half)} characters is not read")
        if not report_only:
            f16 = Pair("f16", "f16")
            plan = Plan(
                model=model or data.data_dir() / data.ASSETS["smollm2"].file,
                text=text or data.data_dir() / data.ASSETS["wiki"].file,
                pairs=tuple(dict.fromkeys([f16, *map(Pair.parse, types.split(","))])),
                tasks=_tasks(tasks),
                lengths=whole_numbers(lengths, "lengths", least=1),
                depths=_depths(depths),
                trials=trials,
                seed=seed,
                digits=digits,
                flags=split_flags(flags),
            )
            program = Program(bin_dir or default_bin_dir(), retrieval.PROGRAM)
            session = Session(program, records, threads, runs.source(program.version(), build))
            jobs = session.jobs(plan)
            keys = {j.key for j in jobs}
            done = len(keys & {r.key for r in records.read()[0]})

            def on_record(r: Record) -> None:
                nonlocal done
                done += 1
                right, s = sum(a.correct for a in r.answers), r.settings
                say(
                    f"{done}/{len(jobs)} {s.model} {r.pair}: {s.task}, {s.length} tokens, trial {r.trial}: "
                    f"{right} of {len(r.answers)} right, {r.seconds:.0f} s"
                )

            session.on_record = on_record
            session.run(plan, jobs)
        found = records.read()[0]
        report = output.with_suffix(".md")
        retrieval_report.write(found, report, [output])
        if as_json:
            for r in found:
                if report_only or r.key in keys:
                    typer.echo(json.dumps(r.to_json()))
        else:
            typer.echo(report)
