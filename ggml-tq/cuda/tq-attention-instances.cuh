#pragma once

// The instances of the attention kernel for a key type and the kind of value types that goes with it. A source
// file each (template-instances), so that they compile side by side.

#include "tq-attention.cuh"

template <tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits>
static tq_attention_kernel tq_attention_of(int head_dim, int n_rows) {
    switch (head_dim) {
#define TQ_INSTANCE(D, N) tq_attention_instance<D, N, k_kind, k_bits, v_kind, v_bits>()
        case  64: return n_rows <= 4 ? TQ_INSTANCE( 64, 4) : n_rows <= 8 ? TQ_INSTANCE( 64, 8) : TQ_INSTANCE( 64, 16);
        case 128: return n_rows <= 4 ? TQ_INSTANCE(128, 4) : n_rows <= 8 ? TQ_INSTANCE(128, 8) : TQ_INSTANCE(128, 16);
        case 192: return TQ_INSTANCE(192, 8);
        case 256: return TQ_INSTANCE(256, 8);
#undef TQ_INSTANCE
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
