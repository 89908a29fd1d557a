"""What a quality run is, and the JSON-lines file that keeps the results.

A result is only worth what is known about it, so a record holds everything that the numbers depend on: the hashes
of model, text and program, threads, flags, processor. These are the *settings*; two results are comparable if their
settings are equal. The cache types and the path are what a comparison varies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

SCHEMA = 1
FigureName = Literal["ppl", "ppl_f16", "ppl_ratio", "kld", "kld_median", "kld_99", "kld_99.9", "kld_max", "same_top"]
REPO = Path(__file__).resolve().parents[3]
LABELS = frozenset({"model", "text"})  # names of files; their hashes are what counts

NO_ROTATION = "-norot"

PathKind = Literal["batched", "decode"]
PATHS: tuple[PathKind, ...] = ("batched", "decode")
Json = dict[str, Any]
Figure = tuple[float | None, float | None]  # value and standard error; None: not finite, or no error given


class EvalError(Exception):
    """An evaluation that cannot be done or trusted; the message is one line for the user."""


_HASHES: dict[tuple[int, ...], str] = {}  # by device, inode, size and time


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; read again only if it is another file, or its size or time has changed."""
    try:
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in _HASHES:
            digest = hashlib.sha256()
            with path.open("rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
            _HASHES[key] = digest.hexdigest()
        return _HASHES[key]
    except OSError as e:
        raise EvalError(f"{path}: {e.strerror}") from e


def check_file(path: Path) -> None:
    """Raise EvalError unless this is a file."""
    if not path.is_file():
        raise EvalError(f"{path} is {'no file' if path.exists() else 'missing'}")


def lock(path: Path, how: int) -> BinaryIO:
    """Open a file, which is made if it is not there, with a lock of fcntl.flock on it.

    Whoever has it exclusively may delete it: a lock counts only on the file that has the name. With LOCK_NB raises
    BlockingIOError where another has it.
    """
    while True:
        f = path.open("a+b")
        try:
            fcntl.flock(f, how)
            if path.exists() and os.path.samestat(os.fstat(f.fileno()), path.stat()):
                return f
        except BaseException:
            f.close()
            raise
        f.close()


@dataclass(frozen=True)
class Pair:
    """A cache type for keys and one for values, as on a command line.

    ``q4_0-norot``: with upstream's own rotation of keys and values off. It is one switch for both, so both say it.
    """

    k: str
    v: str

    @classmethod
    def parse(cls, text: str) -> Pair:
        """``q8_0/tq3``, or ``tq3`` for both."""
        k, slash, v = text.strip().partition("/")
        if not k or (slash and not v) or "/" in v:
            raise EvalError(f"'{text}' is no pair of cache types: want K/V, or one type for both")
        if k.endswith(NO_ROTATION) != (v or k).endswith(NO_ROTATION):
            raise EvalError(f"'{text}': {NO_ROTATION} is for both or for neither")
        return cls(k, v or k)

    @property
    def types(self) -> tuple[str, str]:
        """Of keys and values, as the programs name them."""
        return self.k.removesuffix(NO_ROTATION), self.v.removesuffix(NO_ROTATION)

    @property
    def environment(self) -> dict[str, str]:
        """What the programs need in theirs."""
        return {"LLAMA_ATTN_ROT_DISABLE": "1"} if self.k.endswith(NO_ROTATION) else {}

    def names(self, k: str, v: str) -> tuple[str, str]:
        """These effective types, and whether upstream's rotation was off."""
        off = NO_ROTATION if self.environment else ""
        return k + off, v + off

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}/{self.v}"


def whole_numbers(text: str, what: str, least: int = 0) -> tuple[int, ...]:
    """``512,1024``, in order and each once. Raises EvalError for anything else, or a number below `least`."""
    try:
        numbers = sorted({int(n) for n in text.split(",")})
    except ValueError as e:
        raise EvalError(f"'{text}' are no {what}: want whole numbers separated by commas") from e
    if numbers[0] < least:
        raise EvalError(f"'{text}' are no {what}: want {least} or more")
    return tuple(numbers)


