#include "tq-kernel.cuh"

#define TQ_ENCODE_WARPS 4 // a CUDA block

static __device__ __forceinline__ float2 tq_load(const char * src, const tq_place & at, const tq_key_center & center, int lane) {
    const float * x = (const float *) (src + at.floats) + at.ib*64 + lane;
    float2 v = make_float2(x[0], x[32]);
    if (center.pos) {
        const int p    = center.pos[at.i1];
        const int head = (int) at.ib*64/center.head_dim;
        const int i    = (int) at.ib*64 - head*center.head_dim + lane;
        v.x = __fmul_rn(v.x - tq_center_at(center, head, i,      p), tq_center_scale(center, head, i,      1));
        v.y = __fmul_rn(v.y - tq_center_at(center, head, i + 32, p), tq_center_scale(center, head, i + 32, 1));
    }
    return v;
}

// _mse and _qjl: a warp a block
template <tq_kind kind, int bits>
static __global__ void __launch_bounds__(32*TQ_ENCODE_WARPS) tq_encode_rows(
        const char * __restrict__ src, char * __restrict__ dst, const tq_codec codec, const tq_rows rows, const tq_key_center center) {
    ggml_cuda_pdl_lc(); // attention may make its tables already
    __shared__ float table[32];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    tq_share_table(codec, table);

    const int64_t i = (int64_t) blockIdx.x*TQ_ENCODE_WARPS + warp;
    if (i >= rows.n_blocks) {
        return;
    }
    const tq_place at = tq_find(rows, i);
    const tq_unit  n  = tq_normalize(codec, tq_load(src, at, center, lane), lane);
    const tq_codes codes = tq_quantize<kind, bits>(codec, table, n.u, lane);
    tq_store_block<kind, bits>(n, codes, (uint16_t *) (dst + at.packed + at.ib*tq_block_bytes<bits>), lane);
}

// _tcq: a warp for each multiple of a block, the best one writes it
template <int bits>
static __global__ void __launch_bounds__(32*TQ_N_MULTIPLES) tq_encode_rows_tcq(
        const char * __restrict__ src, char * __restrict__ dst, const tq_codec codec, const tq_rows rows, const tq_key_center center) {
    ggml_cuda_pdl_lc();
    __shared__ float table[32];
    __shared__ float quality[TQ_N_MULTIPLES];
    __shared__ tq_search<bits> search[TQ_N_MULTIPLES];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    tq_share_table(codec, table);

    const tq_place at = tq_find(rows, blockIdx.x);
    const tq_unit  n  = tq_normalize(codec, tq_load(src, at, center, lane), lane);
    tq_codes codes = {};
    if (!n.empty) { // the same in all warps
        codes = tq_path<bits>(codec, table, n.u, tq_multiple(warp), search[warp], quality[warp], lane);
    }
    __syncthreads();
    if (warp == (n.empty ? 0 : tq_best(quality))) {
        tq_store_block<TQ_KIND_TCQ, bits>(n, codes, (uint16_t *) (dst + at.packed + at.ib*tq_block_bytes<bits>), lane);
    }
}

void tq_cuda_encode(ggml_type type, const float * src, void * dst, const tq_rows & rows, const tq_key_center & center, cudaStream_t stream) {
    if (rows.n_blocks == 0) {
        return;
    }
    const tq_codec codec = tq_make_codec(ggml_tq_params(), ggml_tq_type_of(type));
    tq_dispatch(type, [&](auto kind, auto bits) {
        if constexpr (kind == TQ_KIND_TCQ) {
            GGML_ASSERT(rows.n_blocks <= INT_MAX);
            tq_encode_rows_tcq<bits><<<(int) rows.n_blocks, 32*TQ_N_MULTIPLES, 0, stream>>>(
                (const char *) src, (char *) dst, codec, rows, center);
        } else {
            const int64_t grid = (rows.n_blocks + TQ_ENCODE_WARPS - 1)/TQ_ENCODE_WARPS;
            GGML_ASSERT(grid <= INT_MAX);
            tq_encode_rows<kind, bits><<<(int) grid, 32*TQ_ENCODE_WARPS, 0, stream>>>(
                (const char *) src, (char *) dst, codec, rows, center);
        }
    });
    CUDA_CHECK(cudaGetLastError());
}
