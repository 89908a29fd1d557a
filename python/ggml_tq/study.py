"""The study bench: what quantizers do to the attention of captured queries, keys and values.

For each layer, head and query i with logits s_ij = scale q_i.k_j over the keys j that it may see, and the logits' error
e_ij = scale q_i.(k^_j - k_j):

- error: sum |k^ - k|^2 / sum |k|^2, and the same for values;
- logit variance: sum (e_ij - e_i)^2 / sum (s_ij - s_i)^2, with the means e_i and s_i of each query taken off, because
  softmax does not see what all logits of a query share;
- logit slope: sum (e_ij - e_i) (s_ij - s_i) / sum (s_ij - s_i)^2. 0 if the error does not depend on the logit;
  a quantizer that shrinks keys to the fraction 1 - a has slope -a;
- logit bias: the mean of e_ij over the root of the mean of (s_ij - s_i)^2;
- KL divergence of the attention distribution from quantized keys to that from exact ones, in nats, mean over queries;
- output: sum |o^ - o|^2 / sum |o|^2 of attention outputs o, from quantized keys, values, or both.

All are means over heads, of sums over the queries from position ``skip`` of each chunk on: with few keys to see there
is little to confuse. Soft-caps, sliding windows and sinks count as in the model. Arithmetic is float32, sums are
float64.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_tq.calibrated import Calibrated, CalibratedError
from ggml_tq.capture import Capture, CaptureError, Floats, Layer
from ggml_tq.quantizers import QuantizerError, Recipe
from ggml_tq.reference.protocol import Quantizer

Doubles = NDArray[np.float64]
_Work = tuple[int, tuple[tuple[Recipe, Recipe], ...], int, NDArray[np.bool_], Calibrated | None]  # _layer's arguments
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
TILE = 256  # queries at a time
SINKS = 16  # tokens at the start of a chunk that do not count in means: attention sinks have keys of their own kind


class StudyError(Exception):
    """A capture that the bench cannot work on; one line for the user."""


# ---- results


@dataclass(frozen=True)
class KeyScore:
    bits: float  # a coordinate
    error: float
    logit_bias: float
    logit_slope: float
    logit_variance: float
    kl: float
    kl_max: float  # of the worst head
    output: float


@dataclass(frozen=True)
class ValueScore:
    bits: float
    error: float
    output: float


@dataclass(frozen=True)
class LayerScores:
    """One layer; keys and values by recipe name, pairs by "key / value"."""

    layer: int
    mean_share: list[float]  # of the keys' energy, in their mean over the calibration tokens, for each KV head
    rope_share: list[float] | None  # the same for the mean before RoPE; None without such keys
    keys: dict[str, KeyScore]
    values: dict[str, ValueScore]
    outputs: dict[str, float]  # both quantized


@dataclass(frozen=True)
class Study:
    metadata: dict[str, str]
    n_tokens: int
    n_queries: int  # that count, of one head
    skip: int
    calibration: int  # tokens, of which the first SINKS of each chunk do not count
    pairs: list[tuple[str, str]]
    layers: list[LayerScores] = field(default_factory=list)


# ---- attention


@dataclass(frozen=True)
class Tile:
    """Some queries of one head, and the keys that any of them may see."""

    queries: slice
    keys: slice
    visible: NDArray[np.bool_]  # (queries, keys)


def tiles(chunk: slice, skip: int, window: int) -> Iterator[Tile]:
    """The queries of a chunk from position ``skip`` on, in tiles."""
    for first in range(chunk.start + skip, chunk.stop, TILE):
        last = min(first + TILE, chunk.stop)
        begin = max(chunk.start, first - window + 1) if window else chunk.start
        i, j = np.arange(first, last)[:, None], np.arange(begin, last)
        yield Tile(slice(first, last), slice(begin, last), (j <= i) & (j > i - window) if window else j <= i)


class ExactAttention:
    """Logits, probabilities and output of one tile with nothing quantized."""

    def __init__(self, layer: Layer, q: Floats, k: Floats, v: Floats, tile: Tile, sink: float | None) -> None:
        """q (tokens, dim) of one query head, k and v (tokens, dim) of its KV head."""
        self.soft_cap, self.visible = layer.soft_cap, tile.visible
        self.q: Floats = q[tile.queries] * np.float32(layer.scale)
        self.keys, self.v = tile.keys, v[tile.keys]
        self.raw: Floats = self.q @ k[tile.keys].T
        logits: Floats = np.where(self.visible, self._capped(self.raw), np.float32(-np.inf))
        top = logits.max(axis=1, keepdims=True)
        if sink is not None:
            top = np.maximum(top, np.float32(sink))
        self.log_p: Floats = logits - top  # normalized below; finite where p underflows
        self.p = np.exp(self.log_p)
        z = self.p.sum(axis=1, keepdims=True, dtype=np.float64)
        sink_part = np.exp(np.float64(sink) - top) if sink is not None else np.zeros_like(z)
        z += sink_part
        self.p /= z.astype(np.float32)
        self.log_p -= np.log(z).astype(np.float32)
        self.p_sink: Doubles = (sink_part / z)[:, 0]
        self.output = self.p @ self.v

        self.n = self.visible.sum(axis=1)
        s = np.where(self.visible, self.raw, 0)
        self.s_centred = np.where(self.visible, s - (_sum(s) / self.n)[:, None].astype(np.float32), 0)
        self.s_square = float(_sum(self.s_centred**2).sum())

    def _capped(self, logits: Floats) -> Floats:
        if not self.soft_cap:
            return logits
        cap = np.float32(self.soft_cap)
        return np.asarray(cap * np.tanh(logits / cap), dtype=np.float32)

    def logit_error(self, dk: Floats) -> Floats:
        """scale q.dk before any soft-cap, 0 where nothing is seen."""
        return np.where(self.visible, self.q @ dk[self.keys].T, np.float32(0))

    def perturb(self, e: Floats) -> tuple[Doubles, Floats]:
        """KL divergence of each query's distribution from that with errors ``e``, and the latter distribution.

        With d = e - <e> the mean over the exact distribution, KL = log <exp(d)>; nothing large cancels in it.
        """
        if self.soft_cap:
            capped = self._capped(np.asarray(self.raw + e)) - self._capped(self.raw)
            e = np.where(self.visible, capped, np.float32(0))
        mean = _sum(self.p * e)  # a sink's logit has no error
        top = np.maximum(np.max(e, axis=1), 0) - mean
        d = e - mean[:, None].astype(np.float32)
        if np.max(top) < 20:
            growth = np.expm1(d)
            excess = _sum(self.p * growth) + self.p_sink * np.expm1(-mean)
            return np.log1p(excess), self.p * ((1 + growth) / (1 + excess)[:, None].astype(np.float32))
        a = self.log_p + d  # all weight may move to keys that had none to speak of
        top = np.maximum(a.max(axis=1), np.log(np.maximum(self.p_sink, 1e-300)) - mean)
        w = np.exp(a - top[:, None].astype(np.float32))
        z = _sum(w) + self.p_sink * np.exp(-mean - top)
        return top + np.log(z), w / z[:, None].astype(np.float32)


def _sum(x: Floats) -> Doubles:
    """Sums of rows in float64."""
    return np.asarray(x.sum(axis=1, dtype=np.float64))


# ---- sums over queries and heads


@dataclass
class _KeySums:
    """Of one query head."""

    queries: int = 0
    kl: float = 0.0
    pairs: int = 0
    e: float = 0.0
    e_square: float = 0.0  # centred
    e_s: float = 0.0  # centred
    s_square: float = 0.0  # centred
    output: float = 0.0

    def add(self, exact: ExactAttention, e: Floats, kl: Doubles, output_error: float) -> None:
        e_sum = _sum(e)
        self.queries += len(kl)
        self.kl += float(kl.sum())
        self.pairs += int(exact.n.sum())
        self.e += float(e_sum.sum())
        self.e_square += float((_sum(e * e) - e_sum**2 / exact.n).sum())
        self.e_s += float(_sum(e * exact.s_centred).sum())
        self.s_square += exact.s_square
        self.output += output_error


def _square(x: Floats) -> float:
    return float(np.sum(np.square(x, dtype=np.float64)))


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0 if a == 0 else float("inf")


# ---- centring


def calibration_tokens(capture: Capture, calibration: int) -> NDArray[np.bool_]:
    """Which tokens means are taken over: the first ``calibration``, without the start of each chunk."""
    return (np.arange(len(capture.positions)) < calibration) & (capture.positions >= SINKS)


@dataclass(frozen=True)
class _Centers:
    """What is taken off the keys of one KV head, (tokens, dim) or (1, dim)."""

    mean: Floats
    rope: Floats | None
    cal: tuple[Floats, Floats] | None  # and scales, (dim,)

    def error(self, recipe: Recipe, quantizer: Quantizer, k: Floats) -> Floats:
        """k^ - k: what is taken off before is put back exactly, so it drops out."""
        center, scale = {
            "none": (None, None), "mean": (self.mean, None), "rope": (self.rope, None), "cal": self.cal or (None, None)
        }[recipe.center]  # fmt: skip
        x = k if center is None else k - center
        if scale is None:
            return np.asarray(quantizer.reconstruct(x) - x, dtype=np.float32)
        x = x * scale
        return np.asarray((quantizer.reconstruct(x) - x) / scale, dtype=np.float32)


def _centers(
    capture: Capture, layer: Layer, head: int, k: Floats, tokens: NDArray[np.bool_], calibrated: Calibrated | None
) -> _Centers:
    mean = k[tokens].mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    cal = calibrated.of_head(layer, head, capture.positions) if calibrated else None
    if layer.rope is None or not capture.has_k_pre(layer.index):
        return _Centers(mean, None, cal)
    capture.check_rope(layer.index, head)
    k_pre = capture.k_pre(layer.index, head)
    mean_pre = k_pre[tokens].mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    return _Centers(mean, layer.rope.apply(mean_pre, capture.positions), cal)


# ---- the bench


def check(
    capture: Capture,
    pairs: Sequence[tuple[Recipe, Recipe]],
    layers: Sequence[int],
    skip: int,
    calibrated: Calibrated | None = None,
) -> None:
    """Raises StudyError, CalibratedError or QuantizerError for what cannot be studied."""
    for index in layers:
        if index not in capture.layers:
            have = ",".join(map(str, capture.layers))
            raise StudyError(f"layer {index} is not in the capture, which has {have}")
        layer = capture.layers[index]
        if layer.window < 0:
            raise StudyError(f"layer {index} has a mask that is neither causal nor a sliding window")
        if layer.max_bias:
            raise StudyError(f"layer {index} uses ALiBi, which the bench does not know")
        for key, value in pairs:
            if value.center != "none":
                raise StudyError(f"{value.name}: only keys are centred")
            if key.center == "cal":
                if calibrated is None:
                    raise StudyError(f"{key.name}: wants --calibrated MODEL.gguf")
                calibrated.check(layer)
            if key.center == "rope" and not capture.has_k_pre(index):
                raise StudyError(f"{key.name}: layer {index} has no keys before RoPE in this capture")
            key.build("key", layer.head_dim_k)
            value.build("value", layer.head_dim_v)
    if not any(c.stop - c.start > skip for c in capture.chunks()):
        longest = max(c.stop - c.start for c in capture.chunks())
        raise StudyError(f"the longest chunk has {longest} tokens, none after the first {skip}")


def study(
    capture: Capture,
    pairs: Sequence[tuple[Recipe, Recipe]],
    layers: Sequence[int] | None = None,
    skip: int = 256,
    calibration: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    jobs: int = 0,
    calibrated: Calibrated | None = None,
) -> Study:
    """Study each (key quantizer, value quantizer) of ``pairs`` on ``layers`` (default: all).

    ``calibration``: tokens that means are taken over, default half of all. ``progress`` is told layers done and in
    all. With ``jobs`` that many processes share the layers; a script that asks for them needs an
    ``if __name__ == "__main__"``. ``calibrated``: what keys of the center ``cal`` are centered and scaled by. Raises
    StudyError, CalibratedError, CaptureError or QuantizerError.
    """
    layers = list(capture.layers) if layers is None else list(layers)
    check(capture, pairs, layers, skip, calibrated)
    n_tokens = len(capture.positions)
    calibration = n_tokens // 2 if calibration is None else calibration
    tokens = calibration_tokens(capture, calibration)
    if not tokens.any():
        raise StudyError(f"no token to take means over: {calibration} of {n_tokens}, without {SINKS} of each chunk")
    result = Study(
        metadata={k: v for k, v in capture.metadata.items() if k != "layers"},
        n_tokens=n_tokens,
        n_queries=sum(max(0, c.stop - c.start - skip) for c in capture.chunks()),
        skip=skip,
        calibration=calibration,
        pairs=[(k.name, v.name) for k, v in pairs],
    )
    work = [(index, tuple(pairs), skip, tokens, calibrated) for index in layers]
    done = _in_processes(capture, work, min(jobs, len(work))) if jobs else (_layer(capture, *w) for w in work)
    progress(0, len(work))
    for scores in done:
        result.layers.append(scores)
        progress(len(result.layers), len(work))
    return result


def _in_processes(capture: Capture, work: Sequence[_Work], jobs: int) -> Iterator[LayerScores]:
    """One layer a process at a time. Each has one BLAS thread: more of them wait for each other most of the time."""
    before = {name: os.environ.get(name) for name in BLAS_THREADS}
    os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))
    try:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _open_capture, (capture.path,)) as pool:
            yield from pool.map(_layer_in_process, work)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_opened: list[Capture] = []  # the capture of a worker process


def _open_capture(path: Path) -> None:
    _opened.append(Capture(path))


def _layer_in_process(work: _Work) -> LayerScores:
    return _layer(_opened[0], *work)


def _layer(
    capture: Capture,
    index: int,
    pairs: Sequence[tuple[Recipe, Recipe]],
    skip: int,
    tokens: NDArray[np.bool_],
    calibrated: Calibrated | None = None,
) -> LayerScores:
    layer = capture.layers[index]
    heads = range(layer.n_head_kv)
    keys: dict[Recipe, list[Quantizer]] = {
        k: [k.of_head("key", layer.head_dim_k, index, head) for head in heads] for k, _ in pairs
    }
    values: dict[Recipe, list[Quantizer]] = {
        v: [v.of_head("value", layer.head_dim_v, index, head) for head in heads] for _, v in pairs
    }
    sinks = capture.sinks(layer.index)
    key_sums: dict[Recipe, list[_KeySums]] = {k: [] for k in keys}
    key_errors: dict[Recipe, list[float]] = {k: [] for k in keys}
    value_errors: dict[Recipe, list[float]] = {v: [] for v in values}
    value_outputs: dict[Recipe, list[float]] = {v: [] for v in values}
    pair_outputs: dict[tuple[Recipe, Recipe], list[float]] = {p: [] for p in pairs}
    shares: list[float] = []
    rope_shares: list[float] = []

    for head in heads:
        k, v = capture.k(layer.index, head), capture.v(layer.index, head)
        centers = _centers(capture, layer, head, k, tokens, calibrated)
        energy = _square(k)
        shares.append(1 - _ratio(_square(k - centers.mean), energy))
        if centers.rope is not None:
            rope_shares.append(1 - _ratio(_square(k - centers.rope), energy))
        dk = {r: centers.error(r, quantizers[head], k) for r, quantizers in keys.items()}
        dv = {r: quantizers[head].reconstruct(v) - v for r, quantizers in values.items()}
        for r, error in dk.items():
            key_errors[r].append(_ratio(_square(error), energy))
        for r, error in dv.items():
            value_errors[r].append(_ratio(_square(error), _square(v)))

        for q_head in range(head * layer.group, (head + 1) * layer.group):
            q = capture.q(layer.index, q_head)
            sums = {r: _KeySums() for r in keys}
            outputs: dict[Recipe | tuple[Recipe, Recipe], float] = dict.fromkeys((*values, *pairs), 0.0)
            square = 0.0
            for chunk in capture.chunks():
                for tile in tiles(chunk, skip, layer.window):
                    exact = ExactAttention(layer, q, k, v, tile, None if sinks is None else float(sinks[q_head]))
                    square += _square(exact.output)
                    for r, error in dv.items():
                        outputs[r] += _square(exact.p @ error[tile.keys])
                    for r, error in dk.items():
                        e = exact.logit_error(error)
                        kl, p = exact.perturb(e)
                        off = p @ exact.v - exact.output
                        sums[r].add(exact, e, kl, _square(off))
                        for pair in pairs:
                            if pair[0] == r:
                                outputs[pair] += _square(off + p @ dv[pair[1]][tile.keys])
            for r in keys:
                sums[r].output = _ratio(sums[r].output, square)
                key_sums[r].append(sums[r])
            for r in values:
                value_outputs[r].append(_ratio(outputs[r], square))
            for pair in pairs:
                pair_outputs[pair].append(_ratio(outputs[pair], square))

    return LayerScores(
        layer=layer.index,
        mean_share=shares,
        rope_share=rope_shares or None,
        keys={r.name: _key_score(keys[r][0].bits, key_errors[r], key_sums[r]) for r in keys},
        values={
            r.name: ValueScore(values[r][0].bits, float(np.mean(value_errors[r])), float(np.mean(value_outputs[r])))
            for r in values
        },
        outputs={f"{k.name} / {v.name}": float(np.mean(x)) for (k, v), x in pair_outputs.items()},
    )


def _key_score(bits: float, errors: list[float], heads: list[_KeySums]) -> KeyScore:
    def mean(f: Callable[[_KeySums], float]) -> float:
        return float(np.mean([f(h) for h in heads]))

    return KeyScore(
        bits=bits,
        error=float(np.mean(errors)),
        logit_bias=mean(lambda h: _ratio(h.e / h.pairs, (h.s_square / h.pairs) ** 0.5)),
        logit_slope=mean(lambda h: _ratio(h.e_s, h.s_square)),
        logit_variance=mean(lambda h: _ratio(h.e_square, h.s_square)),
        kl=mean(lambda h: h.kl / h.queries),
        kl_max=max(h.kl / h.queries for h in heads),
        output=mean(lambda h: h.output),
    )


__all__ = ["CalibratedError", "CaptureError", "QuantizerError", "Study", "StudyError", "check", "study"]