def split_flags(text: str) -> tuple[str, ...]:
    """Options of a program as a shell splits them."""
    try:
        return tuple(shlex.split(text))
    except ValueError as e:
        raise EvalError(f"--flags '{text}': {e}") from e


@dataclass(frozen=True)
class Stored:
    """Base of what a JSON-lines file keeps."""

    def to_json(self) -> Json:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


T = TypeVar("T")
_hints = functools.cache(get_type_hints)


def from_json(cls: type[T], data: Json) -> T:
    """A dataclass from what `dataclasses.asdict` and JSON made of it, and a schema. Raises EvalError for all else."""
    try:
        data = dict(data)
        if data["schema"] != SCHEMA:
            raise EvalError(f"schema {data['schema']}; this version reads {SCHEMA}")
        del data["schema"]
        found: T = _typed(cls, data)
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise EvalError(f"not a record: {e!r}") from e


def _typed(wanted: Any, data: Any) -> Any:  # noqa: ANN401
    """JSON data as a type: dataclass, tuple, dict (of a Literal's names: all of them), optional or plain value."""
    args, origin = get_args(wanted), get_origin(wanted)
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        hints = _hints(wanted)
        if hints.keys() != data.keys():
            raise ValueError(f"{sorted(hints.keys() ^ data.keys())} of {getattr(wanted, '__name__', '')}")
        return cast(Any, wanted)(**{name: _typed(hint, data[name]) for name, hint in hints.items()})
    if origin is tuple:
        types = itertools.repeat(args[0], len(data)) if args[1:] == (...,) else args
        return tuple(_typed(t, x) for t, x in zip(types, data, strict=True))
    if origin is dict:
        if get_origin(args[0]) is Literal and data.keys() != set(get_args(args[0])):
            raise ValueError(f"{sorted(data.keys() ^ set(get_args(args[0])))}")
        return {key: _typed(args[1], x) for key, x in data.items()}
    if origin is Literal:
        if data not in args:
            raise ValueError(f"'{data}'")
        return data
    kinds = args or (wanted,)  # of a union or by itself
    if wanted is not Any and not isinstance(data, (*kinds, int) if float in kinds else kinds):
        raise TypeError(f"{data!r} for {wanted}")
    return data


