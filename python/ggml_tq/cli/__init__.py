"""The ``ggml-tq`` command; one module a group of subcommands, which registers itself on import."""

from ggml_tq.cli import capture, data, distortion, metadata, study
from ggml_tq.cli import eval as eval_
from ggml_tq.cli.app import app

__all__ = ["app", "capture", "data", "distortion", "eval_", "metadata", "study"]
