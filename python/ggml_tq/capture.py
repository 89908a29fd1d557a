"""Queries, keys and values of a real model: run ``llama-tq-capture``, and read what it wrote.

A capture is one safetensors file. For every recorded layer N it holds

- ``q.N`` (tokens, query heads, dim), ``k.N`` and ``v.N`` (tokens, KV heads, dim): what attention reads and the cache
  receives, keys and queries after RoPE, before any rounding to a cache type;
- ``k_pre.N``, shaped as ``k.N``: the keys before RoPE, where RoPE is the last thing that happens to a key;
- ``rope_factors.N`` and ``sinks.N``, where the model has them;

and ``tokens``, ``positions`` and ``chunk`` (tokens,): each chunk was read with an empty cache. The metadata
describe the layers (``Layer``) and say which model and text it was.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ggml_tq.eval.runs import EvalError, sha256

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

PROGRAM = "llama-tq-capture"
FORMAT = "ggml-tq-capture 1"
ROPE_NEOX, ROPE_MROPE, ROPE_VISION = 2, 8, 24  # bits of the mode, as in ggml.h


class CaptureError(Exception):
    """A capture that could not be made or read; the message is one line for the user."""


# ---- RoPE


@dataclass(frozen=True)
class Rope:
    """The parameters of ggml's ROPE op for one layer, named as there; ``factors`` is its third operand."""

    n_dims: int
    mode: int
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float
    sections: tuple[int, int, int, int] = (0, 0, 0, 0)
    offset: int = 0
    factors: Floats | None = None

    def frequencies(self) -> tuple[NDArray[np.float64], float]:
        """Radians a position of each pair, (n_dims/2,), and the magnitude; YaRN as arXiv:2309.00071, 3.4."""
        if self.mode == ROPE_VISION or self.sections[3]:
            raise CaptureError(f"RoPE of mode {self.mode} with sections {self.sections} is not supported")
        pair = np.arange(self.n_dims // 2)
        theta = self.freq_base ** (-2.0 * pair / self.n_dims)
        if self.factors is not None:
            theta = theta / self.factors[: len(pair)]
        magnitude = self.attn_factor
        angle = self.freq_scale * theta
        if self.ext_factor:
            low, high = (self._turns(beta) for beta in (self.beta_fast, self.beta_slow))
            low, high = max(0, math.floor(low)), min(self.n_dims - 1, math.ceil(high))
            ramp = self.ext_factor * (1 - np.clip((pair - low) / max(0.001, high - low), 0, 1))
            angle = angle * (1 - ramp) + theta * ramp
            magnitude *= 1 + 0.1 * math.log(1 / self.freq_scale)
        return angle, magnitude

    def angles(self, positions: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cosine and sine of each pair, (tokens, n_dims/2), times the magnitude."""
        freqs, magnitude = self.frequencies()
        angle = np.asarray(positions, dtype=np.float64)[:, None] * freqs
        return np.cos(angle) * magnitude, np.sin(angle) * magnitude

    def _turns(self, beta: float) -> float:
        """The pair that turns ``beta`` times in the model's original context."""
        return self.n_dims * math.log(self.n_ctx_orig / (beta * 2 * math.pi)) / (2 * math.log(self.freq_base))

    def apply(self, x: Floats, positions: Ints) -> Floats:
        """Rows (..., tokens, dim) turned by their tokens' ``positions`` (tokens,)."""
        cos, sin = self.angles(positions)
        half = self.n_dims // 2
        if self.mode & (ROPE_NEOX | ROPE_MROPE):  # text has one position for all sections of M-RoPE
            first, second = slice(self.offset, self.offset + half), slice(self.offset + half, self.offset + self.n_dims)
        else:
            end = self.offset + self.n_dims
            first, second = slice(self.offset, end, 2), slice(self.offset + 1, end, 2)
        y = np.array(np.broadcast_to(x, np.broadcast_shapes(x.shape, (len(positions), x.shape[-1]))), dtype=np.float32)
        a, b = np.array(y[..., first]), np.array(y[..., second])
        y[..., first] = a * cos - b * sin
        y[..., second] = a * sin + b * cos
        return y


# ---- reading


@dataclass(frozen=True)
class Layer:
    """One layer's attention."""

    index: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    v_in_k: bool  # MLA: a value is the first head_dim_v coordinates of its key
    readers: int  # layers that attend over this cache; the queries are the first one's
    scale: float  # of q.k
    soft_cap: float  # 0: none
    max_bias: float  # of ALiBi; 0: none
    window: int  # 0: a query sees all before it; W: itself and the W - 1 before it; -1: something else
    rope: Rope | None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.n_head // self.n_head_kv


class Capture:
    """A capture file, open for reading one head at a time. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises CaptureError unless the file is a whole capture."""
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="numpy"))
        except (OSError, SafetensorError) as e:
            raise CaptureError(f"cannot read {path}: {e}") from e
        self.metadata: dict[str, str] = self._file.metadata() or {}
        if self.metadata.get("format") != FORMAT:
            raise CaptureError(f"{path} is not a capture that `ggml-tq capture` wrote")
        self._names = set(self._file.keys())
        try:
            self.layers = {int(n): self._layer(int(n), d) for n, d in json.loads(self.metadata["layers"]).items()}
            self.positions: Ints = self._file.get_tensor("positions")
            self.chunk: Ints = self._file.get_tensor("chunk")
            self.tokens: Ints = self._file.get_tensor("tokens")
        except (KeyError, TypeError, ValueError, SafetensorError) as e:
            raise CaptureError(f"{path} is not a whole capture: {type(e).__name__} {e}") from e

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def _layer(self, index: int, d: dict[str, Any]) -> Layer:
        d = dict(d)
        rope = d.pop("rope", None)
        if rope is not None:
            factors = f"rope_factors.{index}"
            rope["sections"] = tuple(rope["sections"])
            rope = Rope(**rope, factors=self._file.get_tensor(factors) if factors in self._names else None)
        layer = Layer(index=index, rope=rope, **d)
        shapes = {"q": (layer.n_head, layer.head_dim_k), "k": (layer.n_head_kv, layer.head_dim_k)}
        if not layer.v_in_k:
            shapes["v"] = (layer.n_head_kv, layer.head_dim_v)
        for what, shape in shapes.items():
            got = tuple(self._file.get_slice(f"{what}.{index}").get_shape()[1:])
            if got != shape:
                raise ValueError(f"{what}.{index} has shape {got}, want {shape}")
        return layer

    def has_k_pre(self, layer: int) -> bool:
        return f"k_pre.{layer}" in self._names

    def _head(self, name: str, head: int | None) -> Floats:
        part = self._file.get_slice(name)
        x = part[:] if head is None else part[:, head]
        return np.ascontiguousarray(x, dtype=np.float32)

    def q(self, layer: int, head: int | None = None) -> Floats:
        """Queries after RoPE: (tokens, heads, dim), or (tokens, dim) of one head."""
        return self._head(f"q.{layer}", head)

    def k(self, layer: int, head: int | None = None) -> Floats:
        """Keys after RoPE."""
        return self._head(f"k.{layer}", head)

    def k_pre(self, layer: int, head: int | None = None) -> Floats:
        """Keys before RoPE; raises CaptureError where they were not recorded."""
        if not self.has_k_pre(layer):
            raise CaptureError(f"layer {layer} has no keys before RoPE: RoPE is not the last step of its keys")
        return self._head(f"k_pre.{layer}", head)

    def check_rope(self, layer: int, head: int) -> None:
        """Raises CaptureError unless RoPE as recorded turns some keys before it into those after it."""
        rope, after, before = self.layers[layer].rope, self.k(layer, head), self.k_pre(layer, head)
        some = np.unique(np.linspace(0, len(after) - 1, 64).astype(int))
        again = rope.apply(before[some], self.positions[some]) if rope else before[some]
        if np.max(np.abs(again - after[some])) > 1e-3 * np.max(np.abs(after[some])):
            raise CaptureError(f"layer {layer}: RoPE as recorded does not turn the keys before it into those after it")

    def v(self, layer: int, head: int | None = None) -> Floats:
        if self.layers[layer].v_in_k:
            return np.ascontiguousarray(self.k(layer, head)[..., : self.layers[layer].head_dim_v])
        return self._head(f"v.{layer}", head)

    def sinks(self, layer: int) -> Floats | None:
        """The logit of each query head's sink, if the layer has them."""
        return self._file.get_tensor(f"sinks.{layer}") if f"sinks.{layer}" in self._names else None

    def chunks(self) -> Iterator[slice]:
        """The tokens of each chunk."""
        bounds = [0, *(np.flatnonzero(np.diff(self.chunk)) + 1).tolist(), len(self.chunk)]
        for first, last in pairwise(bounds):
            yield slice(first, last)


