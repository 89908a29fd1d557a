#!/usr/bin/env python3
"""Which masks to add to Ungerboeck's: train every code of a size for a short time, and print the best.

Label bits that span the same space, over exclusive or, make the same code with its table in another order, so there is
one candidate a space. ``ggml_tq.reference.trellis_training.CODES`` has the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import combinations, repeat
from multiprocessing import get_context

from ggml_tq.reference.trellis import Graph
from ggml_tq.reference.trellis_training import UNGERBOECK, Settings, arrays_on, fit, sphere, tied, train


def span(masks: tuple[int, ...]) -> frozenset[int]:
    found = {0}
    for mask in masks:
        found |= {mask ^ other for other in found}
    return frozenset(found)


def candidates(bits: int, memory: int, more: int) -> Iterator[Graph]:
    """With ``more`` masks each beyond Ungerboeck's, of an odd number of bits: those leave the code symmetric."""
    base = span(UNGERBOECK[memory])
    masks = [m for m in range(2 << memory) if m.bit_count() % 2 and m not in base]
    # one of each coset, the one of fewest bits
    cosets = {min(m ^ b for b in base): m for m in sorted(masks, key=lambda m: (-m.bit_count(), -m))}
    seen = set()
    for chosen in combinations(cosets.values(), more):
        space = span((*UNGERBOECK[memory], *chosen))
        if len(space) == 4 << more and space not in seen:
            seen.add(space)
            yield tied(bits, memory, *chosen)


def distortion(graph: Graph, settings: Settings, where: str) -> float:
    levels = train(graph, settings, where)
    return fit(arrays_on(where)(sphere(settings.blocks, settings.dim, 77)), graph, levels, 5).distortion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bits", type=int)
    parser.add_argument("memory", type=int, help="bits of a state")
    parser.add_argument("more", type=int, help="label bits beyond two")
    parser.add_argument("--device", default="numpy", help="numpy, or a device of torch")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=4096)
    args = parser.parse_args()
    settings = Settings(blocks=args.blocks, restarts=1, rough=12, fine=3, search=3)
    graphs = list(candidates(args.bits, args.memory, args.more))
    with get_context("spawn").Pool(args.jobs) as pool:
        found = pool.starmap(distortion, zip(graphs, repeat(settings), repeat(args.device)), chunksize=1)
    for d, graph in sorted(zip(found, graphs, strict=True), key=lambda pair: pair[0]):
        print(f"{d:.6f} {graph.name} masks {' '.join(f'0o{tap:o}' for tap in graph.taps)}")


if __name__ == "__main__":
    main()
