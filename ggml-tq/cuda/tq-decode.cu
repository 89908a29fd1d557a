#include "tq-kernel.cuh"

#define TQ_DECODE_WARPS    8    // a CUDA block
#define TQ_DECODE_MAX_GRID 8192 // then warps take more than one block each

template <tq_kind kind, int bits, typename T>
static __global__ void __launch_bounds__(32*TQ_DECODE_WARPS) tq_decode_rows(
        const char * __restrict__ src, char * __restrict__ dst, const tq_codec codec, const tq_rows rows, const tq_key_center center) {
    __shared__ float table[32];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    tq_share_table(codec, table);

    for (int64_t n = (int64_t) blockIdx.x*TQ_DECODE_WARPS + warp; n < rows.n_blocks; n += (int64_t) gridDim.x*TQ_DECODE_WARPS) {
        const tq_place at = tq_find(rows, (int) n);
        float2 v = tq_decode_block<kind, bits>(codec, table, (const uint16_t *) (src + tq_packed(rows, at, tq_row(at)) + at.ib*tq_block_bytes<bits>), lane);
        if (center.pos) {
            const int p = center.pos[(int64_t) at.i3*rows.ne1.z + at.i1];
            const int i = at.ib*64 + lane;
            v.x = v.x*tq_center_scale(center, at.i2, i,      2) + tq_center_at(center, at.i2, i,      p);
            v.y = v.y*tq_center_scale(center, at.i2, i + 32, 2) + tq_center_at(center, at.i2, i + 32, p);
        }
        T * y = (T *) (dst + at.floats) + at.ib*64 + lane;
        y[ 0] = ggml_cuda_cast<T>(v.x);
        y[32] = ggml_cuda_cast<T>(v.y);
    }
}

template <typename T>
void tq_cuda_decode(ggml_type type, const void * src, T * dst, const tq_rows & rows, const tq_key_center & center, cudaStream_t stream) {
    if (rows.n_blocks == 0) {
        return;
    }
    const int     n_warps = TQ_DECODE_WARPS;
    const int grid    = std::min((rows.n_blocks + n_warps - 1)/n_warps, TQ_DECODE_MAX_GRID);
    tq_dispatch(type, [&](auto kind, auto bits) {
        tq_decode_rows<kind, bits, T><<<grid, 32*n_warps, 0, stream>>>(
            (const char *) src, (char *) dst, tq_make_codec(ggml_tq_params(), ggml_tq_type_of(type)), rows, center);
    });
    CUDA_CHECK(cudaGetLastError());
}

template void tq_cuda_decode(ggml_type, const void *, half *,        const tq_rows &, const tq_key_center &, cudaStream_t);
template void tq_cuda_decode(ggml_type, const void *, nv_bfloat16 *, const tq_rows &, const tq_key_center &, cudaStream_t);
template void tq_cuda_decode(ggml_type, const void *, float *,       const tq_rows &, const tq_key_center &, cudaStream_t);
