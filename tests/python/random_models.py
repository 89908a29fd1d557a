"""Small GGUF models with random weights: every head layout that a test needs, in a few megabytes.

Weights are scaled so that attention is neither uniform nor one-hot (scores of standard deviation about 2)
and the output distribution is broad, so that an error in the cache is visible in the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

SCORE_STD = 2.0
N_VOCAB = 2048
N_EMBD = 128
N_FF = 128
N_CTX = 2048


@dataclass(frozen=True)
class Llama:
    """A llama-architecture model; GQA, MHA or MQA by the numbers of heads."""

    head_dim: int
    n_head: int = 4
    n_head_kv: int = 2
    n_layer: int = 2


@dataclass(frozen=True)
class Gemma3:
    """Sliding-window attention in 5 of 6 layers."""

    head_dim: int = 256
    rope_dim: int = 256  # coordinates of a head that are rotated by position
    n_head: int = 2
    n_head_kv: int = 1
    n_layer: int = 6
    window: int = 64


@dataclass(frozen=True)
class DeepSeek2:
    """Keys and values from one latent vector.

    With MLA the cache is one tensor of kv_lora_rank + rope_dim values a token: the key, whose first part is
    the value. Without, keys and values are expanded before they are cached and have two head dims.
    """

    mla: bool = True
    kv_lora_rank: int = 512
    rope_dim: int = 64
    nope_dim: int = 128
    head_dim_v: int = 128
    n_head: int = 2
    n_layer: int = 2


@dataclass(frozen=True)
class Biased:
    """Keys with a large bias in pairs that turn fast, as Qwen2.5 has it, which queries hardly look at.

    Architectures: qwen2 (NEOX pairs), stablelm (NEOX, RoPE of a part of a head), llama (adjacent pairs, RoPE factors),
    chatglm (adjacent pairs, one projection of queries, keys and values), granite (without RoPE if ``rope_dim`` is 0).
    """

    arch: str = "qwen2"
    head_dim: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_layer: int = 2
    rope_dim: int | None = None  # of a head; None: all
    bias: float = 20.0
    rope_factors: bool = False
    yarn: float = 0.0  # factor by which the context of 64 tokens is extended
    seed: int = 0  # of the biases

    @property
    def n_rot(self) -> int:
        return self.head_dim if self.rope_dim is None else self.rope_dim

    @property
    def n_embd(self) -> int:
        return self.head_dim * self.n_head

    def biased(self) -> list[int]:
        """The coordinates of a head that have a bias: the fastest pairs, and some that do not turn."""
        pairs = range(self.n_rot // 8)
        if self.arch in ("qwen2", "stablelm"):
            turned = [*pairs, *(i + self.n_rot // 2 for i in pairs)]
        else:
            turned = list(range(2 * len(pairs)))
        return turned + list(range(self.n_rot, self.head_dim, 4))

    def key_bias(self) -> NDArray[np.float32]:
        """(n_layer, n_head_kv, head_dim)"""
        rng = np.random.default_rng(self.seed)
        b = np.zeros((self.n_layer, self.n_head_kv, self.head_dim), np.float32)
        b[..., self.biased()] = self.bias * rng.standard_normal((self.n_layer, self.n_head_kv, len(self.biased())))
        return b


Model = Llama | Gemma3 | DeepSeek2 | Biased


class _Weights:
    """Adds tensors to a writer; `std` is the gain of one output for inputs of unit variance."""

    def __init__(self, writer: gguf.GGUFWriter, n_embd: int = N_EMBD) -> None:
        self.writer, self.n_embd = writer, n_embd
        self.rng = np.random.default_rng(20240607)

    def matrix(self, name: str, n_out: int, n_in: int, std: float = 1.0, heads: int | None = None) -> None:
        shape = (n_out, n_in) if heads is None else (heads, n_out, n_in)
        w = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(std / np.sqrt(n_in))
        self.writer.add_tensor(f"{name}.weight", w.astype(np.float16))

    def norm(self, name: str, n: int, value: float = 1.0) -> None:
        self.writer.add_tensor(f"{name}.weight", np.full(n, value, dtype=np.float32))

    def ends(self, embd_std: float = 1.0) -> None:
        self.matrix("token_embd", N_VOCAB, self.n_embd, embd_std * np.sqrt(self.n_embd))
        self.norm("output_norm", self.n_embd)
        self.matrix("output", N_VOCAB, self.n_embd, std=2.0)

    def ffn(self, block: str) -> None:
        self.norm(f"{block}.ffn_norm", self.n_embd)
        self.matrix(f"{block}.ffn_gate", N_FF, self.n_embd)
        self.matrix(f"{block}.ffn_up", N_FF, self.n_embd)
        self.matrix(f"{block}.ffn_down", self.n_embd, N_FF, std=0.5)


@cache
def _tokenizer(source: Path) -> dict[str, list | int | str | bool]:
    """The tokenizer's metadata in a GGUF file; slow to read, so read once."""
    fields = gguf.GGUFReader(source).fields
    prefix = "tokenizer.ggml."
    return {key.removeprefix(prefix): f.contents() for key, f in fields.items() if key.startswith(prefix)}