@dataclass(frozen=True)
class Identity:
    """Base of settings: what results must share to be comparable."""

    def identity(self) -> Json:
        """The settings without the labels, as JSON."""
        items = dataclasses.asdict(self).items()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in items if k not in LABELS}

    def key(self) -> str:
        """Names the settings in 16 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Settings(Identity):
    """The settings of a perplexity."""

    model: str
    model_sha256: str
    text: str
    text_sha256: str
    context: int  # tokens a chunk; its second half is scored
    chunks: int
    threads: int
    flags: tuple[str, ...]  # options of llama-perplexity; the decode path adds its own
    binary_sha256: str
    cpu: str
    gpu: str  # empty: none in use

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return self.chunks * (self.context - 1 - self.context // 2)


@dataclass(frozen=True)
class Cache:
    """The cache as the runtime printed it."""

    k: str  # effective types
    v: str
    cells: int  # of the largest cache, where sliding-window layers have their own
    mib_k: float
    mib_v: float  # 0 where keys and values are one tensor
    bits: float  # a value, over keys and values: 16 times the size over that of the f16 cache
    bits_k: float
    bits_v: float | None


@dataclass(frozen=True)
class Record(Stored):
    """One result."""

    settings: Settings
    pair: Pair
    path: PathKind
    cache: Cache
    figures: dict[FigureName, Figure]
    chunk_kld: tuple[float, ...]  # mean KLD of each chunk
    source: Json  # upstream pin, commit, build
    date: str  # UTC, ISO 8601
    seconds: float

    @property
    def key(self) -> tuple[str, Pair, PathKind]:
        return self.settings.key(), self.pair, self.path

    @property
    def names(self) -> tuple[str, str]:
        return self.pair.names(self.cache.k, self.cache.v)

    def value(self, name: FigureName) -> float | None:
        return self.figures[name][0]

    def error(self, name: FigureName) -> float | None:
        return self.figures[name][1]


R = TypeVar("R", bound=Stored)


class JsonLines(Generic[R]):
    """Records in a JSON-lines file.

    A record is appended as one line, under a lock, and synchronized to disk, so a process killed at any point
    leaves whole lines and at most one half-written last line. That one is not read, and the next append removes it.
    """

    def __init__(self, path: Path, cls: type[R]) -> None:
        self.path, self.cls = path, cls
        self._held = False  # while a session lasts

    def read(self) -> tuple[list[R], str | None]:
        """All records, and the half-written last line if there is one. Raises EvalError where a line is damaged."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return [], None
        except OSError as e:
            raise EvalError(f"{self.path}: {e.strerror}") from e
        *lines, tail = raw.split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(self._parse(line))
            except EvalError as e:
                raise EvalError(f"{self.path}, line {number}: {e}") from e
        try:  # only its newline may be missing
            return [*records, self._parse(tail)], None
        except EvalError:
            return records, tail.decode(errors="replace") or None

    def _parse(self, line: bytes) -> R:
        try:
            return from_json(self.cls, json.loads(line))
        except (ValueError, RecursionError) as e:
            raise EvalError(str(e)) from e

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keep the file for this process: what it holds stays true, and it can be written.

        Raises EvalError, before any work is done, where another process has it or it cannot be written. The lock is
        a file beside it with the process' number.
        """
        place = self.path.with_name(self.path.name + ".lock")
        with contextlib.ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB))
                stack.callback(place.unlink, missing_ok=True)
                held.truncate(0)
                held.write(str(os.getpid()).encode())
                held.flush()
                self.path.open("ab").close()
            except BlockingIOError as e:
                who = place.read_text() if place.exists() else "?"
                raise EvalError(f"{self.path}: process {who} is adding to it") from e
            except OSError as e:
                raise EvalError(f"{self.path}: {e.strerror}") from e
            self._held = True
            try:
                yield
            finally:
                self._held = False
                if self.path.exists() and not self.path.stat().st_size:
                    self.path.unlink()

    def append(self, record: R) -> None:
        """Add one record; it is on disk when this returns."""
        line = json.dumps(record.to_json(), allow_nan=False).encode() + b"\n"
        with contextlib.nullcontext() if self._held else self.session():
            try:
                with self.path.open("a+b") as f:
                    whole = _whole(f.fileno())
                    f.seek(whole)
                    try:  # as in read
                        self._parse(f.read())
                        line = b"\n" + line
                    except EvalError:
                        f.truncate(whole)
                    f.write(line)
                    f.flush()
                    os.fsync(f.fileno())
                if not whole:
                    _sync_directory(self.path.parent)
            except OSError as e:
                raise EvalError(f"{self.path}: {e.strerror}") from e


class Store(JsonLines[Record]):
    """The results of perplexities."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Record)


def _whole(fd: int) -> int:
    """How many bytes of a file are whole lines."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Measured(Protocol):
    @property
    def settings(self) -> Identity: ...


def check_comparable(records: Iterable[Measured]) -> None:
    """Raise EvalError, which says what differs, unless all records have the same settings."""
    records = list(records)
    if not records:
        raise EvalError("no results")
    unlike = differences(records)
    if unlike:
        raise EvalError(f"results of different settings cannot be compared: {', '.join(unlike)}")


def differences(records: Sequence[Measured], ignored: Collection[str] = ()) -> list[str]:
    """What settings differ, and how."""
    all_settings = [r.settings.identity() for r in records]
    found = []
    for name in all_settings[0].keys() - set(ignored):
        values = list({str(s[name]): short(s[name]) for s in all_settings}.values())
        if len(values) > 1:
            found.append(f"{name} ({' / '.join(values)})")
    return sorted(found)


def short(value: object) -> str:
    text = str(value)
    return text[:8] + "…" if len(text) == 64 else text


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPO), *args], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source(version: str, build: str = "") -> Json:
    """Where results come from: the upstream pin, the commit, the version of the program, the user's note on it."""
    lock = REPO / "ggml-tq" / "fork" / "upstream.lock"
    pin = json.loads(lock.read_text()) if lock.is_file() else {}
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "upstream": {k: pin.get(k) for k in ("package", "version", "sha256", "commit")},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else status != "",
        "version": version,
        "build": build,
    }


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
