#pragma once

// What the encoding and the decoding kernels share: the codec of a type, the shape of an operation, and the choice of a
// template by type.

#include "tq-cuda.cuh"
#include "tq-block.cuh"
#include "tq-rope.cuh"

// dst->src[first .. first+2], which tq_cuda_center_supported has seen; {} if not set
tq_key_center tq_cuda_center(const ggml_tensor * dst, int first);

// Rows of blocks, in the order of the float side: n blocks a row, ne rows, divisors of fastdiv. A row index, if there is one,
// replaces i1 on the packed side. Strides are in bytes; the coordinates of a block are adjacent.
struct tq_rows {
    int     n_blocks;          // all
    uint3   n;                 // blocks a row
    uint3   ne1, ne2;
    int64_t packed_nb[3];
    int64_t floats_nb[3];
    const char * index;        // of 32 bits, or of 64 whose low half is read; nullptr: i1
    uint3   index_ne[2];       // of its dimensions 1 and 2; i2 and i3 wrap around
    int64_t index_nb[3];
};

// the table of levels to shared memory; all threads of a CUDA block take part
static __device__ __forceinline__ void tq_share_table(const tq_codec & codec, float * table) {
    if (threadIdx.x < 32) {
        table[threadIdx.x] = codec.table[threadIdx.x];
    }
    __syncthreads();
}

// where the row of the packed side is said; nullptr: i1
static __device__ __forceinline__ const int32_t * tq_index(const tq_rows & r, int i1, int i2, int i3) {
    if (!r.index) {
        return nullptr;
    }
    return (const int32_t *) (r.index + i1*r.index_nb[0] + fastmodulo(i2, r.index_ne[0])*r.index_nb[1] + fastmodulo(i3, r.index_ne[1])*r.index_nb[2]);
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

// Rows to encode. Set for keys, whose rows hold all heads of a token: rope, what is done first to rows that are as before it
// (heads may be apart), and center.
struct tq_encode_job {
    const char *  src;
    char *        dst;
    ggml_type     type;
    tq_rows       rows;
    tq_key_center center;
    tq_rope       rope;
};

// RoPE of floats [head_dim, n_head, n_tokens]; dst may be src
struct tq_rope_job {
    const char * src;
    char *       dst;
    int          n_pairs;          // all
    uint3        pair_div;         // pairs of a head, and
    uint3        head_div;         // heads, as divisors (fastdiv)
    int64_t      src_nb, dst_nb[2]; // bytes from token to token; from head to head, from token to token
    tq_rope      rope;
};

// the rows that a SET_ROWS encodes
tq_encode_job tq_cuda_set_rows_job(const ggml_tensor * dst);

// one or two tensors, in one launch, and RoPE of queries, if any
void tq_cuda_encode(const tq_encode_job * jobs, int n_jobs, const tq_rope_job * queries, cudaStream_t stream);

// whether two tensors can go into one launch
bool tq_cuda_encode_together(ggml_type a, ggml_type b);
