"""A study as rows, a Markdown page, a JSON file and a plot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ggml_tq.study import KeyScore, LayerScores, Study


@dataclass(frozen=True)
class Row:
    """A pair of quantizers over all layers: means, but for ``kl_max``, the worst head of any layer."""

    key: str
    value: str
    key_bits: float
    value_bits: float
    key_error: float
    value_error: float
    logit_bias: float  # root mean square over layers: signs differ from layer to layer
    logit_slope: float
    logit_variance: float
    kl: float
    kl_max: float
    output_key: float
    output_value: float
    output_both: float


def rows(study: Study) -> list[Row]:
    out = []
    for key, value in study.pairs:
        keys = [layer.keys[key] for layer in study.layers]
        values = [layer.values[value] for layer in study.layers]

        def mean(f: Callable[[KeyScore], float], keys: list[KeyScore] = keys) -> float:
            return float(np.mean([f(k) for k in keys]))

        out.append(
            Row(
                key=key,
                value=value,
                key_bits=keys[0].bits,
                value_bits=values[0].bits,
                key_error=mean(lambda k: k.error),
                value_error=float(np.mean([v.error for v in values])),
                logit_bias=mean(lambda k: k.logit_bias**2) ** 0.5,
                logit_slope=mean(lambda k: k.logit_slope),
                logit_variance=mean(lambda k: k.logit_variance),
                kl=mean(lambda k: k.kl),
                kl_max=max(k.kl_max for k in keys),
                output_key=mean(lambda k: k.output),
                output_value=float(np.mean([v.output for v in values])),
                output_both=float(np.mean([layer.outputs[f"{key} / {value}"] for layer in study.layers])),
            )
        )
    return out


HEADINGS = (
    "keys", "values", "bits K", "bits V", "error K", "error V", "logit bias", "slope", "variance", "KL", "worst head",
    "output K", "output V", "output K+V",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """The row's cells, under HEADINGS."""
    return (
        row.key,
        row.value,
        f"{row.key_bits:.4g}",
        f"{row.value_bits:.4g}",
        f"{row.key_error:.3g}",
        f"{row.value_error:.3g}",
        f"{row.logit_bias:.2g}",
        f"{row.logit_slope:+.4f}",
        f"{row.logit_variance:.3g}",
        f"{row.kl:.3g}",
        f"{row.kl_max:.3g}",
        f"{row.output_key:.3g}",
        f"{row.output_value:.3g}",
        f"{row.output_both:.3g}",
    )


def shares(layers: list[LayerScores]) -> list[str]:
    """Lines about the energy of keys in their means."""
    lines = []
    for what, found in (
        ("after RoPE", [layer.mean_share for layer in layers]),
        ("before RoPE, turned by position", [layer.rope_share for layer in layers if layer.rope_share]),
    ):
        if found:
            x = np.concatenate([np.asarray(f) for f in found])
            lines.append(
                f"share of the keys' energy in their mean {what}: median {np.median(x):.2f}, max {x.max():.3f}"
            )
    return lines


def _ranges(numbers: list[int]) -> str:
    """0, 3, 4, 5 as "0, 3 to 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def title(study: Study) -> str:
    layers = _ranges([layer.layer for layer in study.layers])
    meta = study.metadata
    hashes = "".join(f", {what} sha256 {meta[key][:16]}…" for what, key in HASHES if key in meta)
    return (
        f"{meta.get('model', '?')}: {study.n_tokens} tokens of {meta.get('text', '?')} in chunks of "
        f"{meta.get('n_ctx', '?')}{hashes}; layers {layers}; {study.n_queries} queries a head, from position "
        f"{study.skip} on; means over the first {study.calibration} tokens."
    )


HASHES = (("model", "model_sha256"), ("text", "text_sha256"))

_LEGEND = """\
Errors are squared and relative. Logit bias, slope and variance are relative to the logits' own spread over the keys a
query sees (the slope is what a quantizer adds to the factor of every logit). KL: nats, of the attention distribution
with quantized keys from the exact one, mean over queries, query heads and layers; worst head: the highest mean of one
head. Output: error of the attention output with keys, values or both quantized. `+mean` and `+rope` take the mean of
the keys after or before RoPE off first; `+cal` centers and scales keys as the metadata of the calibrated model say, as
the cache does. `ggml_tq.study` defines each figure.
"""


def markdown(study: Study, plot: str) -> str:
    """``plot``: the picture's file name."""
    lines = [f"# Quantizers on real keys and values: {study.metadata.get('model', '?')}", "", title(study), ""]
    lines += [*(f"- {line}" for line in shares(study.layers)), "", _LEGEND]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "--:|" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows(study)]
    lines += ["", f"![KL and output error a layer, and KL against bits]({plot})", "", "Written by `ggml-tq study`."]
    return "\n".join(lines) + "\n"


def as_json(study: Study) -> str:
    """Everything, layer by layer, with the rows; numbers to five digits."""

    def short(x: object) -> object:
        if isinstance(x, float):
            return float(f"{x:.5g}") if np.isfinite(x) else None  # JSON has no infinity
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [short(v) for v in x]
        return x

    return json.dumps(short({**asdict(study), "rows": [asdict(r) for r in rows(study)]}))


def plot(study: Study, path: Path) -> None:
    """KL of each layer, output error of each layer, KL against bits: a colour a quantizer, a line style a centring."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 6), layout="constrained")
    FigureCanvasAgg(figure)
    kl, output, pareto = figure.subplots(1, 3)
    layers = [layer.layer for layer in study.layers]
    lines = {"": ("-", "o"), "mean": ("--", "s"), "rope": (":", "^"), "cal": ("-.", "D")}
    quantizers = list(dict.fromkeys(key.partition("+")[0] for key, _ in study.pairs))
    for (key, value), row in zip(study.pairs, rows(study), strict=True):
        quantizer, _, center = key.partition("+")
        line, marker = lines[center]
        colour = colormaps["tab20"](quantizers.index(quantizer) % 20)
        label = f"{key} / {value}"
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
        kl.plot(layers, [layer.keys[key].kl for layer in study.layers], line, label=label, **style)
        output.plot(layers, [layer.outputs[label] for layer in study.layers], line, **style)
        pareto.plot(row.key_bits, row.kl, color=colour, marker=marker, linestyle="")
    kl.set(title="KL of attention, keys quantized", xlabel="layer", ylabel="nats")
    output.set(title="error of the attention output, both quantized", xlabel="layer", ylabel="relative squared error")
    pareto.set(title="KL against size", xlabel="bits a coordinate of a key", ylabel="nats, mean over layers")
    for axes in (kl, output, pareto):
        axes.set_yscale("log", nonpositive="mask")
        axes.grid(alpha=0.3)
    for axes in (kl, output):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=6, fontsize=7, title="keys / values", title_fontsize=8)
    figure.savefig(path, dpi=85, format="png", metadata={"Software": None})


def write(study: Study, prefix: Path) -> list[Path]:
    """Write PREFIX.json, .md and .png (a directory: DIR/study.*): all of them, or none where one cannot be."""
    if prefix.is_dir():
        prefix = prefix / "study"
    targets = [prefix.with_name(prefix.name + suffix) for suffix in (".json", ".md", ".png")]
    with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=".study-") as folder:
        made = [Path(folder) / target.name for target in targets]
        made[0].write_text(as_json(study) + "\n")
        made[1].write_text(markdown(study, targets[2].name))
        plot(study, made[2])
        for source, target in zip(made, targets, strict=True):
            os.replace(source, target)
    return targets
