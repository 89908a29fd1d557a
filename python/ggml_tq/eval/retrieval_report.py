"""Table and heat maps of recorded retrievals, each type against f16 on the same haystacks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_tq.eval.report import link, links, model_names, replace_file, save_figure
from ggml_tq.eval.retrieval import Answer, Record
from ggml_tq.eval.runs import EvalError, check_comparable

_INTRO = """\
# Retrieval

Facts of the form "The magic number of the *adjective noun* is *number*." at {depths} of a haystack, and a question for
each. In `niah` they stand between sentences of a text; in `multikey` the whole haystack is such facts. Each haystack
answers for all depths. The chat is the model's own template with the first words of the answer given.

*Right* is the share of questions that greedy generation answers exactly. *log p* is the mean log-probability of the
right answer's tokens in nats, each after those before it; it shows damage long before an answer turns wrong. *vs f16*
is the difference on the same haystacks. ± is one standard error. A cell's is binomial, at the share (k + ½)/(n + 1) so
that it is not 0 where all are right. Over depths and lengths it is that of means over haystacks, because the questions
of one haystack are not independent; for the share the binomial one where that is larger.

Written by `ggml-tq retrieval`; the records behind it, with hashes, seeds and processor, are in {inputs}.
"""


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    def show(self, digits: int, signed: bool = False) -> str:
        sign = "+" if signed else ""
        error = "?" if math.isnan(self.error) else f"{self.error:.{digits}f}"
        return f"{self.value:{sign}.{digits}f} ± {error}"


def share(right: Sequence[bool]) -> Estimate:
    """Share of the right ones with its binomial error at the share (k + 1/2) / (n + 1)."""
    k, n = sum(right), len(right)
    p = (k + 0.5) / (n + 1)
    return Estimate(k / n, math.sqrt(p * (1 - p) / n))


def mean(values: Sequence[float]) -> Estimate:
    """Mean of independent values; the error of a single one is not a number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error)


Trials = dict[tuple[str, int], Record]  # by settings and trial


@dataclass(frozen=True)
class Row:
    """The records of one pair of types, and those of f16 on the same haystacks."""

    records: Trials
    f16: Trials

    @property
    def label(self) -> str:
        first = next(iter(self.records.values()))
        return " / ".join(first.pair.names(first.cache.k, first.cache.v))

    @property
    def mib(self) -> float:
        """Size of the cache of the longest haystack."""
        longest = max(self.records.values(), key=lambda r: r.settings.length)
        return sum(p.mib_k + p.mib_v for p in longest.cache.parts)

    def answers(self, length: int, depth: float) -> list[Answer]:
        found = (a for r in self.records.values() if r.settings.length == length for a in r.answers)
        return [a for a in found if a.depth == depth]

    def right(self) -> Estimate:
        by_haystack = mean([statistics.fmean(a.correct for a in r.answers) for r in self.records.values()])
        binomial = share([a.correct for r in self.records.values() for a in r.answers])
        return Estimate(by_haystack.value, max(binomial.error, by_haystack.error))  # the first where the other is nan

    def logprob(self) -> Estimate:
        return mean([statistics.fmean(a.logprob for a in r.answers) for r in self.records.values()])

    def _pairs(self) -> list[tuple[Record, Record]]:
        return [(r, self.f16[key]) for key, r in self.records.items() if key in self.f16]

    def right_vs_f16(self) -> Estimate:
        return mean(
            [
                statistics.fmean(a.correct for a in r.answers) - statistics.fmean(a.correct for a in f.answers)
                for r, f in self._pairs()
            ]
        )

    def logprob_vs_f16(self, length: int | None = None, depth: float | None = None) -> Estimate:
        """Over the questions at one length or depth, or over all."""
        differences = []
        for r, f in self._pairs():
            if length in (None, r.settings.length):
                both = zip(r.answers, f.answers, strict=True)
                differences.append(statistics.fmean(a.logprob - b.logprob for a, b in both if depth in (None, a.depth)))
        return mean(differences)


