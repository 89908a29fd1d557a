"""Fixtures: the built programs, the test model, random models, and a running llama-server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ggml_tq.eval.perplexity import Base, Program, compare, compute_base, options
from ggml_tq.eval.runs import Figure, Pair, PathKind

REPO = Path(__file__).resolve().parents[2]
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
THREADS = "2"
Json = dict[str, Any]

# the user's own settings must not reach the programs
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "GGML_"))}
# idle threads sleep rather than spin: twice as fast where other work shares the cores
ENV["OMP_WAIT_POLICY"] = "passive"
# llama.cpp's INFO messages (buffer sizes, attn_rot) show from this verbosity on
VERBOSE = ("-lv", "4")


@dataclass(frozen=True)
class Result:
    """What a program left behind."""

    rc: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def ok(self) -> Result:
        assert self.rc == 0, f"exit status {self.rc}\n{self.text}"
        return self

    def failed(self) -> Result:
        assert self.rc > 0, f"exit status {self.rc} (negative: a signal)\n{self.text}"
        return self

    def number(self, pattern: str) -> float:
        found = re.search(pattern, self.text)
        assert found, f"no {pattern!r} in\n{self.text}"
        return float(found[1])


class Server:
    """A running llama-server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def request(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def complete(self, prompt: str | list[int], n: int, slot: int = -1, **options: object) -> Json:
        """A greedy completion of exactly n tokens."""
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "id_slot": slot}
        status, answer = self.request("POST", "/completion", body | options)
        assert status == 200, answer
        return answer

    def slot(self, slot: int, action: str, filename: str) -> tuple[int, Json]:
        return self.request("POST", f"/slots/{slot}?action={action}", {"filename": filename})

    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass(frozen=True)
class Greedy:
    """What llama-completion is to continue."""

    prompt: str = "Once upon a time there was"
    n: int = 16
    ctx: int = 256
    cache: tuple[str, str] = ("f16", "f16")

    def args(self, model: Path) -> tuple[object, ...]:
        """Arguments for greedy text of n tokens, and nothing else on stdout."""
        fixed = ("-no-cnv", "--temp", 0, "--ignore-eos", "--no-display-prompt", "--no-warmup", "-t", THREADS)
        types = ("-ctk", self.cache[0], "-ctv", self.cache[1])
        return ("-m", model, "-p", self.prompt, "-n", self.n, "-c", self.ctx, *types, *fixed)


