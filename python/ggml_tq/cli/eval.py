"""``ggml-tq eval`` and ``ggml-tq report``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ggml_tq import data
from ggml_tq.cli.app import app, fail
from ggml_tq.eval import matrix, perplexity, report, runs
from ggml_tq.eval.matrix import Plan, Session
from ggml_tq.eval.runs import PATHS, EvalError, Pair, PathKind, Record, Store

OWN_RESULTS = Path("results")  # which git ignores
RESULTS = Path("docs/results/quality.jsonl")  # which the README shows
REPORT = RESULTS.with_suffix(".md")


def default_bin_dir() -> Path:
    """Folder of the programs: $GGML_TQ_BUILD/bin, or build/bin."""
    return Path(os.environ.get("GGML_TQ_BUILD") or "build") / "bin"


class _Display:
    """A progress bar over the cost of all runs, and a line for each result (also where there is no terminal)."""

    def __init__(self, console: Console, cost: float, jobs: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.console, self.done, self.jobs, self.before, self.cost = console, 0, jobs, 0.0, 0.0
        # a step can take minutes: estimate from the whole session
        self.progress = Progress(*columns, console=console, speed_estimate_period=1e6)
        self.task = self.progress.add_task("", total=cost)

    def start(self, name: str, cost: float) -> None:
        self.cost = cost
        self.progress.update(self.task, description=f"{self.done + 1}/{self.jobs} {name}")

    def advance(self, cost: float) -> None:
        self.progress.update(self.task, completed=self.before + cost)

    def record(self, r: Record) -> None:
        self.done += 1
        self.before += self.cost
        self.advance(0)
        left = self.progress.tasks[0].time_remaining
        after = f", about {timedelta(seconds=round(left))} left" if left else ""
        self.console.print(
            f"{self.done}/{self.jobs} {r.settings.model} {r.settings.context} {r.pair} {r.path}: "
            f"KLD {report.plus_minus(r, 'kld', 5)}, {r.seconds:.0f} s{after}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _paths(names: Sequence[str]) -> tuple[PathKind, ...]:
    found = tuple(p for p in PATHS if p in names)
    if len(found) != len(set(names)):
        raise EvalError(f"path '{next(n for n in names if n not in PATHS)}': want {' or '.join(PATHS)}")
    return found


@contextlib.contextmanager
def measuring(what: str) -> Iterator[None]:
    """What goes wrong is one line; signals end it as Ctrl-C does, with the programs that were started."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, stop)
    try:
        yield
    except EvalError as e:
        raise fail(e) from e
    except OSError as e:
        raise fail(f"{e.filename}: {e.strerror}" if e.filename else e) from e
    except KeyboardInterrupt as e:
        raise fail(f"interrupted; the {what} so far are recorded") from e


def _offer_to_delete(bases: perplexity.BaseCache, jobs: Sequence[matrix.Job]) -> None:
    present = [s for s in {job.settings for job in jobs} if bases.path(s).is_file()]
    size = sum(bases.path(s).stat().st_size for s in present) / 1e9
    if not present:
        return
    if not sys.stdin.isatty():
        bases.say(f"{size:.2f} GB of f16 logits are kept in {bases.folder} (--no-keep-base deletes them)")
    elif typer.confirm(f"Delete {size:.2f} GB of f16 logits in {bases.folder}?", err=True):
        for s in present:
            bases.drop(s)


