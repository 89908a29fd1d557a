"""Needle in a haystack on the fork's llama-server, one record for each haystack and pair of cache types.

The server reads the haystack once; each question then continues it from the cache. The answer is scored token by
token: a request for one token after the answer so far, with the right token forced by a logit bias, which the server's
log-probabilities do not see. They say how likely the right token was and which token was the likeliest. So one pass
gives the log-probability of the right answer, and whether greedy generation says it: it does exactly if each of its
tokens is the likeliest after those before it.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import itertools
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_tq.eval import haystack, runs
from ggml_tq.eval.haystack import Frame, Query, Task, Tokens
from ggml_tq.eval.perplexity import Printed, Program, environment, printed_cache, reason, start, unchanged
from ggml_tq.eval.runs import EvalError, Json, JsonLines, Pair

PROGRAM = "llama-server"
DIGITS = 5
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
START_SECONDS = 600  # for loading a model
REQUEST_SECONDS = 3600  # for reading a haystack
OWN = ("-c", "-t", "-ctk", "-ctv", "-np", "-lv", "--host", "--port")  # options that are not the user's
_MARK = "@@question@@"
_BIAS = 1e4  # more than any two logits differ


@dataclass(frozen=True)
class Settings(runs.Identity):
    """What the haystacks of one task and length share, and all that their results depend on."""

    model: str
    model_sha256: str
    text: str
    text_sha256: str
    task: Task
    length: int  # tokens of a haystack with question and answer, at most
    depths: tuple[float, ...]
    digits: int
    seed: int
    haystack_version: int
    threads: int
    flags: tuple[str, ...]  # options of llama-server
    binary_sha256: str
    cpu: str
    gpu: str  # empty: none in use


@dataclass(frozen=True)
class Answer:
    """How the model answers one question."""

    depth: float
    key: str
    value: str
    logprobs: tuple[float, ...]  # of the right answer's tokens, each after those before it
    correct: bool  # greedy generation gives the right answer
    wrong: str  # else the first token that it gives instead

    @property
    def logprob(self) -> float:
        """Mean over the tokens of the answer, in nats."""
        return sum(self.logprobs) / len(self.logprobs)


@dataclass(frozen=True)
class Record(runs.Stored):
    """One haystack with one pair of cache types."""

    settings: Settings
    pair: Pair
    trial: int
    cache: Printed  # as the server printed it
    tokens: int  # of the haystack
    haystack: str  # digest of it and its questions
    answers: tuple[Answer, ...]  # one for each depth
    source: Json
    date: str  # UTC, ISO 8601
    seconds: float

    @property
    def key(self) -> tuple[str, Pair, int]:
        return self.settings.key(), self.pair, self.trial


def store(path: Path) -> JsonLines[Record]:
    return JsonLines(path, Record)


class Client:
    """Requests to a running llama-server. An answer that is not a success raises EvalError."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS)

    def post(self, path: str, body: Json) -> Json:
        try:
            self.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = self.connection.getresponse()
            answer: Json = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise EvalError(f"{PROGRAM} does not answer: {e!r}") from e
        if response.status != 200:
            raise EvalError(f"{PROGRAM}: {answer.get('error', {}).get('message', answer)}")
        return answer

    def healthy(self) -> bool:
        try:
            self.connection.request("GET", "/health")
            response = self.connection.getresponse()
            response.read()
            return response.status == 200
        except (OSError, http.client.HTTPException):
            self.connection.close()  # the next request opens it again
            return False

    def tokenize(self, text: str) -> Tokens:
        """Tokens of a text; names of special tokens in it, as in a chat template, become those tokens."""
        tokens: Tokens = self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})[
            "tokens"
        ]
        return tokens

    def frame(self) -> Frame:
        """The model's chat template around a message."""
        messages = [{"role": "user", "content": _MARK}]
        before, mark, after = self.post("/apply-template", {"messages": messages})["prompt"].partition(_MARK)
        if not mark:
            raise EvalError("the model's chat template drops the message")
        return Frame(before, after)

    def read(self, prompt: Tokens) -> None:
        """Put a prompt into the cache, whatever is there now."""
        self.post("/completion", {"prompt": prompt, "n_predict": 0, "cache_prompt": False})

    def forced(self, prompt: Tokens, token: int) -> tuple[float, int, str]:
        """Log-probability of `token` after the prompt, and the likeliest token's id and text."""
        body = {
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": 1,
            "cache_prompt": True,
            "logit_bias": [[token, _BIAS]],
        }
        answer = self.post("/completion", body)
        try:
            (first,) = answer["completion_probabilities"]
            (top,) = first["top_logprobs"]
            if first["id"] != token:
                raise EvalError(f"{PROGRAM} gave token {first['id']} where {token} was forced")
            return first["logprob"], top["id"], top["token"]
        except (KeyError, ValueError, TypeError) as e:
            raise EvalError(f"{PROGRAM} gave no log-probabilities: {e!r}") from e

    def ask(self, prefix: Tokens, query: Query) -> Answer:
        """Ask about a haystack that is in the cache."""
        logprobs: list[float] = []
        wrong: str | None = None
        for i, token in enumerate(query.answer):
            logprob, top, text = self.forced(prefix + query.question + query.answer[:i], token)
            logprobs.append(logprob)
            if top != token and wrong is None:
                wrong = text
        return Answer(query.depth, query.key, query.value, tuple(logprobs), wrong is None, wrong or "")


