"""Drive the fork's llama-perplexity, read what it prints, and keep the logits of the f16 cache.

Divergence is measured against an f16 cache of the same program, model, text and settings. Those logits are computed
once, kept in a cache directory under a hash of all that they depend on, and verified before they are used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, BinaryIO, Protocol

from ggml_tq.eval.runs import Cache, EvalError, Figure, FigureName, Pair, PathKind, Settings, lock, sha256

PROGRAM = "llama-perplexity"
BATCH = 2048  # tokens given to the library at once, at most
UBATCH = 512  # tokens it computes at once
DECODE = ("-ub", "1")  # takes the kernel that generates text
F16 = Pair("f16", "f16")
MODEL = ("-m", "-mu", "-dr", "-hf", "-hff")  # options of every program that name a model
OWN = ("-f", "-bf", "-p", "-c", "-t", "-ctk", "-ctv", "-lv", "--chunks", "--kl-divergence", "--kl-divergence-base")

_NUMBER = r"(-?(?:[\d.]+|nan|inf))"
_VALUE = r"\s*:?\s*" + _NUMBER
_WITH_ERROR = _VALUE + r"\s*±\s*" + _NUMBER
# of the program's own summary; perplexity's and the ratio's errors are upstream's, per token
FIGURES: dict[FigureName, str] = {
    "ppl": r"Mean PPL\(Q\)" + _WITH_ERROR,
    "ppl_f16": r"Mean PPL\(base\)" + _WITH_ERROR,
    "ppl_ratio": r"Mean PPL\(Q\)/PPL\(base\)" + _WITH_ERROR,
    "kld": r"Mean    KLD" + _WITH_ERROR,
    "kld_median": r"Median  KLD" + _VALUE,
    "kld_99": r"99\.0%   KLD" + _VALUE,
    "kld_99.9": r"99\.9%   KLD" + _VALUE,
    "kld_max": r"Maximum KLD" + _VALUE,
    "same_top": r"Same top p" + _WITH_ERROR,  # percent
}
_CACHE = re.compile(
    r"llama_kv_cache: size = +[\d.]+ MiB \( *(\d+) cells.*?\), K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB"
)
_CHUNK = re.compile(r"^ *\d+(?: +" + _NUMBER + r" ± +" + _NUMBER + r"){2} +" + _NUMBER + " ±", re.M)
_CHUNKS = re.compile(r"(?:calculating perplexity|computing) over (\d+) chunks")

Progress = Callable[[int], None]  # is told how many chunks are done


def _no_progress(_: int) -> None:
    pass


def environment() -> dict[str, str]:
    """The environment of a program: the user's own settings must not reach it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "GGML_"))}


