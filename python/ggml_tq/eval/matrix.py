"""What to measure: plans of runs, the long matrix, and the loop that works through them."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_tq.data import ASSETS
from ggml_tq.eval import perplexity, runs
from ggml_tq.eval.runs import EvalError, Pair, PathKind, Record, Settings, Store

UPSTREAM = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # each with upstream's rotation
OURS = ("tq4_tcq", "tq4", "tq4_mse", "tq3_tcq", "tq3", "tq3_mse", "tq2_tcq", "tq2", "tq2_mse")
MIXED = ("q8_0/tq4_tcq", "q8_0/tq3_tcq", "q8_0/tq2_tcq", "tq4_tcq/tq3_tcq", "tq4_tcq/tq2_tcq")
DECODE = ("f16", "q8_0", "q4_0", "q4_0-norot", "tq4_tcq", "tq3_tcq", "tq2_tcq", "tq3")
LONG = ("bf16", "q8_0", "q5_1", "q4_0", "q4_0-norot", "iq4_nl", "tq4_tcq", "tq3_tcq", "tq2_tcq", "q8_0/tq3_tcq")
TOKENS = 20_000


@dataclass(frozen=True)
class Plan:
    """Runs of one model on one text: every pair at every context on every path."""

    model: Path
    text: Path
    pairs: tuple[Pair, ...]
    contexts: tuple[int, ...]
    paths: tuple[PathKind, ...] = ("batched",)
    tokens: int = TOKENS  # at least so many are given to the model at each context
    flags: tuple[str, ...] = ()

    def chunks(self, context: int) -> int:
        return math.ceil(self.tokens / context)


def long_matrix(folder: Path) -> list[Plan]:
    """What ``make eval`` runs: the four models of ``ggml-tq fetch``, calibrated on c4, on wiki text.

    Every type at context 2048, some at 8192 and, of Qwen2.5, at 32768, and some at 2048 one token at a time. bf16, and
    f16 one token at a time, are the floor: they differ from the base by rounding alone. Batched f16 is the base; what
    it is off by, its file is.
    """
    every = ("f16", "bf16", *UPSTREAM, "q4_0-norot", *OURS, *MIXED)
    plans = []
    for name in ("smollm2", "gemma3", "qwen05", "qwen15"):
        files = calibrated(folder, name), folder / ASSETS["wiki"].file
        plans += [
            Plan(*files, _pairs(every), (2048,)),
            Plan(*files, _pairs(DECODE), (2048,), ("decode",)),
            Plan(*files, _pairs(LONG), (8192, 32768) if name.startswith("qwen") else (8192,)),
        ]
    return plans


def calibrated(folder: Path, name: str) -> Path:
    """Where ``make eval`` puts a model with the centers of its keys: metadata, which other types do not read."""
    return folder / f"{Path(ASSETS[name].file).stem}-tq.gguf"


def _pairs(names: Sequence[str]) -> tuple[Pair, ...]:
    return tuple(map(Pair.parse, names))


@dataclass(frozen=True)
class Job:
    """One run to do."""

    plan: Plan
    settings: Settings
    pair: Pair
    path: PathKind

    @property
    def key(self) -> tuple[str, Pair, PathKind]:
        return self.settings.key(), self.pair, self.path

    @property
    def cost(self) -> float:
        """In arbitrary units: tokens times bytes of the model; one at a time takes about twice as long."""
        tokens = self.settings.context * self.settings.chunks
        return tokens * self.plan.model.stat().st_size * (2 if self.path == "decode" else 1)


@dataclass
class Session:
    """How runs are done, and who is told about them."""

    program: perplexity.Program
    store: Store
    bases: perplexity.BaseCache
    threads: int
    source: runs.Json
    keep_bases: bool = True
    on_start: Callable[[str, float], None] = lambda _name, _cost: None  # what it is, and its cost
    on_progress: Callable[[float], None] = lambda _cost: None  # cost of the part of it that is done
    on_record: Callable[[Record], None] = lambda _: None

    def settings(self, plan: Plan, context: int) -> Settings:
        for file in (plan.model, plan.text):
            runs.check_file(file)
        if context < 1 or self.threads < 1:
            raise EvalError("want a context of at least one token, and at least one thread")
        chunks = plan.chunks(context)
        settings = Settings(
            model=plan.model.name,
            model_sha256=runs.sha256(plan.model),
            text=plan.text.name,
            text_sha256=runs.sha256(plan.text),
            context=context,
            chunks=chunks,
            threads=self.threads,
            flags=perplexity.options(context, *plan.flags),
            binary_sha256=self.program.sha256(),
            cpu=runs.cpu(),
            gpu=self.program.devices(),
        )
        if settings.scored < 100:
            raise EvalError(f"{settings.scored} scored tokens: {perplexity.PROGRAM} wants 100")
        return settings

    def jobs(self, plans: Sequence[Plan]) -> list[Job]:
        """All runs of the plans, those of one base together."""
        found: dict[tuple[str, Pair, PathKind], Job] = {}
        for plan in plans:
            self.program.check_flags(plan.flags, perplexity.OWN)
            for context in plan.contexts:
                settings = self.settings(plan, context)
                for pair in plan.pairs:  # before minutes of work
                    self.program.check(pair, settings.flags)
                for path, pair in itertools.product(plan.paths, plan.pairs):
                    job = Job(plan, settings, pair, path)
                    found.setdefault(job.key, job)
        return list(found.values())

    def run(self, jobs: Sequence[Job]) -> None:
        """Do what is not in the store yet; each result is in the store before the next run begins."""
        with self.store.session(), contextlib.closing(self.bases):
            for n, job in enumerate(jobs):
                if job.key not in {r.key for r in self.store.read()[0]}:
                    self.on_record(self._run(job))
                if not self.keep_bases and job.settings not in {later.settings for later in jobs[n + 1 :]}:
                    self.bases.drop(job.settings)  # gigabytes

    def _run(self, job: Job) -> Record:
        s, plan = job.settings, job.plan

        def progress(chunks: int) -> None:
            self.on_progress(job.cost * min(1.0, chunks / s.chunks))

        self.on_start(f"{s.model}, {s.context} tokens: f16 logits", 0)
        base = self.bases.get(self.program, s, plan.model, plan.text)
        self.on_start(f"{s.model}, {s.context} tokens: {job.pair}, {job.path}", job.cost)
        start = time.monotonic()
        with perplexity.unchanged(s, self.program, plan.model, plan.text):
            cache, figures, chunk_kld = perplexity.compare(
                self.program,
                plan.model,
                base,
                job.pair,
                job.path,
                context=s.context,
                chunks=s.chunks,
                threads=s.threads,
                flags=s.flags,
                progress=progress,
            )
        record = Record(
            settings=s,
            pair=job.pair,
            path=job.path,
            cache=cache,
            figures=figures,
            chunk_kld=chunk_kld,
            source=self.source,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 1),
        )
        self.store.append(record)
        return record