@dataclass(frozen=True)
class Group:
    """All that is recorded of one model and task."""

    model: str  # a name
    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    rows: list[Row]  # by size of the cache

    @property
    def first(self) -> Record:
        return next(iter(self.rows[0].records.values()))


def groups(records: Iterable[Record]) -> list[Group]:
    """Records by model and task. Raises EvalError where they were not measured alike, or where f16 is missing."""
    by_task: dict[tuple[str, str], dict[str, Trials]] = defaultdict(lambda: defaultdict(dict))
    by_length: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    seen: dict[tuple[str, int], str] = {}
    for r in records:
        s = r.settings
        by_task[s.model_sha256, s.task][str(r.pair)][s.key(), r.trial] = r
        by_length[s.model_sha256, s.task, s.length].append(r)
        if seen.setdefault((s.key(), r.trial), r.haystack) != r.haystack:
            raise EvalError(f"{s.model}, {s.task}, {s.length} tokens, trial {r.trial}: two different haystacks")
    if not by_task:
        raise EvalError("no results")
    for same in by_length.values():
        check_comparable(same)
    result = []
    called = model_names(r for same in by_length.values() for r in same)
    for (model, task), pairs in by_task.items():
        first = next(iter(next(iter(pairs.values())).values())).settings
        if "f16" not in pairs:
            raise EvalError(f"{first.model}, {task}: there is no f16 to compare with")
        rows = [Row(trials, pairs["f16"]) for trials in pairs.values()]
        for row in rows:
            if not row.records.keys() <= row.f16.keys():
                raise EvalError(f"{first.model}, {task}, {row.label}: f16 was not measured on all its haystacks")
        lengths = sorted({r.settings.length for row in rows for r in row.records.values()})
        rows.sort(key=lambda row: (-row.mib, row.label))
        result.append(Group(called[model], task, tuple(lengths), first.depths, rows))
    return sorted(result, key=lambda g: (g.model.lower(), g.task != "niah"))


def _complete(group: Group) -> str:
    """Says so where types were not measured on the same number of haystacks."""
    counts = {row.label: len(row.records) for row in group.rows}
    if len(set(counts.values())) == 1:
        return ""
    return " Not all are done: " + ", ".join(f"{label} {n}" for label, n in counts.items()) + " haystacks."