def _copy_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    """The byte-pair tokenizer, cut to the first N_VOCAB tokens (they are in the order of the merges)."""
    data = _tokenizer(source)
    tokens = data["tokens"][:N_VOCAB]
    known = set(tokens)
    writer.add_tokenizer_model(data["model"])
    writer.add_tokenizer_pre(data["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(data["token_type"][:N_VOCAB])
    writer.add_token_merges([m for m in data["merges"] if m.replace(" ", "") in known])
    writer.add_bos_token_id(data["bos_token_id"])
    writer.add_eos_token_id(data["eos_token_id"])
    writer.add_unk_token_id(data["unknown_token_id"])
    writer.add_add_bos_token(data["add_bos_token"])
    writer.add_add_space_prefix(data["add_space_prefix"])


def _llama(w: _Weights, m: Llama) -> None:
    w.writer.add_key_length(m.head_dim)
    w.writer.add_value_length(m.head_dim)
    w.writer.add_rope_dimension_count(m.head_dim)
    w.writer.add_head_count(m.n_head)
    w.writer.add_head_count_kv(m.n_head_kv)
    w.ends()
    gain = SCORE_STD**0.5  # a score is the product of a query and a key, over sqrt(head_dim)
    for il in range(m.n_layer):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm", N_EMBD)
        w.matrix(f"{block}.attn_q", m.n_head * m.head_dim, N_EMBD, gain)
        w.matrix(f"{block}.attn_k", m.n_head_kv * m.head_dim, N_EMBD, gain)
        w.matrix(f"{block}.attn_v", m.n_head_kv * m.head_dim, N_EMBD, std=2.0)
        w.matrix(f"{block}.attn_output", N_EMBD, m.n_head * m.head_dim)
        w.ffn(block)


def _gemma3(w: _Weights, m: Gemma3) -> None:
    w.writer.add_key_length(m.head_dim)
    w.writer.add_value_length(m.head_dim)
    w.writer.add_rope_dimension_count(m.rope_dim)
    w.writer.add_head_count(m.n_head)
    w.writer.add_head_count_kv(m.n_head_kv)
    w.writer.add_sliding_window(m.window)
    w.ends(embd_std=N_EMBD**-0.5)  # the graph multiplies by sqrt(N_EMBD)
    gain = SCORE_STD**0.5  # queries and keys are normalized: their norm weights set the scores
    for il in range(m.n_layer):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm", N_EMBD)
        w.matrix(f"{block}.attn_q", m.n_head * m.head_dim, N_EMBD)
        w.matrix(f"{block}.attn_k", m.n_head_kv * m.head_dim, N_EMBD)
        w.matrix(f"{block}.attn_v", m.n_head_kv * m.head_dim, N_EMBD)
        w.norm(f"{block}.attn_q_norm", m.head_dim, gain)
        w.norm(f"{block}.attn_k_norm", m.head_dim, gain)
        w.matrix(f"{block}.attn_output", N_EMBD, m.n_head * m.head_dim)
        w.norm(f"{block}.post_attention_norm", N_EMBD, 0.5)
        w.ffn(block)
        w.norm(f"{block}.post_ffw_norm", N_EMBD, 0.25)


def _deepseek2(w: _Weights, m: DeepSeek2) -> None:
    head_dim = m.nope_dim + m.rope_dim
    w.writer.add_key_length(m.kv_lora_rank + m.rope_dim if m.mla else head_dim)
    w.writer.add_value_length(m.kv_lora_rank if m.mla else m.head_dim_v)
    if m.mla:
        w.writer.add_key_length_mla(head_dim)
        w.writer.add_value_length_mla(m.head_dim_v)
    w.writer.add_kv_lora_rank(m.kv_lora_rank)
    w.writer.add_q_lora_rank(0)
    w.writer.add_rope_dimension_count(m.rope_dim)
    w.writer.add_head_count(m.n_head)
    w.writer.add_head_count_kv(1 if m.mla else m.n_head)
    w.writer.add_leading_dense_block_count(m.n_layer)
    w.writer.add_expert_feed_forward_length(N_FF)  # the loader asks, though no layer has experts
    w.writer.add_expert_shared_count(0)
    w.ends()
    # a score of MLA sums kv_lora_rank products of unit variance, otherwise head_dim, over sqrt(head_dim)
    gain = SCORE_STD * (head_dim / m.kv_lora_rank) ** 0.5 if m.mla else SCORE_STD
    for il in range(m.n_layer):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm", N_EMBD)
        w.matrix(f"{block}.attn_q", m.n_head * head_dim, N_EMBD, gain)
        w.matrix(f"{block}.attn_kv_a_mqa", m.kv_lora_rank + m.rope_dim, N_EMBD)
        w.norm(f"{block}.attn_kv_a_norm", m.kv_lora_rank)
        if m.mla:
            w.matrix(f"{block}.attn_k_b", m.kv_lora_rank, m.nope_dim, heads=m.n_head)
            w.matrix(f"{block}.attn_v_b", m.head_dim_v, m.kv_lora_rank, std=2.0, heads=m.n_head)
        else:
            w.matrix(f"{block}.attn_kv_b", m.n_head * (m.nope_dim + m.head_dim_v), m.kv_lora_rank)
        w.matrix(f"{block}.attn_output", N_EMBD, m.n_head * m.head_dim_v)
        w.ffn(block)


def _biased(w: _Weights, m: Biased) -> None:
    w.writer.add_key_length(m.head_dim)
    w.writer.add_value_length(m.head_dim)
    w.writer.add_rope_dimension_count(m.n_rot or m.head_dim)
    w.writer.add_head_count(m.n_head)
    w.writer.add_head_count_kv(m.n_head_kv)
    if m.arch == "granite":
        w.writer.add_logit_scale(1.0)
        w.writer.add_rope_scaling_finetuned(m.n_rot > 0)  # upstream's word for whether there is RoPE
    if m.arch == "stablelm":
        w.writer.add_layer_norm_eps(1e-5)
        w.writer.add_parallel_residual(use=False)
    w.ends()
    norms = ["output_norm"]
    if m.yarn:
        w.writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.writer.add_rope_scaling_factor(m.yarn)
        w.writer.add_rope_scaling_orig_ctx_len(64)
    if m.rope_factors:
        w.writer.add_tensor("rope_freqs.weight", np.geomspace(1, 8, m.n_rot // 2).astype(np.float32))
    gain = SCORE_STD**0.5
    rows = (m.n_head * m.head_dim, m.n_head_kv * m.head_dim, m.n_head_kv * m.head_dim)
    for il in range(m.n_layer):
        block = f"blk.{il}"
        q, k, v = (
            w.rng.standard_normal((n, m.n_embd), dtype=np.float32) * np.float32(std / np.sqrt(m.n_embd))
            for n, std in zip(rows, (gain, gain, 2.0), strict=True)
        )
        q.reshape(m.n_head, m.head_dim, m.n_embd)[:, m.biased()] *= 0.04  # so that attention is not one-hot
        weights, biases = [q, k, v], [np.zeros(n, np.float32) for n in rows]
        biases[1] = m.key_bias()[il].reshape(-1)
        names = ["attn_q", "attn_k", "attn_v"]
        if m.arch == "chatglm":
            weights, biases, names = [np.concatenate(weights)], [np.concatenate(biases)], ["attn_qkv"]
        for name, weight, bias in zip(names, weights, biases, strict=True):
            w.writer.add_tensor(f"{block}.{name}.weight", weight.astype(np.float16))
            w.writer.add_tensor(f"{block}.{name}.bias", bias)
        w.norm(f"{block}.attn_norm", m.n_embd)
        w.matrix(f"{block}.attn_output", m.n_embd, rows[0])
        if m.arch == "chatglm":
            w.norm(f"{block}.ffn_norm", m.n_embd)
            w.matrix(f"{block}.ffn_up", 2 * N_FF, m.n_embd)
            w.matrix(f"{block}.ffn_down", m.n_embd, N_FF, std=0.5)
        else:
            w.ffn(block)
        norms += [f"{block}.attn_norm", f"{block}.ffn_norm"]
    if m.arch == "stablelm":
        for norm in norms:
            w.writer.add_tensor(f"{norm}.bias", np.zeros(m.n_embd, np.float32))


def write_model(path: Path, model: Model, tokenizer: Path) -> Path:
    """Write `model` to `path` with the tokenizer of the GGUF `tokenizer`."""
    arch = model.arch if isinstance(model, Biased) else type(model).__name__.lower()
    n_embd = model.n_embd if isinstance(model, Biased) else N_EMBD
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(model.n_layer)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(N_FF)
    writer.add_vocab_size(N_VOCAB)
    writer.add_layer_norm_rms_eps(1e-5)
    _copy_tokenizer(writer, tokenizer)
    fill = {Llama: _llama, Gemma3: _gemma3, DeepSeek2: _deepseek2, Biased: _biased}[type(model)]
    fill(_Weights(writer, n_embd), model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