def load_capture(path: str | Path) -> Capture:
    """Open a capture. Raises CaptureError unless the file is one, whole."""
    return Capture(Path(path))


# ---- making


def find_program(directory: Path | None = None) -> Path:
    """``llama-tq-capture`` in a directory; by default of $GGML_TQ_BUILD, else of this checkout, else on the PATH."""
    if directory is not None:
        candidates = [directory / PROGRAM]
    elif build := os.environ.get("GGML_TQ_BUILD"):
        candidates = [Path(build) / "bin" / PROGRAM]
    else:
        candidates = [Path(__file__).resolve().parents[2] / "build" / "bin" / PROGRAM]
        candidates += [Path(found) for found in [shutil.which(PROGRAM)] if found]
    for path in candidates:
        if path.is_file():
            return path
    if directory is not None:
        raise CaptureError(f"{PROGRAM} is not in {directory}")
    raise CaptureError(f"{PROGRAM} is not built: run `make build`, or set GGML_TQ_BUILD to the build directory")


@dataclass(frozen=True)
class Request:
    """What to record."""

    model: Path
    text: Path
    output: Path
    layers: str = "all"  # or numbers with commas
    context: int = 2048  # tokens a chunk
    max_tokens: int | None = None  # default: one chunk
    threads: int | None = None
    dtype: str = "f32"  # or f16
    force: bool = False  # replace the output

    def arguments(self) -> list[str]:
        args = ["-m", self.model, "-f", self.text, "-o", self.output, "-c", self.context]
        args += ["--layers", self.layers, "--dtype", self.dtype]
        if self.max_tokens is not None:
            args += ["--max-tokens", self.max_tokens]
        if self.threads is not None:
            args += ["-t", self.threads]
        if self.force:
            args.append("--force")
        return [str(a) for a in args]