@app.command("eval")
def evaluate(
    models: Annotated[list[Path] | None, typer.Option("-m", "--model", help="GGUF models.")] = None,
    texts: Annotated[list[Path] | None, typer.Option("-f", "--text", help="Plain texts.")] = None,
    types: Annotated[
        str, typer.Option("--types", help="Cache types, separated by commas; K/V where they differ.")
    ] = ",".join(("f16", "bf16", *matrix.UPSTREAM, *matrix.OURS)),
    contexts: Annotated[
        list[int] | None, typer.Option("-c", "--context", help="Tokens a chunk. (default: 2048)")
    ] = None,
    paths: Annotated[
        list[str] | None,
        typer.Option("--path", help="batched (default), or decode: one token at a time, as text is generated."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of the text, rounded up to chunks.")] = matrix.TOKENS,
    chunks: Annotated[int | None, typer.Option("--chunks", help="Chunks of the text, instead of --tokens.")] = None,
    threads: Annotated[int, typer.Option("-t", "--threads", help="Threads: part of the settings.")] = os.cpu_count()
    or 1,
    flags: Annotated[str, typer.Option("--flags", help="Further options of llama-perplexity, such as '-ngl 99'.")] = "",
    long_matrix: Annotated[
        bool, typer.Option("--matrix", help="The long matrix of four models instead of -m, -f, --types, -c, --path.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="JSON lines to which results are added. Git ignores results/; report reads docs/results/ unless told.",
        ),
    ] = OWN_RESULTS / RESULTS.name,
    bin_dir: Annotated[
        Path | None,
        typer.Option("--bin", help="Folder of llama-perplexity. (default: $GGML_TQ_BUILD/bin, or build/bin)"),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", help="Where f16 logits are kept. (default: eval-cache beside the models)"),
    ] = None,
    keep_base: Annotated[
        bool | None, typer.Option(help="Keep the f16 logits, or delete them once they are done with. (default: ask)")
    ] = None,
    build: Annotated[str, typer.Option("--build", help="What to record of the build, such as its commit.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON lines.")] = False,
) -> None:
    """Measure cache types against the f16 cache: perplexity, KL divergence, agreement of the top token.

    Each result is added to the output when it is there. Runs that it already holds with the same settings (model,
    text, program, threads, flags, processor) are skipped, so an interrupted command goes on where it was.
    """
    console = Console(stderr=True)
    with measuring("results"):
        folder = data.data_dir()
        if long_matrix:
            plans = matrix.long_matrix(folder)
        else:
            if not models or not texts:
                raise EvalError("want a model (-m) and a text (-f), or --matrix")
            plans = [
                Plan(
                    model,
                    text,
                    tuple(Pair.parse(t) for t in types.split(",")),
                    (context,),
                    _paths(paths or ["batched"]),
                    tokens if chunks is None else chunks * context,
                    runs.split_flags(flags),
                )
                for model in models
                for text in texts
                for context in contexts or [2048]
            ]
        bases = perplexity.BaseCache(
            cache_dir or folder / "eval-cache",
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
        )
        store = Store(output)
        program = perplexity.Program(bin_dir or default_bin_dir())
        source = runs.source(program.version(), build)
        session = Session(program, store, bases, threads, source, keep_bases=keep_base is not False)
        jobs = session.jobs(plans)
        recorded, half = store.read()
        if half is not None:
            bases.say(f"{output}: dropped a half-written last line of {len(half)} characters")
        done = {r.key for r in recorded}
        missing = [j for j in jobs if j.key not in done]
        if missing:
            display = _Display(console, sum(j.cost for j in missing), len(missing))
            session.on_start, session.on_progress = display.start, display.advance
            session.on_record = display.record
            with display.progress:
                session.run(jobs)
        keys = {j.key for j in jobs}
        results = [r for r in store.read()[0] if r.key in keys]
        if as_json:
            for r in results:
                typer.echo(json.dumps(r.to_json()))
        else:
            typer.echo(report.tables(results), nl=False)
        if keep_base is None:
            _offer_to_delete(bases, jobs)


@app.command("report")
def write_report(
    inputs: Annotated[
        list[Path] | None, typer.Argument(help=f"JSON lines of ggml-tq eval. (default: {RESULTS})")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Markdown file; plots go beside it.")] = REPORT,
    builds: Annotated[
        list[str] | None,
        typer.Option("--binary", help="Only results of the programs whose SHA-256 begins so."),
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            "--readme", help="Put a compact table between its lines `<!-- quality -->` and `<!-- /quality -->`."
        ),
    ] = None,
    studies: Annotated[
        list[Path] | None, typer.Option("--study", help="JSON of ggml-tq study, to show the error of each layer.")
    ] = None,
) -> None:
    """Write tables and plots of recorded results.

    Results of one model, text, context and number of chunks form a table. They must have been measured with the same
    settings; if not, the command says what differs, and --binary chooses.
    """
    with measuring("results"):
        records: list[Record] = []
        for path in inputs or [RESULTS]:
            if not path.is_file():
                raise EvalError(f"{path} is missing: run ggml-tq eval")
            found, half = Store(path).read()
            records += found
            if half is not None:
                Console(stderr=True).print(f"{path}: a half-written last line is left out", markup=False)
        if builds:
            records = [r for r in records if any(r.settings.binary_sha256.startswith(b) for b in builds)]
        report.write(records, output, inputs or [RESULTS], readme, studies or [])
    typer.echo(output)
