"""Tables of trellis codes from samples: the generalized Lloyd algorithm.

With the paths fixed, the levels of least error are means; with the levels fixed, Viterbi's paths are best. Each
iteration encodes blocks uniform on the sphere as the encoder does, with its tail-biting and its search, and moves every
level to the mean of the coordinates that it stood for: with S each block's scale of least squared error, the minimum
of sum |u - S q|^2 over the levels is sum S u / sum S^2. That leaves the size of the table free, which the paths
depend on: it is held where S is 1 on average. This finds a local optimum, so there are several starts: Ungerboeck's
labelling of Lloyd-Max levels of one bit more, and the same shaken.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from ggml_tq.codebook import solve
from ggml_tq.reference.protocol import Array, divide, dot
from ggml_tq.reference.trellis import Graph, encode_path, multiples

Floats = NDArray[np.float64]

# Parity masks (low label bit, high label bit) of Ungerboeck's codes of rate 1/2 in one dimension, by memory: G.
# Ungerboeck, IEEE Trans. Inf. Theory 28 (1982), table I.
UNGERBOECK = {
    1: (0o2, 0o1),
    2: (0o2, 0o5),
    3: (0o4, 0o13),
    4: (0o4, 0o23),
    5: (0o10, 0o45),
    6: (0o24, 0o103),
    7: (0o126, 0o235),
    8: (0o362, 0o515),
}


def untied(bits: int, memory: int) -> Graph:
    """The label is the register."""
    return Graph(bits, memory, tuple(1 << i for i in range(memory + 1)))


def tied(bits: int, memory: int, *more: int) -> Graph:
    """Ungerboeck's masks and ``more``: two label bits, and one more each."""
    return Graph(bits, memory, (*UNGERBOECK[memory], *more))


# The codes of the study. The masks beyond Ungerboeck's come from trying every space of label bits that contains his
# (scripts/search_trellis_masks.py); the first few differ by less than a short training can tell, 0.3 %.
CODES = {
    graph.name: graph
    for graph in (
        *(untied(2, 4), untied(3, 3), untied(4, 2)),
        *(tied(2, 3), tied(3, 3), tied(4, 3)),
        *(tied(2, 4, 0o16), tied(3, 4)),
        *(tied(2, 5, 0o16), tied(3, 5)),
        *(tied(2, 4, 0o20, 0o15), tied(3, 4, 0o16), tied(4, 4)),
        *(tied(2, 5, 0o16, 0o31), tied(3, 5, 0o16), tied(4, 5)),
        *(tied(2, 5, 0o13, 0o4, 0o31), tied(3, 5, 0o7, 0o23), tied(4, 5, 0o16)),
        *(tied(2, 6, 0o7, 0o13, 0o142), tied(3, 6, 0o114, 0o141), tied(4, 6, 0o156)),
    )
}


def sphere(blocks: int, dim: int, seed: int) -> Floats:
    """Blocks (blocks, dim), uniform among those of unit mean square."""
    x = np.random.default_rng(seed).standard_normal((blocks, dim))
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=1, keepdims=True)))


