"""Tables and plots of recorded results.

A table holds results of one model, text, context and number of chunks, all measured with the same settings; anything
else is refused, not averaged over. The numbers are those of the records; nothing is computed here but their order.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from ggml_tq.cache_types import TYPES
from ggml_tq.eval.runs import Cache, EvalError, FigureName, Record, check_comparable, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

Group = list[Record]


class Model(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def model_sha256(self) -> str: ...


class Named(Protocol):
    """A record of a model."""

    @property
    def settings(self) -> Model: ...


_HEAD = """\
| K / V | path | bits a value | perplexity | ÷ f16 | mean KLD | median | 99 % | 99.9 % | max | same top token |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""
_INTRO = """\
# Quality of cache types

Perplexity and KL divergence to the f16 cache of the same program, measured by its own `llama-perplexity`: the second
half of each chunk is scored. `batched` computes up to 512 tokens at once, `decode` one at a time, as text is generated.
Both are compared with logits of batched f16. The floor is not 0: bf16, or f16 on the path `decode`, differ from it only
by rounding (only batched f16 and f32 have upstream's tiled kernel), which quantized weights amplify, as activations are
rounded to 8 bits for them. Divergences as small as theirs say nothing of a type. Batched f16 itself is off by what the
program's file of logits loses: 16 bits each, at most 16 below the largest.
Upstream's types have upstream's rotation, those marked -norot not. ± is one standard error, over tokens. Bits a value
are those of the types with their scales, keys and values together.

Written by `ggml-tq report`; the records behind it, with hashes and processor, are in {inputs}.
"""


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}".replace("-" + f"{0:.{digits}f}", f"{0:.{digits}f}")


_UPSTREAM_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}
BITS: dict[str, float] = {**_UPSTREAM_BITS, "iq4_nl": 4.5, **{t.name: t.bits_per_value for t in TYPES.values()}}


def bits(c: Cache) -> float:
    """A value, over keys and values: of the types where they are known, as sizes are printed to 0.01 MiB."""
    k, v = BITS.get(c.k), BITS.get(c.v)
    if k is None or v is None:
        return c.bits
    n_k, n_v = c.mib_k / k, c.mib_v / v
    if k == v or abs(n_k - n_v) <= 0.01 / k + 0.01 / v:  # as many keys as values, as far as printed sizes say
        return (k + v) / 2
    return (n_k * k + n_v * v) / (n_k + n_v)


def link(text: str, target: str | Path) -> str:
    """A Markdown link to a file."""
    return f"[{text}]({quote(str(target))})"


def names(models: Mapping[str, str]) -> dict[str, str]:
    """A name for each file, by hash: the short one, where another's is the same the file's, or that with the hash."""
    found: dict[str, str] = {}
    files = {h: file.removesuffix(".gguf") for h, file in models.items()}
    for of in (
        {h: short_name(file) for h, file in files.items()},
        files,
        {h: f"{file}-{h[:8]}" for h, file in files.items()},
    ):
        counts = Counter(name.lower() for name in of.values())
        found = {h: name for h, name in of.items() if counts[name.lower()] == 1} | found
    return found


def model_names(records: Iterable[Named]) -> dict[str, str]:
    return names({r.settings.model_sha256: r.settings.model for r in records})


def plus_minus(r: Record, name: FigureName, digits: int) -> str:
    """A figure with its standard error."""
    value, error = r.value(name), r.error(name)
    return _number(value, digits) + (f" ± {error:.{digits}f}" if value is not None and error is not None else "")


def groups(records: Iterable[Record]) -> list[Group]:
    """Results that may share a table: same model, text, context and chunks.

    Raises EvalError where their other settings differ, or where one run was recorded twice with different results.
    """
    found: dict[tuple[object, ...], dict[object, Record]] = defaultdict(dict)
    for r in records:
        s = r.settings
        same = found[s.model_sha256, s.text_sha256, s.context, s.chunks]
        twin = same.setdefault((r.settings.key(), r.pair, r.path), r)
        if twin.figures != r.figures:
            raise EvalError(f"two different results of {s.model}, {s.context} tokens, {r.pair}, {r.path}")
    result = []
    for group in found.values():
        rows = sorted(group.values(), key=lambda r: (r.path, -bits(r.cache), str(r.pair)))
        try:
            check_comparable(rows)
        except EvalError as e:
            raise EvalError(f"{rows[0].settings.model}, {rows[0].settings.context} tokens: {e}") from e
        result.append(rows)
    return sorted(result, key=lambda g: (g[0].settings.model.lower(), g[0].settings.text, g[0].settings.context))