class Fork:
    """The programs of one build."""

    def __init__(self, bin_dir: Path) -> None:
        self.bin_dir = bin_dir

    def refuses(self, message: str, name: str, *args: object) -> None:
        """Ends by itself with a status and a message that matches: no crash, no silence."""
        result = self.run(name, *args, last=message).failed()
        assert re.search(message, result.text), f"no {message!r} in\n{result.text}"

    def program(self, name: str) -> str:
        path = self.bin_dir / name
        if not path.is_file():
            pytest.fail(f"{path} is missing: build first, or set GGML_TQ_BUILD")
        return str(path)

    def run(self, name: str, *args: object, last: str = "", timeout: float = 120, cwd: Path | None = None) -> Result:
        """Run to the end.

        Upstream's programs log from a thread of their own and end without waiting for it, so now and then
        the end of the output is lost. A run whose output has no match for `last`, the last message, is
        repeated.
        """
        for _ in range(5):
            done = subprocess.run(
                [self.program(name), *map(str, args)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                cwd=cwd,
                env=ENV,
            )
            out, err = (raw.decode(errors="replace") for raw in (done.stdout, done.stderr))
            result = Result(done.returncode, out, err)
            if result.rc < 0 or re.search(last, result.text):
                break
        return result

    def complete(self, model: Path, *args: object, **options: Any) -> Result:  # noqa: ANN401
        """Greedy text on stdout; the options are those of Greedy."""
        return self.run("llama-completion", *Greedy(**options).args(model), *args, last="graphs reused").ok()

    def refuses_completion(self, message: str, model: Path, *args: object, **options: Any) -> None:  # noqa: ANN401
        self.refuses(message, "llama-completion", *Greedy(**options).args(model), *args)

    @contextlib.contextmanager
    def background(self, log: Path, name: str, *args: object) -> Iterator[subprocess.Popen[bytes]]:
        """A program that runs until the end of the block."""
        with log.open("wb") as f:
            process = subprocess.Popen(
                [self.program(name), *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=ENV,
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def server(self, log: Path, *args: object) -> Iterator[Server]:
        port = free_port()
        fixed = ("--host", "127.0.0.1", "--port", port, "-t", THREADS, "--no-warmup")
        with self.background(log, "llama-server", *fixed, *args) as process:
            server = Server(process, port, log)
            wait_until(lambda: _healthy(server), process, log)
            yield server


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"did not start (exit status {process.poll()}):\n{log.read_text(errors='replace')}")
        time.sleep(0.1)


def _healthy(server: Server) -> bool:
    try:
        return server.request("GET", "/health")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.fixture(scope="session")
def fork() -> Fork:
    build = Path(os.environ.get("GGML_TQ_BUILD") or REPO / "build")
    if not (build / "bin").is_dir():
        pytest.fail(f"no programs in {build / 'bin'}: build first, or set GGML_TQ_BUILD")
    return Fork(build / "bin")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    path = Path(os.environ.get("GGML_TQ_DATA") or REPO / "models") / SMOLLM2
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `ggml-tq fetch smollm2`, or set GGML_TQ_DATA")
    return path


PROSE = """\
The ferry to the island left twice a day, once at seven in the morning and once at four in the
afternoon, and in the winter it did not leave at all when the wind came from the north. My
grandmother had been born there, in the last house before the lighthouse, and she used to say that
the whole village could be read like a clock. When the baker opened his shutters it was five. When
the school bell rang it was eight. When the boats came back, one after another, low in the water and
followed by gulls, it was time to put the potatoes on the stove.

She left at nineteen to work in the telephone exchange of the nearest town, where forty women sat in
two rows and connected one voice to another with short red cords. It was there that she met my
grandfather, although for almost a year she knew him only as the number of the shipping office,
which asked every Friday for a line to the capital. He thought that she sounded stern. She thought
that he sounded tired. When they finally met, at a concert in the church hall, neither of them could
think of anything to say, and they listened to the whole second half in silence.

The exchange was replaced by machines in 1961. The machines needed a cool, dry room and a technician
who came once a month with a case of small brushes; the forty women were thanked in a letter and
given a clock each. My grandmother's clock stood on the shelf over the kitchen door until she died,
and it was always four minutes slow. She refused to have it corrected. She said that in those four
minutes she had time to think about what she was going to do next.

When I was ten I spent a summer with her on the island, because she had decided to go back and see
what was left. The last house before the lighthouse belonged to a painter from the city, who let us
drink coffee in the garden and who had painted the door yellow. The baker's shop was a museum with
three rooms: one for fishing, one for weaving, and one for the war. The school was closed, and the
children took the morning ferry with their bags on their knees. But the bell was still there, in its
little wooden tower, and a woman came out at eight o'clock and rang it for nobody.

In the evening we walked to the harbour. There were only two boats, and they brought crabs rather
than herring, and the crabs went straight into a white truck that waited with its engine running. My
grandmother sat down on a bollard and looked at the water for a long time. Then she told me that the
sea was exactly the same height as before, and that she had been a little afraid that it would not
be. I asked her whether she was sad. She thought about it for about four minutes. No, she said, she
was not sad, but she was going to need a new way to tell the time.
"""


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE * 2)
    return path


class Divergence:
    """Runs of llama-perplexity on the prose, against the logits of the same model with an f16 cache."""

    def __init__(self, fork: Fork, prose: Path, folder: Path) -> None:
        self.fork, self.prose, self.folder = fork, prose, folder
        self.bases: dict[tuple[Path, int, int], Base] = {}

    def base(self, model: Path, ctx: int, chunks: int) -> Base:
        key = (model, ctx, chunks)
        if key not in self.bases:
            self.bases[key] = compute_base(
                Program(self.fork.bin_dir),
                model,
                self.prose,
                self.folder / f"{len(self.bases)}.logits",
                context=ctx,
                chunks=chunks,
                threads=int(THREADS),
                flags=options(ctx),
            )
        return self.bases[key]

    def figures(
        self,
        model: Path,
        cache: tuple[str, str],
        *args: object,
        ctx: int = 256,
        chunks: int = 1,
        path: PathKind = "batched",
    ) -> dict[str, Figure]:
        """All figures of one run; the effective types are checked."""
        _, found, _ = compare(
            Program(self.fork.bin_dir),
            model,
            self.base(model, ctx, chunks),
            Pair(*cache),
            path,
            context=ctx,
            chunks=chunks,
            threads=int(THREADS),
            flags=options(ctx, *map(str, args)),
        )
        return found

    def measure(self, model: Path, cache: tuple[str, str], *args: object, ctx: int = 256, chunks: int = 1) -> float:
        """Mean KL divergence of the next-token distributions."""
        kld = self.figures(model, cache, *args, ctx=ctx, chunks=chunks)["kld"][0]
        assert kld is not None, f"{cache}: the divergence is not finite"
        return kld


@pytest.fixture(scope="session")
def divergence(fork: Fork, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Divergence:
    return Divergence(fork, prose, tmp_path_factory.mktemp("logits"))


@pytest.fixture(scope="session")
def random_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[object], Path]:
    """Returns the file of a random model, written at its first use."""
    import random_models  # needs gguf, which the tests of the reference do without

    folder = tmp_path_factory.mktemp("random-models")
    files: dict[object, Path] = {}

    def get(model: object) -> Path:
        if model not in files:
            files[model] = random_models.write_model(folder / f"{len(files)}.gguf", model, smollm2)
        return files[model]

    return get
