"""ggml-tq: TurboQuant KV cache types for llama.cpp, the Python side."""

__version__ = "0.1.0"
