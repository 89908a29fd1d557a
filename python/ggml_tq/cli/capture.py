"""``ggml-tq capture``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ggml_tq.capture import CaptureError, Request, capture
from ggml_tq.cli.app import app, fail


@app.command("capture")
def capture_command(
    model: Annotated[Path, typer.Option("--model", "-m", help="The model (GGUF).")],
    text: Annotated[Path, typer.Option("--file", "-f", help="The text that it reads.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="What to write (safetensors).")],
    layers: Annotated[str, typer.Option(help="Layers to record, e.g. 0,5,10.")] = "all",
    context: Annotated[int, typer.Option("--ctx-size", "-c", min=1, help="Tokens a chunk; each starts afresh.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in all. (default: one chunk)")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="(default: llama.cpp's)")] = None,
    dtype: Annotated[str, typer.Option(help="f32, or f16 for half the size.")] = "f32",
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Record a model's queries, keys and values, for `ggml-tq study`.

    The built `llama-tq-capture` reads the text with an f32 cache and writes, for each layer, the queries, the keys
    before and after RoPE, and the values, as the cache receives them. Takes
    4 · (query heads + 3 · KV heads) · head dim bytes a token and layer.
    """
    request = Request(model, text, output, layers, context, max_tokens, threads, dtype, force)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("tokens", total=None)
            done = capture(request, lambda n, total: progress.update(task, completed=n, total=total))
        with done:
            heads = {f"{x.n_head}/{x.n_head_kv} heads of {x.head_dim_k}" for x in done.layers.values()}
            typer.echo(f"{output}: {len(done.positions)} tokens, {len(done.layers)} layers, {', '.join(sorted(heads))}")
    except (CaptureError, OSError) as e:
        raise fail(e) from e