def capture(
    request: Request,
    progress: Callable[[int, int], None] = lambda done, total: None,
    extra: Sequence[str] = (),
    directory: Path | None = None,
) -> Capture:
    """Run the program and open what it wrote.

    ``progress`` is told tokens done and in all; ``extra`` are further options of llama.cpp's programs; the program is
    looked for in ``directory`` (see ``find_program``). Raises CaptureError; then there is no new file.
    """
    program = find_program(directory)
    for file in (request.model, request.text):
        if not file.is_file():
            raise CaptureError(f"{file} is missing")
    if request.output.exists() and not request.force:
        raise CaptureError(f"{request.output} exists; --force replaces it")
    if not request.output.parent.is_dir():
        raise CaptureError(f"{request.output.parent} is not a directory")
    try:
        hashes = [f"{name}_sha256={sha256(f)}" for name, f in (("model", request.model), ("text", request.text))]
    except EvalError as e:
        raise CaptureError(str(e)) from e
    meta = [a for h in hashes for a in ("--meta", h)]

    # idle threads that spin take the cores from the nodes that are evaluated one by one
    env = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    command = [str(program), *request.arguments(), *meta, *extra]
    last = ""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=env,
    ) as process:
        try:
            for line in process.stderr or ():
                if found := re.fullmatch(r"(\d+) of (\d+) tokens\n", line):
                    progress(int(found[1]), int(found[2]))
                elif line.strip():
                    last = line.strip()
        except BaseException:  # Ctrl-C: the program removes what it has begun
            process.terminate()
            raise
    if process.returncode != 0:
        request.output.with_name(request.output.name + ".tmp").unlink(missing_ok=True)  # after a crash
        problem = last.removeprefix("error: ") or f"{PROGRAM} ended with status {process.returncode}"
        raise CaptureError(problem)
    return load_capture(request.output)
