#!/usr/bin/env python3
"""A model of the shape of Llama 3 8B with random Q4_0 weights, for measuring speed where no model can be fetched.

random_model.py OUT.gguf [--centered]

32 layers, 32 heads on 8 key heads of 128 coordinates; a vocabulary of 32000 without a tokenizer: for llama-bench and
llama-batched-bench. --centered: qwen2's graph, whose key biases center the keys of the cache types. From the standard
library; 4.1 GB, half a minute.
"""

from __future__ import annotations

import argparse
import random
import struct
from pathlib import Path
from typing import BinaryIO

LAYERS, EMBD, FF, HEADS, HEADS_KV, HEAD_DIM, VOCAB, CONTEXT = 32, 4096, 14336, 32, 8, 128, 32000, 262144
ALIGNMENT = 32
F32, Q4_0 = 0, 2  # types of tensors
UINT32, FLOAT32, STRING = 4, 6, 8  # types of metadata


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def metadata(arch: str) -> list[bytes]:
    def entry(key: str, kind: int, value: bytes) -> bytes:
        return text(key) + struct.pack("<I", kind) + value

    numbers = {
        "context_length": CONTEXT,
        "embedding_length": EMBD,
        "block_count": LAYERS,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS_KV,
        "rope.dimension_count": HEAD_DIM,
        "vocab_size": VOCAB,
    }
    return [
        entry("general.architecture", STRING, text(arch)),
        entry("general.name", STRING, text("random 8B")),
        entry("tokenizer.ggml.model", STRING, text("none")),
        entry(f"{arch}.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", 1e-5)),
        entry(f"{arch}.rope.freq_base", FLOAT32, struct.pack("<f", 5e5)),
        *(entry(f"{arch}.{key}", UINT32, struct.pack("<I", n)) for key, n in numbers.items()),
    ]


def tensors(biases: bool) -> dict[str, tuple[int, ...]]:
    """Shapes, innermost first: of one dimension in F32, of two in Q4_0."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (EMBD, VOCAB),
        "output_norm.weight": (EMBD,),
        "output.weight": (EMBD, VOCAB),
    }
    for il in range(LAYERS):
        layer = {
            "attn_norm.weight": (EMBD,),
            "ffn_norm.weight": (EMBD,),
            "attn_q.weight": (EMBD, HEADS * HEAD_DIM),
            "attn_k.weight": (EMBD, HEADS_KV * HEAD_DIM),
            "attn_v.weight": (EMBD, HEADS_KV * HEAD_DIM),
            "attn_output.weight": (HEADS * HEAD_DIM, EMBD),
            "ffn_gate.weight": (EMBD, FF),
            "ffn_up.weight": (EMBD, FF),
            "ffn_down.weight": (FF, EMBD),
        }
        if biases:
            layer |= {"attn_q.bias": (HEADS * HEAD_DIM,)}
            layer |= {f"attn_{x}.bias": (HEADS_KV * HEAD_DIM,) for x in "kv"}
        found |= {f"blk.{il}.{name}": shape for name, shape in layer.items()}
    return found


def size_of(shape: tuple[int, ...]) -> int:
    return 4 * shape[0] if len(shape) == 1 else shape[0] * shape[1] // 32 * 18


def padding(n: int) -> bytes:
    return bytes(-n % ALIGNMENT)


def write(file: BinaryIO, arch: str) -> None:
    rng = random.Random(1)
    scale = struct.pack("<e", 0.0034)  # rows of length 4096 keep the variance of what they multiply
    blocks = b"".join(scale + rng.randbytes(16) for _ in range(1 << 16))
    entries, shapes = metadata(arch), tensors(biases=arch == "qwen2")
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(entries)) + b"".join(entries))
    offset = 0
    for name, shape in shapes.items():
        kind = F32 if len(shape) == 1 else Q4_0
        file.write(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        offset += size_of(shape) + len(padding(size_of(shape)))
    file.write(padding(file.tell()))
    for name, shape in shapes.items():
        left = size_of(shape)
        if len(shape) == 1:
            value = rng.random() if name.endswith(".bias") else 1.0
            file.write(struct.pack("<f", value) * shape[0])
        else:
            while left > 0:
                left -= file.write(blocks[:left])
        file.write(padding(size_of(shape)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--centered", action="store_true")
    args = parser.parse_args()
    with args.out.open("wb") as file:
        write(file, "qwen2" if args.centered else "llama")


if __name__ == "__main__":
    main()