def start(graph: Graph, dim: int) -> Floats:
    """(entries,): Lloyd-Max levels of ``bits`` + 1 bits, every fourth of them under one of Ungerboeck's labels."""
    levels = solve(graph.bits + 1, dim).centroids
    if graph.memory == 0:
        return solve(graph.bits, dim).centroids
    ungerboeck = tied(graph.bits, graph.memory).labels()
    sums, counts = np.zeros((2, graph.entries // graph.free, graph.free))
    for own, four in zip(graph.labels(), ungerboeck, strict=True):
        sums[own] += levels[four::4]
        counts[own] += 1
    return np.asarray((sums / np.maximum(counts, 1)).reshape(-1))


@dataclass(frozen=True)
class Fit:
    """How blocks fare in a code."""

    distortion: float  # sum |u - S q|^2 / sum |u|^2 with each block's best scale S
    sums: Floats  # (entries,): of S u
    weights: Floats  # (entries,): of S^2
    scale: float  # mean S


def moved(fits: Sequence[Fit]) -> Floats:
    """The levels (entries,) that fit best, as large as the paths need them."""
    sums, weights = sum(f.sums for f in fits), sum(f.weights for f in fits)
    scale = float(np.mean([f.scale for f in fits]))
    return np.asarray(scale * sums / np.maximum(weights, 1e-30))


def fit(u: Array, graph: Graph, levels: Floats, search: int = 1) -> Fit:
    """Encode blocks ``u`` (blocks, dim) of unit mean square, each with its scale of least squared error."""
    xp = array_namespace(u)
    values = levels.reshape(-1, graph.free)
    labels = xp.asarray(graph.labels(), device=device(u))
    best: Array = None
    for m in multiples(search):
        register, w, q = encode_path(u * m, graph, values)
        cosine = divide(dot(u, q), xp.sqrt(dot(q, q)))
        index = labels[register] * graph.free + xp.astype(w, xp.int64)
        found = (cosine, xp.astype(index, xp.uint8), divide(dot(u, q), dot(q, q)))
        better = None if best is None else found[0] > best[0]
        best = found if best is None else tuple(xp.where(better, a, b) for a, b in zip(found, best, strict=True))
    cosine, index, s = (np.asarray(part.cpu() if hasattr(part, "cpu") else part) for part in best)
    host = np.asarray(u.cpu() if hasattr(u, "cpu") else u, dtype=np.float64)
    s = np.broadcast_to(s.astype(np.float64), host.shape)
    scale = float(np.mean(s))
    # On the host: sums of scattered numbers are not deterministic on a GPU.
    flat = index.reshape(-1)
    return Fit(
        distortion=float(1 - np.mean(cosine.astype(np.float64) ** 2 / u.shape[1])),
        sums=np.asarray(np.bincount(flat, (s * host).reshape(-1), graph.entries), dtype=np.float64),
        weights=np.asarray(np.bincount(flat, (s * s).reshape(-1), graph.entries), dtype=np.float64),
        scale=scale,
    )


@dataclass(frozen=True)
class Settings:
    dim: int = 64
    blocks: int = 1 << 15  # a sample
    samples: int = 2  # taken in turn
    restarts: int = 2
    rough: int = 20  # iterations on a sample each, for every start
    fine: int = 10  # iterations on all samples, for the best
    shake: float = 0.3  # of a start's levels, in units of the distance between neighbours
    search: int = 3
    symmetric: bool = True  # where the graph and the first start are
    seed: int = 1


def mirrored(levels: Floats) -> Floats:
    """The nearest levels with levels[-1 - i] = -levels[i]."""
    return np.asarray((levels - levels[::-1]) / 2)


def arrays_on(where: str) -> Callable[[Floats], Array]:
    """What makes float32 arrays of NumPy's ("numpy") or on a device of torch ("cpu", "cuda")."""
    if where == "numpy":
        return lambda x: np.asarray(x, dtype=np.float32)
    import torch

    torch.set_num_threads(1)
    return lambda x: torch.asarray(x.astype(np.float32), device=where)


def train(
    graph: Graph,
    settings: Settings = Settings(),
    where: str = "numpy",
    progress: Callable[[str], None] = lambda line: None,
) -> Floats:
    """Levels (entries,) for coordinates of unit variance. ``where``: see ``arrays_on``."""
    to = arrays_on(where)
    pool = [to(sphere(settings.blocks, settings.dim, settings.seed * 1000 + i)) for i in range(settings.samples)]
    rng = np.random.default_rng(settings.seed)
    first = start(graph, settings.dim)
    symmetric = settings.symmetric and graph.symmetric and np.allclose(first, mirrored(first))

    def clean(levels: Floats) -> Floats:
        return mirrored(levels) if symmetric else levels

    tries: list[tuple[float, Floats]] = []
    for restart in range(settings.restarts):
        gap = 2 * float(np.max(np.abs(first))) / 2 ** (graph.bits + 1)
        # Labels that start with the same levels would keep them: without a shake they are alike.
        shake = settings.shake if restart or len(graph.taps) > 2 else 0.0
        levels = clean(first + shake * gap * rng.standard_normal(first.shape))
        for i in range(settings.rough):
            levels = clean(moved([fit(pool[i % len(pool)], graph, levels, settings.search)]))
        distortion = fit(pool[0], graph, levels, settings.search).distortion
        progress(f"{graph.name}, start {restart}: {distortion:.6f}")
        tries.append((distortion, levels))
    _, levels = min(tries, key=lambda item: item[0])
    for _ in range(settings.fine):
        levels = clean(moved([fit(u, graph, levels, settings.search) for u in pool]))
    return levels


def rounded(graph: Graph, levels: Floats, u: Array, search: int) -> tuple[NDArray[np.int64], float, float]:
    """Levels as signed bytes, their unit, and the distortion of blocks ``u`` with them.

    The unit of least distortion: a smaller one than max / 127 rounds finer and clips the outermost levels.
    """
    found = []
    for unit in float(np.max(np.abs(levels))) / 127 * np.linspace(0.76, 1, 9):
        whole = np.clip(np.rint(levels / unit), -127, 127).astype(np.int64)
        found.append((fit(u, graph, whole * unit, search).distortion, whole, float(unit)))
    distortion, whole, unit = min(found, key=lambda item: item[0])
    return whole, unit, distortion


def train_code(name: str, settings: Settings, where: str) -> dict[str, Any]:
    """One of CODES as the table file has it. ``where``: see ``arrays_on``.

    ``distortion`` is measured on blocks that training did not see, with the scale of least squared error: without and
    with a search over 5 multiples, with the bytes and the search, and on blocks of 128.
    """
    graph = CODES[name]
    to = arrays_on(where)
    levels = train(graph, settings, where)
    unseen = to(sphere(settings.blocks, settings.dim, settings.seed * 1000 + 999))
    whole, unit, int8 = rounded(graph, levels, unseen, 5)
    longer = to(sphere(settings.blocks // 2, 2 * settings.dim, settings.seed * 1000 + 998))
    digits = [round(float(x), 6) for x in levels]
    return {
        "bits": graph.bits,
        "memory": graph.memory,
        "taps": list(graph.taps),
        "levels": digits,
        "int8": [int(i) for i in whole],
        "unit": round(unit, 8),
        "distortion": {
            key: float(f"{value:.5g}")
            for key, value in (
                ("plain", fit(unseen, graph, np.array(digits), 1).distortion),
                ("search5", fit(unseen, graph, np.array(digits), 5).distortion),
                ("search5_int8", int8),
                ("plain_128", fit(longer, graph, np.array(digits), 1).distortion),
                ("search5_128", fit(longer, graph, np.array(digits), 5).distortion),
            )
        },
    }


def train_codes(
    names: Sequence[str],
    settings: Settings = Settings(),
    where: str = "numpy",
    jobs: int = 1,
    progress: Callable[[str, dict[str, Any]], None] = lambda name, table: None,
) -> dict[str, Any]:
    """The content of the table file for those of CODES, ``jobs`` of them at a time."""
    made: dict[str, Any] = {}
    with ExitStack() as stack:
        each: Callable[..., Iterable[dict[str, Any]]] = map
        if jobs > 1:
            each = stack.enter_context(ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))).map
        for name, table in zip(names, each(train_code, names, repeat(settings), repeat(where)), strict=False):
            made[name] = table
            progress(name, table)
    return {"settings": asdict(settings), "tables": made}
