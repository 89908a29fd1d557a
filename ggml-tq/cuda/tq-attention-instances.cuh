#pragma once

// The instances of the attention kernel for a key type and a kind of value types. A source file each (template-instances),
// so that they compile side by side.

#include "tq-attention.cuh"

template <tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits>
static tq_attention_kernel tq_attention_of(int head_dim, int n_rows) {
    const bool few = n_rows <= 8;
    switch (head_dim) {
        case  64: return few ? tq_attention_instance< 64, 1, k_kind, k_bits, v_kind, v_bits>() : tq_attention_instance< 64, 2, k_kind, k_bits, v_kind, v_bits>();
        case 128: return few ? tq_attention_instance<128, 1, k_kind, k_bits, v_kind, v_bits>() : tq_attention_instance<128, 2, k_kind, k_bits, v_kind, v_bits>();
        case 192: return tq_attention_instance<192, 1, k_kind, k_bits, v_kind, v_bits>();
        case 256: return tq_attention_instance<256, 1, k_kind, k_bits, v_kind, v_bits>();
        default:  return {};
    }
}

template <tq_kind k_kind, int k_bits, tq_kind v_kind> tq_attention_kernel tq_attention_find(int v_bits, int head_dim, int n_rows) {
    switch (v_bits) {
        case 2: return tq_attention_of<k_kind, k_bits, v_kind, 2>(head_dim, n_rows);
        case 3: return tq_attention_of<k_kind, k_bits, v_kind, 3>(head_dim, n_rows);
        case 4: return tq_attention_of<k_kind, k_bits, v_kind, 4>(head_dim, n_rows);
        default: return {};
    }
}

#define TQ_ATTENTION_INSTANCES(k_kind, k_bits, v_kind) \
    template tq_attention_kernel tq_attention_find<k_kind, k_bits, v_kind>(int, int, int)