def table(group: Group) -> str:
    """Markdown: a row for each pair of types, then the cells by depth."""
    s = group.first.settings
    where = f"{s.cpu}, {s.gpu}" if s.gpu else s.cpu
    counts = [sum(r.settings.length == n for r in group.rows[0].f16.values()) for n in group.lengths]
    haystacks = ", ".join(f"{count} haystacks of {n} tokens" for count, n in zip(counts, group.lengths, strict=True))
    by_length = group.lengths if len(group.lengths) > 1 else ()
    lines = [
        f"## {group.model}: {group.task}",
        "",
        f"{haystacks}, {len(group.depths)} questions each, {s.digits} digits, seed {s.seed}"
        f"{f', from {s.text} (sha256 {s.text_sha256[:8]})' if s.task == 'niah' else ''}. {where}, {s.threads} threads, "
        f"program {s.binary_sha256[:8]}, model {s.model_sha256[:8]}.{_complete(group)}",
        "",
        "| K / V | cache, ÷ f16 | right, % | vs f16 | log p | vs f16 |" + "".join(f" {n} tokens |" for n in by_length),
        "|---|--:|--:|--:|--:|--:|" + "--:|" * len(by_length),
    ]
    f16_mib = next(row for row in group.rows if row.records is row.f16).mib
    for row in group.rows:
        right, vs = row.right(), row.right_vs_f16()
        is_f16 = row.records is row.f16
        cells = [
            row.label,
            f"{row.mib / f16_mib:.3f}",
            Estimate(100 * right.value, 100 * right.error).show(1),
            "" if is_f16 else Estimate(100 * vs.value, 100 * vs.error).show(1, signed=True),
            row.logprob().show(3),
            "" if is_f16 else row.logprob_vs_f16().show(3, signed=True),
            *("" if is_f16 else _length_cell(row, n) for n in by_length),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for length in group.lengths:
        heads = " | ".join(f"{depth:.0%}" for depth in group.depths)
        lines += ["", f"Right at each depth, {length} tokens:", "", f"| K / V | {heads} |"]
        lines.append("|---|" + "--:|" * len(group.depths))
        for row in group.rows:
            cells = [row.label]
            for depth in group.depths:
                answers = row.answers(length, depth)
                correct = [a.correct for a in answers]
                cells.append(f"{sum(correct)}/{len(correct)} ± {share(correct).error:.2f}" if correct else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _length_cell(row: Row, length: int) -> str:
    measured = any(r.settings.length == length for r in row.records.values())
    return row.logprob_vs_f16(length).show(3, signed=True) if measured else "-"


def _grid(group: Group, row: Row, relative: bool) -> list[list[float]]:
    """Depths by lengths: the share of right answers, or log p against f16; not a number where nothing is measured."""
    grid = [[math.nan] * len(group.lengths) for _ in group.depths]
    for i, depth in enumerate(group.depths):
        for j, length in enumerate(group.lengths):
            answers = row.answers(length, depth)
            if answers and relative:
                grid[i][j] = row.logprob_vs_f16(length, depth).value
            elif answers:
                grid[i][j] = statistics.fmean(a.correct for a in answers)
    return grid


def plot(tasks: Sequence[Group], path: Path) -> None:
    """Heat maps of one model: a column for each pair of types; of each task the share of right answers and log p."""
    from matplotlib.figure import Figure  # slow to import

    pairs = list(dict.fromkeys(row.label for group in tasks for row in group.rows))
    figure = Figure(figsize=(1.2 + 1.25 * len(pairs), 0.5 + 3.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(2 * len(tasks), len(pairs), squeeze=False)
    for t, group in enumerate(tasks):
        rows = {row.label: row for row in group.rows}
        for relative in (False, True):
            colours = {"cmap": "RdBu", "vmin": -2, "vmax": 2} if relative else {"cmap": "RdYlGn", "vmin": 0, "vmax": 1}
            for ax, label in zip(axes[2 * t + relative], pairs, strict=True):
                if label not in rows:
                    ax.set_axis_off()
                    continue
                grid = _grid(group, rows[label], relative)
                ax.imshow(grid, aspect="auto", alpha=0.8, **colours)
                for i, line in enumerate(grid):
                    for j, value in enumerate(line):
                        text = "" if math.isnan(value) else f"{value:+.2f}" if relative else f"{100 * value:.0f}"
                        ax.text(j, i, text, ha="center", va="center", fontsize=6)
                ax.set_xticks(range(len(group.lengths)), [str(n) for n in group.lengths], fontsize=6)
                ax.set_yticks(range(len(group.depths)), [f"{d:.0%}" for d in group.depths], fontsize=6)
                ax.set_title(label.replace(" / ", "\n"), fontsize=7)
            axes[2 * t + relative][0].set_ylabel(
                f"{group.task}\n{'log p vs f16' if relative else 'right, %'}", fontsize=7
            )
    figure.suptitle(f"{tasks[0].model}: depth of the fact, and tokens of the haystack", fontsize=9)
    save_figure(figure, path)


def write(records: Iterable[Record], output: Path, inputs: Sequence[Path]) -> None:
    """Write the tables to `output` and heat maps beside it.

    Raises EvalError, before anything is written, where results are missing or cannot be compared.
    """
    by_model: dict[str, list[Group]] = defaultdict(list)
    for group in groups(records):
        by_model[group.model].append(group)
    depths = sorted({d for tasks in by_model.values() for group in tasks for d in group.depths})
    parts = [_INTRO.format(inputs=links(inputs, output.parent), depths=f"{len(depths)} depths")]
    output.parent.mkdir(parents=True, exist_ok=True)
    for model, tasks in by_model.items():
        picture = output.with_name(f"{output.stem}-{model}.svg")
        plot(tasks, picture)
        parts += [f"!{link(f'heat maps of {model}', picture.name)}\n", *map(table, tasks)]
    replace_file(output, "\n".join(parts))
