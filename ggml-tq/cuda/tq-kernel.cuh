#pragma once

// What the encoding and the decoding kernels share: the codec of a type, the shape of an operation, and the choice of a
// template by type.

#include "tq-cuda.cuh"
#include "tq-block.cuh"

// dst->src[first .. first+2], which tq_cuda_center_supported has seen; {} if not set
tq_key_center tq_cuda_center(const ggml_tensor * dst, int first);

// Rows of blocks, in the order of the float side: n blocks a row, ne rows. A row index, if there is one, replaces i1 on the
// packed side. Strides are in bytes; the coordinates of a block are adjacent.
struct tq_rows {
    int64_t n_blocks;          // all
    int     n;                 // blocks a row
    int     ne1, ne2;
    int64_t packed_nb[3];
    int64_t floats_nb[3];
    const char * index;        // nullptr: i1
    bool    index_is_64;
    int     index_ne[2];       // of its dimensions 1 and 2; i2 and i3 wrap around
    int64_t index_nb[3];
};

// the table of levels to shared memory; all threads of a CUDA block take part
static __device__ __forceinline__ void tq_share_table(const tq_codec & codec, float * table) {
    if (threadIdx.x < 32) {
        table[threadIdx.x] = codec.table[threadIdx.x];
    }
    __syncthreads();
}

struct tq_place {
    int     i1, i2, i3;
    int64_t ib;                // in the row
    int64_t packed, floats;    // offsets in bytes, of the row
};

static __device__ __forceinline__ tq_place tq_find(const tq_rows & r, int64_t i) {
    tq_place p;
    p.ib = i % r.n;
    i /= r.n;
    p.i1 = (int) (i % r.ne1);
    i /= r.ne1;
    p.i2 = (int) (i % r.ne2);
    p.i3 = (int) (i / r.ne2);
    int64_t row = p.i1;
    if (r.index) {
        const char * at = r.index + p.i1*r.index_nb[0] + (p.i2 % r.index_ne[0])*r.index_nb[1] + (p.i3 % r.index_ne[1])*r.index_nb[2];
        row = r.index_is_64 ? *(const int64_t *) at : *(const int32_t *) at;
    }
    p.packed = row*r.packed_nb[0] + p.i2*r.packed_nb[1] + p.i3*r.packed_nb[2];
    p.floats = p.i1*r.floats_nb[0] + p.i2*r.floats_nb[1] + p.i3*r.floats_nb[2];
    return p;
}

// f(kind, bits), both compile-time constants
template <typename F> static void tq_dispatch(ggml_type type, F f) {
    switch (type) {
        case GGML_TYPE_TQ2_MSE: f(std::integral_constant<tq_kind, TQ_KIND_MSE>(), std::integral_constant<int, 2>()); break;
        case GGML_TYPE_TQ3_MSE: f(std::integral_constant<tq_kind, TQ_KIND_MSE>(), std::integral_constant<int, 3>()); break;
        case GGML_TYPE_TQ4_MSE: f(std::integral_constant<tq_kind, TQ_KIND_MSE>(), std::integral_constant<int, 4>()); break;
        case GGML_TYPE_TQ2_QJL: f(std::integral_constant<tq_kind, TQ_KIND_QJL>(), std::integral_constant<int, 2>()); break;
        case GGML_TYPE_TQ3_QJL: f(std::integral_constant<tq_kind, TQ_KIND_QJL>(), std::integral_constant<int, 3>()); break;
        case GGML_TYPE_TQ4_QJL: f(std::integral_constant<tq_kind, TQ_KIND_QJL>(), std::integral_constant<int, 4>()); break;
        case GGML_TYPE_TQ2_TCQ: f(std::integral_constant<tq_kind, TQ_KIND_TCQ>(), std::integral_constant<int, 2>()); break;
        case GGML_TYPE_TQ3_TCQ: f(std::integral_constant<tq_kind, TQ_KIND_TCQ>(), std::integral_constant<int, 3>()); break;
        case GGML_TYPE_TQ4_TCQ: f(std::integral_constant<tq_kind, TQ_KIND_TCQ>(), std::integral_constant<int, 4>()); break;
        default: GGML_ABORT("%s: not a TurboQuant type: %s", __func__, ggml_type_name(type));
    }
}

// decodes; T is half, nv_bfloat16 or float. center, if set: the rows are keys [head_dim, n_kv, n_head_kv, n_stream], and what
// was taken from them is added back.
template <typename T>
void tq_cuda_decode(ggml_type type, const void * src, T * dst, const tq_rows & rows, const tq_key_center & center, cudaStream_t stream);

// encodes; center, if set: rows hold all heads of a token
void tq_cuda_encode(ggml_type type, const float * src, void * dst, const tq_rows & rows, const tq_key_center & center, cudaStream_t stream);
