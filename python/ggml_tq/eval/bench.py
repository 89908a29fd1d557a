"""Speed of cache types over depth, by the fork's llama-bench or llama-batched-bench.

Speeds drift: clocks, temperature, other work. So types are not measured one after the other but in *rounds*: a round
runs every pair of types once at one depth, f16 among them, beginning with another pair each time. Ratios to f16 are
taken within rounds. A round is recorded when it is whole, so whatever stops the command costs at most one.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggml_tq.eval import runs
from ggml_tq.eval.perplexity import Printed, Program, printed_cache, unchanged
from ggml_tq.eval.runs import EvalError, Json, JsonLines, Pair

BENCH = "llama-bench"
BATCHED = "llama-batched-bench"
DEPTHS = (0, 2048, 8192, 32768)
F16 = Pair("f16", "f16")
OWN = ("-ctk", "-ctv", "-fa", "-t")  # options that `arguments` sets
BENCH_OWN = (*OWN, "-p", "-n", "-pg", "-d", "-r", "-o")
BATCHED_OWN = (*OWN, "-c", "-npp", "-ntg", "-npl", "--output-format", "-lv")


@dataclass(frozen=True)
class Settings(runs.Identity):
    """What rounds must share to be put together."""

    model: str
    model_sha256: str
    program: str  # BENCH or BATCHED
    binary_sha256: str
    pairs: tuple[str, ...]
    prompt: int  # tokens of a prompt that is measured behind the depth; llama-bench only
    generate: int  # tokens
    parallel: tuple[int, ...]  # numbers of sequences; llama-batched-bench only
    threads: int
    flags: tuple[str, ...]
    omp: tuple[str, ...]  # OMP_* of the environment
    cpu: str
    gpu: str  # devices that are not the CPU; empty: none


@dataclass(frozen=True)
class Run:
    """One pair of types in a round."""

    pair: Pair
    cache: Printed  # of the context that generates
    speeds: dict[str, float]  # by name of the test (pp512, tg128, tg128 x4), in tokens a second
    backends: str  # as the program says; empty where it does not
    command: tuple[str, ...]  # without folders
    started: str  # UTC, ISO 8601
    load: float  # load average of the last minute at the start


@dataclass(frozen=True)
class Round(runs.Stored):
    """All pairs once at one depth."""

    settings: Settings
    depth: int
    repetition: int
    runs: tuple[Run, ...]
    source: Json

    @property
    def key(self) -> tuple[str, int, int]:
        return self.settings.key(), self.depth, self.repetition


def store(path: Path) -> JsonLines[Round]:
    return JsonLines(path, Round)


def arguments(s: Settings, pair: Pair, depth: int) -> list[str]:
    """Options of one run, after the model's."""
    k, v = pair.types
    types = ["-ctk", k, "-ctv", v, "-fa", "on", "-t", str(s.threads)]
    if s.program == BENCH:  # -v prints the cache; nothing more is printed while a test runs
        sizes = ["-p", str(s.prompt), "-n", str(s.generate), "-d", str(depth), "-r", "1", "-o", "jsonl", "-v"]
    else:
        cells = -(-max(s.parallel) * (depth + s.generate) // 256) * 256
        counts = ["-npp", str(depth), "-ntg", str(s.generate), "-npl", ",".join(map(str, s.parallel))]
        sizes = ["-c", str(cells), *counts, "--output-format", "jsonl", "-lv", "4"]
    return [*types, *sizes, *s.flags]


def speeds(log: str, s: Settings) -> tuple[dict[str, float], str, int]:
    """Tokens a second of each test, the backends, and the number of contexts. Raises EvalError if a test is missing."""
    rows: list[Json] = [
        json.loads(line) for line in re.findall(r"^[^{\n]*(\{\"(?:build_commit|n_kv_max)\".*\})$", log, re.M)
    ]
    named: list[tuple[str, float]] = []
    if s.program == BENCH:
        wanted = [f"{kind}{n}" for kind, n in (("pp", s.prompt), ("tg", s.generate)) if n]
        for row in rows:
            named.append((f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}", row["avg_ts"]))
    else:
        wanted = [f"{kind} x{n}" for n in s.parallel for kind in ("pp", f"tg{s.generate}")]
        for row in rows:
            named += [(f"pp x{row['pl']}", row["speed_pp"]), (f"tg{row['tg']} x{row['pl']}", row["speed_tg"])]
    if [name for name, _ in named] != wanted:  # also where flags make the program run several tests
        got = ", ".join(name for name, _ in named) or "nothing"
        raise EvalError(f"{s.program} gave results of {got}, not of {', '.join(wanted)}")
    backends = {row.get("backends", "") for row in rows}
    return dict(named), ", ".join(sorted(backends)), len(rows) if s.program == BENCH else 1


def _cache(log: str, pair: Pair, contexts: int) -> Printed:
    """The cache of the last of some contexts."""
    printed = printed_cache(log, pair)
    return dataclasses.replace(printed, parts=printed.parts[-(len(printed.parts) // contexts) :])


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    model: Path
    pairs: tuple[Pair, ...]
    depths: tuple[int, ...] = DEPTHS
    prompt: int = 512
    generate: int = 128
    parallel: tuple[int, ...] = ()  # not empty: llama-batched-bench
    repetitions: int = 5
    threads: int = 1
    flags: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise EvalError where the plan makes no sense."""
        runs.check_file(self.model)
        if not self.depths or min(self.depths) < 0 or max(self.depths) >= 2**31:
            raise EvalError("depths are numbers of tokens, 0 or more, below 2^31")
        if self.parallel and (min(self.depths) < 1 or min(self.parallel) < 1):
            raise EvalError("with --parallel want depths and numbers of sequences of at least 1")
        if (
            min(self.prompt, self.generate) < 0
            or self.prompt + self.generate == 0
            or (self.parallel and not self.generate)
        ):
            raise EvalError("want a prompt (-p) or tokens to generate (-n)")
        if self.repetitions < 1 or self.threads < 1:
            raise EvalError("want at least one repetition and one thread")


@dataclass
class Session:
    """How rounds are run, and who is told of each run and round."""

    bin_dir: Path
    rounds: JsonLines[Round]
    build: str = ""  # what the user says of the programs
    on_start: Callable[[Pair, int, int], None] = lambda _pair, _depth, _repetition: None
    on_round: Callable[[Round], None] = lambda _: None

    def settings(self, plan: Plan) -> Settings:
        """Raises EvalError where the plan cannot be done."""
        plan.check()
        program = self._program(BATCHED if plan.parallel else BENCH)
        program.check_flags(plan.flags, BATCHED_OWN if plan.parallel else BENCH_OWN)
        pairs = tuple(dict.fromkeys([F16, *plan.pairs]))
        for pair in pairs:  # an unknown type is to stop us now, not after an hour
            program.check(pair, plan.flags)
        return Settings(
            model=plan.model.name,
            model_sha256=runs.sha256(plan.model),
            program=program.path.name,
            binary_sha256=program.sha256(),
            pairs=tuple(map(str, pairs)),
            prompt=0 if plan.parallel else plan.prompt,
            generate=plan.generate,
            parallel=plan.parallel,
            threads=plan.threads,
            flags=plan.flags,
            omp=tuple(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OMP_")),
            cpu=runs.cpu(),
            gpu=program.devices(),
        )

    def _program(self, name: str) -> Program:
        return Program(self.bin_dir, name)

    def run(self, plan: Plan, settings: Settings) -> None:
        """Run the rounds that are not recorded yet: all depths, then again."""
        with self.rounds.session():
            done = {r.key for r in self.rounds.read()[0]}
            for repetition in range(plan.repetitions):
                for depth in plan.depths:
                    if (settings.key(), depth, repetition) not in done:
                        self._round(plan, settings, depth, repetition)

    def _round(self, plan: Plan, s: Settings, depth: int, repetition: int) -> None:
        program = self._program(s.program)
        first = repetition % len(s.pairs)
        found = []
        for name in s.pairs[first:] + s.pairs[:first]:
            self.on_start(Pair.parse(name), depth, repetition)
            with unchanged(s, program, plan.model):
                found.append(self._run(plan.model, s, Pair.parse(name), depth))
        result = Round(s, depth, repetition, tuple(found), runs.source(program.version(), self.build))
        self.rounds.append(result)
        self.on_round(result)

    def _run(self, model: Path, s: Settings, pair: Pair, depth: int) -> Run:
        args = arguments(s, pair, depth)
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        load = round(os.getloadavg()[0], 2)
        log = self._program(s.program).run(["-m", model, *args], share_cores=False, extra_environment=pair.environment)
        found, backends, contexts = speeds(log, s)
        return Run(
            pair=pair,
            cache=_cache(log, pair, contexts),
            speeds=found,
            backends=backends,
            command=(s.program, "-m", model.name, *args),
            started=started,
            load=load,
        )
