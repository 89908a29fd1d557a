#pragma once

// The instances of the attention kernel for one key type; a source file a key type, so that they compile side by side.

#include "tq-attention.cuh"

template <tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits>
static tq_attention_kernel tq_attention_of(int head_dim, int n_rows) {
#ifdef TQ_FEW
    if (head_dim == 128 && n_rows <= 8) {
        if constexpr (k_kind == v_kind && k_bits == v_bits && k_bits > 2) {
            return tq_attention_instance<128, 1, k_kind, k_bits, v_kind, v_bits>();
        }
    }
    return {};
#else
    switch (head_dim) {
        case  64: return n_rows <= 8 ? tq_attention_instance< 64, 1, k_kind, k_bits, v_kind, v_bits>() : tq_attention_instance< 64, 2, k_kind, k_bits, v_kind, v_bits>();
        case 128: return n_rows <= 8 ? tq_attention_instance<128, 1, k_kind, k_bits, v_kind, v_bits>() : tq_attention_instance<128, 2, k_kind, k_bits, v_kind, v_bits>();
        case 192: return tq_attention_instance<192, 1, k_kind, k_bits, v_kind, v_bits>();
        case 256: return tq_attention_instance<256, 1, k_kind, k_bits, v_kind, v_bits>();
        default:  return {};
    }
#endif
}

template <tq_kind k_kind, int k_bits> tq_attention_kernel tq_attention_find(ggml_type v_type, int head_dim, int n_rows) {
    switch (v_type) {
        case GGML_TYPE_TQ2_MSE: return tq_attention_of<k_kind, k_bits, TQ_KIND_MSE, 2>(head_dim, n_rows);
        case GGML_TYPE_TQ3_MSE: return tq_attention_of<k_kind, k_bits, TQ_KIND_MSE, 3>(head_dim, n_rows);
        case GGML_TYPE_TQ4_MSE: return tq_attention_of<k_kind, k_bits, TQ_KIND_MSE, 4>(head_dim, n_rows);
        case GGML_TYPE_TQ2_TCQ: return tq_attention_of<k_kind, k_bits, TQ_KIND_TCQ, 2>(head_dim, n_rows);
        case GGML_TYPE_TQ3_TCQ: return tq_attention_of<k_kind, k_bits, TQ_KIND_TCQ, 3>(head_dim, n_rows);
        case GGML_TYPE_TQ4_TCQ: return tq_attention_of<k_kind, k_bits, TQ_KIND_TCQ, 4>(head_dim, n_rows);
        default: return {}; // nobody has values of the _qjl types
    }
}

#define TQ_ATTENTION_INSTANCES(kind, bits) template tq_attention_kernel tq_attention_find<kind, bits>(ggml_type, int, int)
