"""Table and plot of recorded speeds: tokens a second, their ratio to f16 in the same round, and the cache's size."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_tq.eval.bench import BENCH, F16, Round, Run, Settings
from ggml_tq.eval.report import link, links, model_names, replace_file, save_figure
from ggml_tq.eval.runs import EvalError

_INTRO = """\
# Speed of cache types

Tokens a second behind a cache of each depth, and the cache's size there. Types are measured in rounds, each type once
a round, beginning with another one each time; ÷ f16 is taken within rounds. Shown is the median of the rounds, and in
brackets their lowest and highest. The cache is that of the context that generates, as the program printed it; its cells
are the depth and the generated tokens, rounded up to 256.

Written by `ggml-tq bench`; the records behind it, with commands, hashes and load averages, are in {inputs}.
"""
BUSY = 0.5  # load average from which on a machine counts as shared


@dataclass(frozen=True)
class Spread:
    """Median and range of some repetitions."""

    median: float
    low: float
    high: float

    def show(self, digits: int) -> str:
        """The range only where there is one: not of a single repetition."""
        median = f"{self.median:.{digits}f}"
        return median + (f" ({self.low:.{digits}f} to {self.high:.{digits}f})" if self.low < self.high else "")


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def mib(run: Run) -> float:
    return round(sum(p.mib_k + p.mib_v for p in run.cache.parts), 2)


@dataclass(frozen=True)
class Cell:
    """One pair of types at one depth, over all rounds."""

    label: str
    depth: int
    mib: float
    speeds: dict[str, Spread]  # by test
    ratios: dict[str, Spread]  # to f16


@dataclass(frozen=True)
class Group:
    """The rounds of the same settings."""

    settings: Settings
    rounds: list[Round]
    name: str  # of the model

    @property
    def tests(self) -> list[str]:
        return list(self.rounds[0].runs[0].speeds)

    @property
    def backends(self) -> str:
        return self.rounds[0].runs[0].backends or self.settings.gpu or "CPU"

    def cells(self) -> list[Cell]:
        """By depth, then in the order of the pairs."""
        found: dict[tuple[int, str], list[tuple[Run, Run]]] = defaultdict(list)
        for r in self.rounds:
            f16 = next(run for run in r.runs if run.pair == F16)
            for run in r.runs:
                found[r.depth, str(run.pair)].append((run, f16))
        result = []
        for (depth, _), runs in sorted(found.items(), key=lambda i: (i[0][0], self.settings.pairs.index(i[0][1]))):
            first = runs[0][0]
            speeds = {t: spread([run.speeds[t] for run, _ in runs]) for t in self.tests}
            ratios = {t: spread([run.speeds[t] / f16.speeds[t] for run, f16 in runs]) for t in self.tests}
            label = " / ".join(first.pair.names(first.cache.k, first.cache.v))
            result.append(Cell(label, depth, mib(first), speeds, ratios))
        return result


def groups(rounds: Iterable[Round]) -> list[Group]:
    """Rounds by settings. Raises EvalError where there are none, or where one was recorded twice."""
    found: dict[str, list[Round]] = defaultdict(list)
    for r in rounds:
        if any(r.key == other.key for other in found[r.settings.key()]):
            raise EvalError(f"{r.settings.model}: round {r.repetition} at depth {r.depth} is recorded twice")
        found[r.settings.key()].append(r)
    if not found:
        raise EvalError("no results")
    called = model_names(rs[0] for rs in found.values())
    return [Group(rs[0].settings, rs, called[rs[0].settings.model_sha256]) for rs in found.values()]


def _machine(group: Group) -> str:
    """The machine, the build and whether other work disturbed them."""
    s, first = group.settings, group.rounds[0]
    loads = [run.load for r in group.rounds for run in r.runs]
    where = f"{s.cpu}, {s.gpu}" if s.gpu else s.cpu
    commits = sorted({str(r.source.get("build") or r.source.get("commit") or "unknown")[:12] for r in group.rounds})
    shared = (
        f" **The machine was shared**: load averages before runs were {spread(loads).show(1)}."
        if statistics.median(loads) > s.threads + BUSY
        else f" Load averages before runs: {spread(loads).show(1)}."
    )
    sizes = f"-p {s.prompt} -n {s.generate}" if s.program == BENCH else f"-ntg {s.generate}, {s.parallel} sequences"
    options = " ".join((*s.flags, *s.omp))
    counts = sorted({sum(r.depth == d for r in group.rounds) for d in {r.depth for r in group.rounds}})
    return (
        f"{where}, {s.threads} threads; {s.program} ({group.backends}), {sizes}{f', `{options}`' if options else ''}; "
        f"{' to '.join(map(str, counts))} rounds, {first.runs[0].started[:10]}. Build {', '.join(commits)}, program "
        f"{s.binary_sha256[:8]}, model {s.model_sha256[:8]}.{shared}"
    )


def table(group: Group) -> str:
    """Markdown: a row for each depth and pair of types."""
    heads = " | ".join(f"{t}, tokens/s | ÷ f16" for t in group.tests)
    lines = [
        f"## {group.name}",
        "",
        _machine(group),
        "",
        f"| depth | K / V | cache, MiB | {heads} |",
        "|--:|---|--:|" + "--:|--:|" * len(group.tests),
    ]
    for cell in group.cells():
        figures = []
        for test in group.tests:
            is_f16 = cell.label == "f16 / f16"
            figures += [cell.speeds[test].show(1), "" if is_f16 else cell.ratios[test].show(2)]
        lines.append(f"| {cell.depth} | {cell.label} | {cell.mib:.2f} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def plot(group: Group, path: Path) -> None:
    """Speed of each test and the cache's size over depth; bars from the lowest to the highest."""
    from matplotlib.figure import Figure  # slow to import

    cells = group.cells()
    labels = list(dict.fromkeys(c.label for c in cells))
    panels = [*group.tests, "cache"]
    figure = Figure(figsize=(4 * len(panels), 3.8), layout="constrained")
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label in labels:
            of = [c for c in cells if c.label == label]
            depths = [c.depth for c in of]
            if panel == "cache":
                ax.plot(depths, [c.mib for c in of], marker="o", ms=4, lw=1, label=label)
                continue
            spreads = [c.speeds[panel] for c in of]
            errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            medians = [s.median for s in spreads]
            ax.errorbar(depths, medians, yerr=errors, marker="o", ms=4, lw=1, capsize=2, label=label)
        ax.set_xlabel("depth, tokens")
        ax.set_title("cache, MiB" if panel == "cache" else f"{panel}, tokens/s", fontsize=9)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7)
    where = group.settings.gpu or group.settings.cpu
    figure.suptitle(f"{group.name}, {group.backends} ({where})", fontsize=10)
    save_figure(figure, path)


def write(rounds: Iterable[Round], output: Path, inputs: Sequence[Path]) -> None:
    """Write the tables to `output` and a plot of each beside it.

    Raises EvalError, before anything is written, where results are missing.
    """
    all_groups = groups(rounds)
    parts = [_INTRO.format(inputs=links(inputs, output.parent))]
    output.parent.mkdir(parents=True, exist_ok=True)
    for n, group in enumerate(all_groups):
        picture = output.with_name(f"{output.stem}{f'-{n + 1}' if n else ''}.svg")
        plot(group, picture)
        parts += [table(group), f"!{link('speed and size over depth', picture.name)}\n"]
    replace_file(output, "\n".join(parts))