_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def start(command: Sequence[object], output: int | IO[bytes], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program, which on Linux ends with this process, whatever ends that."""
    parent = os.getpid()

    def tie() -> None:
        if _PRCTL:
            _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before
                os._exit(1)

    return subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=env,
        preexec_fn=tie if _PRCTL else None,
    )


class Program:
    """One program of one build, llama-perplexity unless another is named."""

    def __init__(self, bin_dir: Path, name: str = PROGRAM) -> None:
        self.path = bin_dir / name
        if not self.path.is_file():
            raise EvalError(f"{self.path} is missing: build first, or name the folder of the programs")

    def sha256(self) -> str:
        """Of the program and of libraries that it loads from beside it."""
        hashes = [sha256(self.path)]
        if shutil.which("ldd"):
            linked = subprocess.run(["ldd", str(self.path)], capture_output=True, text=True, check=False).stdout
            here = self.path.resolve().parent
            libraries = {Path(p).resolve() for p in re.findall(r"=> (/\S+)", linked)}
            hashes += [sha256(p) for p in sorted(libraries) if p.parent == here]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def devices(self) -> str:
        """Names of the devices that are not the CPU."""
        out = self.run(["--list-devices"])
        return ", ".join(re.findall(r"^ +\w+: (.*?) \(\d+ MiB", out, re.M))

    def version(self) -> str:
        """What the program says that it is."""
        found = re.search(r"^version: (.*)$", self.run(["--version"]), re.M)
        return found[1].strip() if found else ""

    def check(self, pair: Pair, flags: Sequence[str]) -> None:
        """Raise EvalError if the program does not take these options; cheap, as it then only prints its version."""
        k, v = pair.types
        self.run([*flags, "-ctk", k, "-ctv", v, "--version"])

    def check_flags(self, flags: Sequence[str], own: Iterable[str]) -> None:
        """Raise EvalError where a user's flag is one of our own, by any of the names that the program's help has."""
        help_text = self.run(["--help"])
        names: list[list[str]] = [
            found.replace(",", " ").split() for found in re.findall(r"^ *(-[-\w]+(?:, +-[-\w]+)*)", help_text, re.M)
        ]
        taken = {name for option in names for name in option if not {*own, *MODEL}.isdisjoint(option)}
        for flag in flags:
            name = flag.partition("=")[0]
            if (name.replace("_", "-") if name.startswith("--") else name) in taken:
                raise EvalError(f"--flags: {name} is set by the command itself")

    def run(
        self,
        args: Sequence[object],
        on_output: Callable[[str], None] = lambda _: None,
        *,
        share_cores: bool = True,
        extra_environment: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Run to the end and return all it printed. Raises EvalError if it fails.

        With `share_cores` idle threads sleep rather than spin, for other work's sake.
        """
        env = environment() | ({"OMP_WAIT_POLICY": "passive"} if share_cores else {}) | dict(extra_environment)
        process = start([self.path, *args], subprocess.PIPE, env)
        assert process.stdout is not None
        raw = b""
        try:
            while block := os.read(process.stdout.fileno(), 1 << 16):
                raw += block
                on_output(raw.decode(errors="replace"))
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()
        text = raw.decode(errors="replace")
        if process.returncode != 0:
            raise EvalError(f"{self.path.name} failed with status {process.returncode}: {reason(text)}")
        return text


class Hashes(Protocol):
    """Settings that name files by their hashes."""

    @property
    def binary_sha256(self) -> str: ...
    @property
    def model_sha256(self) -> str: ...


@contextlib.contextmanager
def unchanged(settings: Hashes, program: Program, model: Path, text: Path | None = None) -> Iterator[None]:
    """Around a run: raises EvalError, before and after, unless its files are those that the settings name."""

    def check() -> None:
        found = [(program.path, "binary", program.sha256()), (model, "model", sha256(model))]
        if text is not None:
            found.append((text, "text", sha256(text)))
        for path, name, digest in found:
            if digest != getattr(settings, f"{name}_sha256"):
                raise EvalError(f"{path} has changed meanwhile: start again")

    check()
    yield
    check()


def reason(text: str) -> str:
    """The line of a log that says what went wrong: the first error, or else the last line."""
    errors: list[str] = re.findall(r"^[\d.]+ E (.*)$", text, re.M) + re.findall(r"^error\b[: ]*(.*)$", text, re.M)
    lines = [line for line in text.splitlines() if line.strip()]
    return (errors or lines[-1:] or ["it printed nothing"])[0].strip()


def options(context: int, *flags: str) -> tuple[str, ...]:
    """Options of a run besides its files, sizes and types; the later one wins where an option is given twice.

    One sequence a batch, so that each chunk has the whole cache to itself; -fit would change sizes to what is free.
    """
    batch = min(context, BATCH)
    sizes = ("-b", str(batch), "-ub", str(min(batch, UBATCH)))
    return (*sizes, "-fa", "on", "-fit", "off", "--no-warmup", *flags)


def _args(model: Path, context: int, threads: int, flags: Sequence[str]) -> list[object]:
    return ["-m", model, "-c", context, "-t", threads, *flags, "-lv", 4]  # -lv 4 prints the cache


@dataclass(frozen=True)
class Part:
    """One cache as llama_kv_cache printed it; sliding-window layers have one of their own."""

    cells: int
    mib_k: float
    mib_v: float


@dataclass(frozen=True)
class Printed:
    """The effective types and sizes."""

    k: str
    v: str
    parts: tuple[Part, ...]


def printed_cache(log: str, pair: Pair) -> Printed:
    """Read the effective cache; raises EvalError unless its types are those of `pair`.

    A name that stands for a type by role (tq3) is accepted for each type of its family (tq3_qjl).
    """
    found = _CACHE.findall(log)
    if not found:
        raise EvalError("the program did not print its cache types")
    for _, k, _, v, mib_v in found:
        one_tensor = float(mib_v) == 0  # MLA: keys and values together, of the key's type
        want_k, want_v = pair.types
        for role, wanted, printed in (("K", want_k, k), ("V", want_k if one_tensor else want_v, v)):
            if printed != wanted and not printed.startswith(wanted + "_"):
                raise EvalError(f"{role} of type {wanted} was asked for, the cache is {printed}")
    if len({(k, v) for _, k, _, v, _ in found}) != 1:
        raise EvalError(f"caches of several types: {', '.join(f'{k}/{v}' for _, k, _, v, _ in found)}")
    parts = tuple(Part(int(cells), float(mib_k), float(mib_v)) for cells, _, mib_k, _, mib_v in found)
    return Printed(found[0][1], found[0][3], parts)


def effective_cache(of: Printed, f16: Printed) -> Cache:
    """Bits a value from the sizes: the f16 cache of as many cells takes 16."""
    if len(of.parts) != len(f16.parts):
        raise EvalError(f"the context has {len(of.parts)} caches, with f16 it has {len(f16.parts)}")
    # a sliding window's cells depend on the batch
    cells = [a.cells / b.cells for a, b in zip(of.parts, f16.parts, strict=True)]
    k, v = sum(p.mib_k for p in of.parts), sum(p.mib_v for p in of.parts)
    k16 = sum(p.mib_k * n for p, n in zip(f16.parts, cells, strict=True))
    v16 = sum(p.mib_v * n for p, n in zip(f16.parts, cells, strict=True))
    return Cache(
        k=of.k,
        v=of.v,
        cells=max(p.cells for p in of.parts),
        mib_k=round(k, 2),
        mib_v=round(v, 2),
        bits=round(16 * (k + v) / (k16 + v16), 3),
        bits_k=round(16 * k / k16, 3),
        bits_v=round(16 * v / v16, 3) if v16 else None,
    )


def _finite(text: str) -> float | None:
    return None if text.lstrip("-") in ("nan", "inf") else float(text)


def figures(log: str) -> dict[FigureName, Figure]:
    """The summary of a --kl-divergence run."""
    found: dict[FigureName, Figure] = {}
    for name, pattern in FIGURES.items():
        match = re.search(pattern, log)
        if match is None:
            raise EvalError(f"no result from {PROGRAM}: {reason(log)}")
        values = [_finite(x) for x in match.groups()]
        found[name] = (values[0], values[1] if len(values) > 1 else None)
    return found


def chunk_means(log: str) -> tuple[float, ...]:
    """Mean KLD of each chunk, from the running mean, which is printed to 5 digits."""
    running = [_finite(m[-1]) for m in _CHUNK.findall(log)]
    if None in running:
        return ()
    sums = [0.0] + [mean * n for n, mean in enumerate(running, 1) if mean is not None]
    return tuple(round(b - a, 5) for a, b in itertools.pairwise(sums))


def _check_chunks(log: str, wanted: int) -> None:
    """The program silently computes fewer chunks where the text is short."""
    match = _CHUNKS.search(log)
    if match is None:
        raise EvalError(f"no result from {PROGRAM}: {reason(log)}")
    _check_started(log, wanted)


def _check_started(log: str, wanted: int) -> None:
    """The same, while the program runs: it says how many before it computes them."""
    match = _CHUNKS.search(log)
    if match and int(match[1]) != wanted:
        raise EvalError(f"the text has {match[1]} chunks, not {wanted}")


@dataclass(frozen=True)
class Base:
    """Logits to compare with, those of the f16 cache as a rule, with what else that run said."""

    logits: Path
    cache: Printed


def compute_base(
    program: Program,
    model: Path,
    text: Path,
    out: Path,
    *,
    context: int,
    chunks: int,
    threads: int,
    flags: Sequence[str],
    progress: Progress = _no_progress,
    pair: Pair = F16,
) -> Base:
    """Write the logits of a cache of `pair` to `out`; raises EvalError if they do not fit or the file is not whole."""
    checked = False

    def on_output(log: str) -> None:
        nonlocal checked
        if not checked and (vocab := re.search(r"n_vocab += (\d+)\n", log)):
            check_space(out.parent, logits_size(context, chunks, int(vocab[1])))
            checked = True
        _check_started(log, chunks)
        progress(len(re.findall(r"\[\d+\]", log)))

    args = [*_args(model, context, threads, flags), "-f", text, "--chunks", chunks]
    k, v = pair.types
    log = program.run(
        [*args, "-ctk", k, "-ctv", v, "--save-all-logits", out], on_output, extra_environment=pair.environment
    )
    _check_chunks(log, chunks)
    if "Final estimate" not in log:
        raise EvalError(f"no result from {PROGRAM}: {reason(log)}")
    check_logits(out, context, chunks)
    return Base(out, printed_cache(log, pair))


def compare(
    program: Program,
    model: Path,
    base: Base,
    pair: Pair,
    path: PathKind,
    *,
    context: int,
    chunks: int,
    threads: int,
    flags: Sequence[str],
    progress: Progress = _no_progress,
) -> tuple[Cache, dict[FigureName, Figure], tuple[float, ...]]:
    """Run one pair of cache types against the base: the effective cache, the figures, the mean KLD of each chunk."""
    flags = [*flags, *(DECODE if path == "decode" else ())]
    k, v = pair.types
    args = [*_args(model, context, threads, flags), "-ctk", k, "-ctv", v]
    log = program.run(
        [*args, "--kl-divergence", "--kl-divergence-base", base.logits],
        lambda text: progress(len(_CHUNK.findall(text))),
        extra_environment=pair.environment,
    )
    cache = effective_cache(printed_cache(log, pair), base.cache)
    _check_chunks(log, chunks)
    return cache, figures(log), chunk_means(log)


# the file of logits: magic, then these numbers, the tokens, and for each scored token a row of 16-bit
# log-probabilities with 4 more words for their scale (tools/perplexity/perplexity.cpp)
_MAGIC = b"_logits_"
_HEADER = struct.Struct("=3i")  # n_ctx, n_vocab, n_chunk


def logits_size(context: int, chunks: int, vocab: int) -> int:
    """Bytes of a file of logits."""
    row = 2 * (2 * ((vocab + 1) // 2) + 4)
    return len(_MAGIC) + _HEADER.size + 4 * context * chunks + chunks * (context - 1 - context // 2) * row


def check_logits(path: Path, context: int, chunks: int) -> None:
    """Raise EvalError unless the file's header and size agree: the program does not notice a full disk."""
    with path.open("rb") as f:
        head = f.read(len(_MAGIC) + _HEADER.size)
    if len(head) != len(_MAGIC) + _HEADER.size or not head.startswith(_MAGIC):
        raise EvalError(f"{path} is no file of logits")
    n_ctx, vocab, n_chunk = _HEADER.unpack_from(head, len(_MAGIC))
    want, have = logits_size(n_ctx, n_chunk, vocab), path.stat().st_size
    if (n_ctx, n_chunk) != (context, chunks) or want != have:
        raise EvalError(f"{path} has {have} bytes, {want} were to be written: is the disk full?")


def check_space(folder: Path, need: int) -> None:
    """Raise EvalError unless `need` bytes fit."""
    free = shutil.disk_usage(folder).free
    if need > 0.95 * free:
        raise EvalError(
            f"the f16 logits take {need / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free: "
            "use fewer tokens or another cache directory"
        )


class BaseCache:
    """Files of f16 logits, each with a sidecar of its size, hash and printed cache.

    A file whose size or hash is not the sidecar's is computed again. What this object has given is locked until
    `close` or `drop`, so that no other process deletes it.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.say = folder, say
        self.given: dict[Path, tuple[Base, BinaryIO]] = {}

    def path(self, settings: Settings) -> Path:
        return self.folder / f"{settings.key()}.logits"

    def get(
        self, program: Program, settings: Settings, model: Path, text: Path, progress: Progress = _no_progress
    ) -> Base:
        """The base of `settings`, computed unless a whole one is there."""
        target = self.path(settings)
        try:
            while target not in self.given:
                self.folder.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    raise EvalError(f"{target} is a folder")
                shared = lock(target.with_suffix(".lock"), fcntl.LOCK_SH)
                if base := self._load(target):
                    self.given[target] = base, shared
                    break
                shared.close()
                with lock(target.with_suffix(".lock"), fcntl.LOCK_EX):  # waits for whoever computes it
                    if self._load(target) is None:
                        self._compute(target, program, settings, model, text, progress)
        except OSError as e:
            raise EvalError(f"{e.filename or target}: {e.strerror}") from e
        return self.given[target][0]

    def _compute(
        self, target: Path, program: Program, settings: Settings, model: Path, text: Path, progress: Progress
    ) -> None:
        if target.exists():
            self.say(f"{target} is damaged: computing it again")
        partial = target.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        try:
            with unchanged(settings, program, model, text):
                done = compute_base(
                    program,
                    model,
                    text,
                    partial,
                    context=settings.context,
                    chunks=settings.chunks,
                    threads=settings.threads,
                    flags=settings.flags,
                    progress=progress,
                )
            self._keep(partial, target, done)
        finally:
            partial.unlink(missing_ok=True)

    def drop(self, settings: Settings) -> None:
        """Delete the files of `settings`, unless another process uses them."""
        target = self.path(settings)
        if target in self.given:
            self.given.pop(target)[1].close()
        if not target.exists():
            return
        try:
            with lock(target.with_suffix(".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB):
                for path in (target, target.with_suffix(".json"), target.with_suffix(".lock")):
                    path.unlink(missing_ok=True)
        except BlockingIOError:
            self.say(f"{target} is kept: another process uses it")

    def close(self) -> None:
        """Let others delete what was given."""
        while self.given:
            self.given.popitem()[1][1].close()

    def _load(self, target: Path) -> Base | None:
        sidecar = target.with_suffix(".json")
        if not target.exists() or not sidecar.exists():
            return None
        try:
            data = json.loads(sidecar.read_text())
            cache = data["cache"]
            printed = Printed(cache["k"], cache["v"], tuple(Part(**part) for part in cache["parts"]))
            whole = target.stat().st_size == data["size"] and sha256(target) == data["sha256"]
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            whole = False
        return Base(target, printed) if whole else None

    def _keep(self, partial: Path, target: Path, base: Base) -> None:
        data = {"size": partial.stat().st_size, "sha256": sha256(partial), "cache": dataclasses.asdict(base.cache)}
        sidecar = target.with_suffix(".json")
        sidecar.unlink(missing_ok=True)  # never beside the logits of another time
        partial.replace(target)
        scratch = sidecar.with_suffix(".json.partial")
        scratch.write_text(json.dumps(data))
        scratch.replace(sidecar)