def options(length: int, *flags: str) -> tuple[str, ...]:
    """Options of the server besides model, threads and types. One slot, and nothing kept outside it.

    The cache is no longer than the haystack needs. A user's flags come last, so that they win.
    """
    cells = -(-length // 256) * 256
    fixed = ("-np", "1", "-fa", "on", "-fit", "off", "--cache-ram", "0", "--no-context-shift", "--no-warmup")
    return ("-c", str(cells), *fixed, *flags)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def serve(
    program: Program, model: Path, pair: Pair, threads: int, flags: Sequence[str]
) -> Iterator[tuple[Client, Printed]]:
    """A server on the loopback interface with one pair of cache types, and the cache that it printed."""
    port = _free_port()
    k, v = pair.types
    args = ["-m", model, "-t", threads, "-ctk", k, "-ctv", v, *flags, "-lv", 4]
    command = [program.path, "--host", "127.0.0.1", "--port", port, *args]
    with tempfile.TemporaryFile() as log:

        def printed() -> str:
            return os.pread(log.fileno(), 1 << 24, 0).decode(errors="replace")

        # idle threads sleep, for other work shares the cores
        process = start(command, log, environment() | {"OMP_WAIT_POLICY": "passive"} | pair.environment)
        try:
            client = Client(port)
            deadline = time.monotonic() + START_SECONDS
            while not client.healthy():
                if process.poll() is not None:
                    raise EvalError(f"{PROGRAM} failed with status {process.returncode}: {reason(printed())}")
                if time.monotonic() > deadline:
                    raise EvalError(f"{PROGRAM} was not ready in {START_SECONDS} seconds")
                time.sleep(0.05)
            yield client, printed_cache(printed(), pair)
        except EvalError as e:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # it may be about to end
            died = process.poll()
            if died is not None and died < 0:
                raise EvalError(f"{PROGRAM} was ended by signal {-died}") from e
            raise
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Plan:
    """Haystacks to build, and the pairs of cache types that read them."""

    model: Path
    text: Path
    pairs: tuple[Pair, ...]
    tasks: tuple[Task, ...] = haystack.TASKS
    lengths: tuple[int, ...] = (512, 1024)
    depths: tuple[float, ...] = DEPTHS
    trials: int = 8
    seed: int = 0
    digits: int = DIGITS
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One haystack to read."""

    settings: Settings
    pair: Pair
    trial: int

    @property
    def key(self) -> tuple[str, Pair, int]:
        return self.settings.key(), self.pair, self.trial


@dataclass
class Session:
    """How haystacks are read, and who is told of each."""

    program: Program
    records: JsonLines[Record]
    threads: int
    source: Json
    on_record: Callable[[Record], None] = lambda _: None

    def jobs(self, plan: Plan) -> list[Job]:
        """All of a plan: by length, then pair, then task. Raises EvalError where a plan makes no sense."""
        for file in (plan.model, plan.text):
            runs.check_file(file)
        if plan.trials < 1 or self.threads < 1:
            raise EvalError("want at least one trial and one thread")
        if not plan.depths or not all(0 <= d <= 1 for d in plan.depths) or len(set(plan.depths)) < len(plan.depths):
            raise EvalError("depths are different numbers from 0 to 1")
        if not 2 <= plan.digits <= 12:
            raise EvalError("want 2 to 12 digits")
        self.program.check_flags(plan.flags, OWN)
        for pair in plan.pairs:  # an unknown type is to stop us now, not after hours
            self.program.check(pair, plan.flags)
        shared: Json = {
            "model": plan.model.name,
            "model_sha256": runs.sha256(plan.model),
            "text": plan.text.name,
            "text_sha256": runs.sha256(plan.text),
            "depths": plan.depths,
            "digits": plan.digits,
            "seed": plan.seed,
            "haystack_version": haystack.VERSION,
            "threads": self.threads,
            "binary_sha256": self.program.sha256(),
            "cpu": runs.cpu(),
            "gpu": self.program.devices(),
        }
        return [
            Job(Settings(task=task, length=length, flags=options(length, *plan.flags), **shared), pair, trial)
            for length in plan.lengths
            for pair in plan.pairs
            for task in plan.tasks
            for trial in range(plan.trials)
        ]

    def run(self, plan: Plan, jobs: Sequence[Job]) -> None:
        """Do what is not recorded yet; each record is on disk before the next haystack is read."""
        with self.records.session():
            done = {r.key for r in self.records.read()[0]}
            pool = haystack.sentences(plan.text.read_text(encoding="utf-8", errors="replace"))
            missing = [j for j in jobs if j.key not in done]
            for (flags, pair), group in itertools.groupby(missing, lambda j: (j.settings.flags, j.pair)):
                with serve(self.program, plan.model, pair, self.threads, flags) as (client, cache):
                    frame = client.frame()
                    for job in group:
                        with unchanged(job.settings, self.program, plan.model, plan.text):
                            record = self._read(job, client, cache, frame, pool)
                        self.records.append(record)
                        self.on_record(record)

    def _read(self, job: Job, client: Client, cache: Printed, frame: Frame, pool: Sequence[str]) -> Record:
        s = job.settings
        start = time.monotonic()
        seed = f"{s.seed}/{s.task}/{s.length}/{job.trial}"
        hay = haystack.build(s.task, s.length, s.depths, seed, pool, frame, client.tokenize, s.digits)
        client.read(hay.prefix)
        return Record(
            settings=s,
            pair=job.pair,
            trial=job.trial,
            cache=cache,
            tokens=len(hay.prefix),
            haystack=hay.digest(),
            answers=tuple(client.ask(hay.prefix, q) for q in hay.queries),
            source=self.source,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 1),
        )
