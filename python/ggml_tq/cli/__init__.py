"""The ``ggml-tq`` command; one module a group of subcommands, which registers itself on import."""

from ggml_tq.cli import bench, calibrate, capture, data, distortion, metadata, retrieval, study, trellis
from ggml_tq.cli import eval as eval_
from ggml_tq.cli.app import app

__all__ = [
    "app",
    "bench",
    "calibrate",
    "capture",
    "data",
    "distortion",
    "eval_",
    "metadata",
    "retrieval",
    "study",
    "trellis",
]
