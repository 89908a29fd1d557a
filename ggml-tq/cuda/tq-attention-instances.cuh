#pragma once

// The instances of the attention kernel for a key type and the kind of value types that goes with it. A source
// file each (template-instances), so that they compile side by side.

#include "tq-attention.cuh"

template <tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits>
static tq_attention_kernel tq_attention_of(int head_dim, int n_rows, bool pairs) {
#define TQ_INSTANCE(D, N, n_heads) tq_attention_instance<D, N, n_heads, k_kind, k_bits, v_kind, v_bits>()
#define TQ_INSTANCES(D) \
    n_rows <= 4 ? pairs ? TQ_INSTANCE(D, 4, 2) : TQ_INSTANCE(D, 4, 1) : n_rows <= 8 ? TQ_INSTANCE(D, 8, 1) : TQ_INSTANCE(D, 16, 1)
    switch (head_dim) {
        case  64: return TQ_INSTANCES( 64);
        case 128: return TQ_INSTANCES(128);
        case 192: return TQ_INSTANCE(192, 8, 1);
        case 256: return TQ_INSTANCE(256, 8, 1);
        default:  return {};
    }
#undef TQ_INSTANCES
#undef TQ_INSTANCE
}

template <tq_kind k_kind, int k_bits, tq_kind v_kind> tq_attention_kernel tq_attention_find(int v_bits, int head_dim, int n_rows, bool pairs) {
    switch (v_bits) {
        case 2: return tq_attention_of<k_kind, k_bits, v_kind, 2>(head_dim, n_rows, pairs);
        case 3: return tq_attention_of<k_kind, k_bits, v_kind, 3>(head_dim, n_rows, pairs);
        case 4: return tq_attention_of<k_kind, k_bits, v_kind, 4>(head_dim, n_rows, pairs);
        default: return {};
    }
}

#define TQ_ATTENTION_INSTANCES(k_kind, k_bits, v_kind) \
    template tq_attention_kernel tq_attention_find<k_kind, k_bits, v_kind>(int, int, int, bool)