def _row(r: Record) -> str:
    cells = (
        " / ".join(r.names),
        r.path,
        f"{bits(r.cache):.2f}",
        _number(r.value("ppl"), 3),
        plus_minus(r, "ppl_ratio", 4),
        plus_minus(r, "kld", 5),
        _number(r.value("kld_median"), 5),
        _number(r.value("kld_99"), 4),
        _number(r.value("kld_99.9"), 3),
        _number(r.value("kld_max"), 2),
        plus_minus(r, "same_top", 2) + " %",
    )
    return f"| {' | '.join(cells)} |\n"


def chunk_error_ratio(group: Group) -> float | None:
    """How much larger errors of the mean KLD are from the spread of chunks than from that of tokens (median of rows).

    Tokens of one chunk are not independent, which upstream's error over tokens takes them to be.
    """
    ratios = []
    for r in group:
        error = r.error("kld")
        if len(r.chunk_kld) >= 5 and error and bits(r.cache) < 16:
            ratios.append(statistics.stdev(r.chunk_kld) / len(r.chunk_kld) ** 0.5 / error)
    return statistics.median(ratios) if ratios else None


def _table(group: Group) -> str:
    first, s = group[0], group[0].settings
    ratio = chunk_error_ratio(group)
    spread = f" The spread of the chunks gives errors {ratio:.1f} times as large." if ratio else ""
    where = f"{s.cpu}, {s.gpu}" if s.gpu else s.cpu
    return (
        f"## {s.model}, {s.context} tokens\n\n"
        f"{s.chunks} chunks of {s.text}, {s.scored} tokens scored; perplexity with the f16 cache "
        f"{plus_minus(first, 'ppl_f16', 4)}.{spread} {where}, {s.threads} threads, `{' '.join(s.flags)}`, "
        f"program {s.binary_sha256[:8]}, model {s.model_sha256[:8]}, text {s.text_sha256[:8]}.\n\n"
        + _HEAD
        + "".join(map(_row, group))
    )


def tables(records: Iterable[Record]) -> str:
    """Markdown tables of the results."""
    return "\n".join(map(_table, groups(records)))


def compact(records: Iterable[Record]) -> str:
    """One Markdown table: mean KLD of batched runs, a row a pair of types, a column a model and context.

    Of each model the context with the most results is shown.
    """
    records = list(records)
    largest: dict[str, Group] = {}
    for group in groups(records):
        batched = [r for r in group if r.path == "batched"]
        model = group[0].settings.model_sha256
        if len(batched) > len(largest.get(model, [])):
            largest[model] = batched
    columns = list(largest.values())
    if not columns:
        raise EvalError("no batched results")
    rows: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for i, column in enumerate(columns):
        for r in column:
            if (r.cache.k, r.cache.v) != ("f16", "f16"):  # 0
                rows[r.names][i] = r
    called = model_names(records)
    heads = [f"{called[c[0].settings.model_sha256]}, {c[0].settings.context} tokens" for c in columns]
    lines = [f"| K / V | bits a value | {' | '.join(heads)} |", "|---|--:|" + "--:|" * len(columns)]
    for (k, v), cells in sorted(rows.items(), key=lambda row: -bits(next(iter(row[1].values())).cache)):
        shown = [plus_minus(cells[i], "kld", 4) if i in cells else "-" for i in range(len(columns))]
        size = bits(next(iter(cells.values())).cache)
        lines.append(f"| {k} / {v} | {size:.2f} | {' | '.join(shown)} |")
    scored = min(c[0].settings.scored for c in columns)
    unlike = differences([c[0] for c in columns], ignored={"model_sha256", "context", "chunks", "flags"})
    flags = dict.fromkeys(" ".join(_without_sizes(c[0].settings.flags)) for c in columns)
    unlike += [f"flags ({' / '.join(flags)})"] if len(flags) > 1 else []
    said = f" Columns were measured differently: {'; '.join(unlike)}." if unlike else ""
    head = f"Mean KL divergence to the f16 cache, at least {scored} tokens scored, ± one standard error"
    return head + (f".{said}\n\n" if said else ":\n\n") + "\n".join(lines) + "\n"


def short_name(file: str) -> str:
    """A model's name without its quantization and endings."""
    return re.sub(r"[-.]q\d[\w]*$", "", file.removesuffix(".gguf").removesuffix("-tq"), flags=re.I)


def _series(r: Record) -> int:
    ours = sum(t.startswith("tq") for t in (r.cache.k, r.cache.v))
    return 1 if r.pair.k != r.pair.v else 2 * (ours == 2)


_SERIES = (("upstream", "s", "#777777"), ("mixed", "D", "#d9822b"), ("ggml-tq", "o", "#1f6fb4"))


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, by the first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def save_figure(figure: Figure, path: Path) -> None:
    """Write an SVG file: the same one for the same numbers."""
    import matplotlib as mpl

    scratch = path.with_suffix(".partial")
    with mpl.rc_context({"svg.hashsalt": "ggml-tq", "svg.fonttype": "none"}):
        figure.savefig(scratch, format="svg", metadata={"Date": None}, bbox_inches="tight")
    scratch.replace(path)


def plot_pareto(group: Group, name: str, path: Path) -> bool:
    """Mean KLD over bits a value of the batched runs of one table; False where there is nothing to show."""
    from matplotlib.figure import Figure  # slow to import

    shown = [r for r in group if r.path == "batched" and bits(r.cache) < 16 and (r.value("kld") or 0) > 0]
    if len(shown) < 2:
        return False
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    points = [(bits(r.cache), r.value("kld") or 0.0) for r in shown]
    axes.plot(*zip(*_frontier(points), strict=True), color="#cccccc", zorder=0)
    for n, (label, marker, colour) in enumerate(_SERIES):
        of = [(p, r) for p, r in zip(points, shown, strict=True) if _series(r) == n]
        if of:
            xs, ys = zip(*(p for p, _ in of), strict=True)
            errors = [r.error("kld") or 0.0 for _, r in of]
            axes.errorbar(xs, ys, yerr=errors, fmt=marker, color=colour, ms=5, label=label)
        for (x, y), r in of:
            left = n == 0  # of the point, so that names of the two families do not meet
            axes.annotate(
                str(r.pair),
                (x, y),
                xytext=(-5 if left else 5, -3),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7,
                color=colour,
            )
    axes.set(xlabel="bits a value", ylabel="mean KL divergence to f16", yscale="log")
    axes.set_title(f"{name}, {group[0].settings.context} tokens", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
    return True


def _without_sizes(flags: Sequence[str]) -> list[str]:
    pairs = [i for i, flag in enumerate(flags) if flag in ("-b", "-ub")]
    return [flag for i, flag in enumerate(flags) if i not in pairs and i - 1 not in pairs]


def plot_context(model_groups: Sequence[Group], name: str, path: Path) -> bool:
    """Mean KLD over context length of one model; False where fewer than two contexts are recorded alike."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    first = model_groups[0][0].settings
    alike = [
        g
        for g in model_groups
        if _without_sizes(g[0].settings.flags) == _without_sizes(first.flags)
        and all(
            getattr(g[0].settings, what) == getattr(first, what)
            for what in ("text_sha256", "threads", "binary_sha256", "cpu", "gpu")
        )
    ]
    lines: dict[str, list[Record]] = defaultdict(list)
    for group in alike:
        for r in group:
            if r.path == "batched" and bits(r.cache) < 16 and (r.value("kld") or 0) > 0:
                lines[" / ".join(r.names)].append(r)
    lines = {types: rs for types, rs in lines.items() if len({r.settings.context for r in rs}) > 1}
    if not lines:
        return False
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set_prop_cycle(color=[mpl.colormaps["tab20"](i) for i in range(20)])
    for types, rs in lines.items():
        contexts, values = [r.settings.context for r in rs], [r.value("kld") or 0.0 for r in rs]
        axes.errorbar(contexts, values, yerr=[r.error("kld") or 0.0 for r in rs], marker="o", ms=4, lw=1, label=types)
    ticks = sorted({r.settings.context for rs in lines.values() for r in rs})
    axes.set(xlabel="context, tokens", ylabel="mean KL divergence to f16", xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(t) for t in ticks], minor=False)
    axes.minorticks_off()
    axes.set_title(name, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
    return True


@dataclass(frozen=True)
class LayerErrors:
    """What `ggml-tq study` recorded of keys: KL divergence of attention, nats, by layer."""

    source: Path
    model: str
    where: str  # tokens, text, queries
    kl: dict[str, dict[int, float]]  # by quantizer; layers without a finite figure are left out


def layer_errors(path: Path) -> LayerErrors:
    """Read a study's JSON. Raises EvalError where it is none."""
    try:
        study = json.loads(path.read_text())
        meta = study["metadata"]
        kl: dict[str, dict[int, float]] = {}
        for layer in study["layers"]:
            for name, score in layer["keys"].items():
                of_name = kl.setdefault(name, {})
                if score["kl"]:
                    of_name[int(layer["layer"])] = float(score["kl"])
        where = (
            f"{study['n_tokens']} tokens of {meta.get('text', '?')}, {study['n_queries']} queries a head, from "
            f"position {study['skip']} of each chunk on"
        )
        return LayerErrors(path, str(meta.get("model", path.stem)), where, kl)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise EvalError(f"{path} is no study that ggml-tq study wrote: {type(e).__name__} {e}") from e


def plot_layers(errors: LayerErrors, name: str, path: Path) -> None:
    """KL of attention over layers, a line a quantizer of keys."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set_prop_cycle(color=[mpl.colormaps["tab20"](i) for i in range(20)])
    for quantizer, kl in errors.kl.items():
        axes.plot(list(kl), list(kl.values()), marker="o", ms=3, lw=1, label=quantizer)
    axes.set(xlabel="layer", ylabel="KL divergence of attention, nats", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{name}, keys quantized", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def _layers_section(studies: Sequence[LayerErrors], output: Path) -> str:
    parts = ["## Error a layer\n"]
    called = names({str(n): errors.model for n, errors in enumerate(studies)})
    for n, errors in enumerate(studies):
        plot = output.with_name(f"{output.stem}-{called[str(n)]}-layers.svg")
        plot_layers(errors, called[str(n)], plot)
        source = link(errors.source.name, os.path.relpath(errors.source, output.parent))
        parts.append(
            f"!{link('KL of attention a layer', plot.name)}\n\nCaptured keys of {errors.model}, {errors.where}; "
            f"`+cal`: centered and scaled as in the cache. {source}, by `ggml-tq study`.\n"
        )
    return "\n".join(parts)


def replace_file(path: Path, text: str) -> None:
    """Write a text file, which is the old one or the whole new one at any time."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text)
    scratch.replace(path)


def between(file: Path, name: str, text: str) -> str:
    """The file's text with `text` between its ``<!-- name -->`` and ``<!-- /name -->`` lines."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    try:
        old = file.read_text(encoding="utf-8")
    except OSError as e:
        raise EvalError(f"{file}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise EvalError(f"{file} is not UTF-8") from e
    if not marked.search(old):
        raise EvalError(f"{file} has no <!-- {name} --> … <!-- /{name} --> lines")
    return marked.sub(lambda m: m[1] + text + m[2], old)


def put_between(file: Path, name: str, text: str) -> None:
    """Write the file anew with `text` between those lines."""
    replace_file(file, between(file, name, text))


def links(files: Iterable[Path], folder: Path) -> str:
    """Links from a file in a folder."""
    return ", ".join(link(p.name, os.path.relpath(p, folder)) for p in files)


def write(
    records: Sequence[Record],
    output: Path,
    inputs: Sequence[Path],
    readme: Path | None = None,
    studies: Sequence[Path] = (),
) -> None:
    """Write the report to `output`, plots beside it, and the compact table into `readme`.

    `studies`: JSON of `ggml-tq study`, whose error a layer is shown. Plots of retrieval that are beside the output are
    shown as they are (retrieval*). Raises EvalError, before anything is written, where results are missing or cannot
    be compared.
    """
    if not records:
        raise EvalError("no results")
    all_groups = groups(records)
    if readme:
        all_figures = link(output.name, os.path.relpath(output, readme.parent))
        new_readme = between(readme, "quality", f"{compact(records)}\nAll figures: {all_figures}.\n")
    of_layers = [layer_errors(path) for path in studies]
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = [_INTRO.format(inputs=links(inputs, output.parent))]
    called = model_names(records)
    by_model: dict[str, list[Group]] = defaultdict(list)
    for group in all_groups:
        by_model[group[0].settings.model_sha256].append(group)
    for model, model_groups in by_model.items():
        name = called[model]
        taken: set[Path] = set()
        for group in model_groups:
            parts.append(_table(group))
            s = group[0].settings
            plot = output.with_name(f"{output.stem}-{name}-{s.context}.svg")
            if plot in taken:
                plot = plot.with_name(f"{plot.stem}-{Path(s.text).stem}-{s.chunks}.svg")
            if plot_pareto(group, name, plot):
                taken.add(plot)
                parts.append(f"!{link('bits a value and mean KLD', plot.name)}\n")
        plot = output.with_name(f"{output.stem}-{name}-context.svg")
        if plot_context(model_groups, name, plot):
            parts.append(f"!{link('context length and mean KLD', plot.name)}\n")
    if of_layers:
        parts.append(_layers_section(of_layers, output))
    pictures = sorted(p for p in output.parent.glob("retrieval*") if p.suffix in (".svg", ".png"))
    if pictures:
        parts.append("## Retrieval\n\n" + "".join(f"!{link(p.stem, p.name)}\n" for p in pictures))
    replace_file(output, "\n".join(parts))
    if readme:
        replace_file(readme, new_readme)
