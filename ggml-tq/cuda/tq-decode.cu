#include "tq-kernel.cuh"
#include "tq-quarter.cuh"

#define TQ_DECODE_WARPS 8    // a CUDA block
#define TQ_DECODE_PITCH 68   // floats of a block of 64 in shared memory: 4 of no use spread banks
#define TQ_DECODE_TURNS 4096 // of a CUDA block, if centered: cells times head_dim, cosines and sines
#define TQ_DECODE_HEADS 1024 // of a CUDA block, if centered: heads times head_dim

// Cells are rows of all streams, i1 and i3 of tq_rows.
struct tq_decode_args {
    const char *  src;
    char *        dst;
    tq_codec      codec;
    tq_rows       rows;
    tq_key_center center;
    int           n_all;         // cells
    int           n_cells;       // of a tile, which a CUDA block decodes; if not centered, one tile is everything
    int           side_bits;     // a warp decodes 2^side_bits blocks of a cell side by side: up to 8
    bool          aligned;       // dst, to 16 bytes
};

// Shared memory for centered keys, in blocks of TQ_DECODE_PITCH: cosines and sines of a cell's coordinates; what they are
// multiplied with, head by head; and 1/scales. X_p(m) at i is m[i]*cosine + other[i]*sine (section 10).
struct tq_shared_center {
    float * cosines, * sines;
    float * m, * other, * scales;
};

static __device__ tq_shared_center tq_share_center(const tq_decode_args & args, float * shared, int first_cell, int n_cells, int n_heads) {
    const tq_key_center & center = args.center;
    const int n       = args.rows.n.z; // blocks of a head
    const int n_pairs = center.n_rot/2;
    tq_shared_center r;
    r.cosines = shared;
    r.sines   = r.cosines + args.n_cells*n*TQ_DECODE_PITCH;
    r.m       = r.sines   + args.n_cells*n*TQ_DECODE_PITCH;
    r.other   = r.m       + n_heads*n*TQ_DECODE_PITCH;
    r.scales  = r.other   + n_heads*n*TQ_DECODE_PITCH;
    const auto place = [](int i) { return i/64*TQ_DECODE_PITCH + i%64; };
    // coordinates of a pair, or one that does not turn
    const int n_turns = center.head_dim - n_pairs;
    for (int t = threadIdx.x; t < n_cells*n_turns; t += 32*TQ_DECODE_WARPS) {
        const int cell = t/n_turns;
        const int i    = t%n_turns;
        const float2 turn = i < n_pairs ? tq_center_turn(center, i, center.pos[first_cell + cell]) : make_float2(1.0f, 0.0f);
        const int a = i >= n_pairs ? i + n_pairs : center.neox ? i : 2*i;
        const int b = i >= n_pairs ? a           : center.neox ? i + n_pairs : 2*i + 1;
        for (int j : { place(a), place(b) }) {
            r.cosines[cell*n*TQ_DECODE_PITCH + j] = turn.x;
            r.sines  [cell*n*TQ_DECODE_PITCH + j] = turn.y;
        }
    }
    for (int t = threadIdx.x; t < n_heads*center.head_dim; t += 32*TQ_DECODE_WARPS) {
        const int i    = t%center.head_dim;
        const int head = blockIdx.y + t/center.head_dim*gridDim.y;
        const float * m = center.centers + (int64_t) head*center.head_dim;
        const bool  second = center.neox ? i >= n_pairs : i & 1;
        const int   across = center.neox ? (second ? i - n_pairs : i + n_pairs) : i ^ 1;
        r.m     [place(t)] = m[i];
        r.other [place(t)] = i >= center.n_rot ? 0.0f : second ? m[across] : -m[across];
        r.scales[place(t)] = tq_center_scale(center, head, i, 2);
    }
    __syncthreads();
    return r;
}

// eight numbers
template <typename T, typename T2>
static __device__ __forceinline__ void tq_store_8(T * y, const float * v, bool aligned) {
    if (aligned) {
        union {
            T2   pairs[4];
            int4 words[sizeof(T)/2];
        } w;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            w.pairs[c] = ggml_cuda_cast<T2>(make_float2(v[2*c], v[2*c + 1]));
        }
#pragma unroll
        for (int i = 0; i < (int) sizeof(T)/2; ++i) {
            ((int4 *) y)[i] = w.words[i];
        }
        return;
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        y[c] = ggml_cuda_cast<T>(v[c]);
    }
}

// CUDA blocks of a multiprocessor: what registers allow
static constexpr __host__ __device__ int tq_decode_resident(tq_kind kind, bool centered) {
    return kind == TQ_KIND_QJL || centered ? 2 : 3;
}

template <tq_kind kind, int bits, typename T, typename T2, bool centered>
static __global__ void __launch_bounds__(32*TQ_DECODE_WARPS, tq_decode_resident(kind, centered)) tq_decode_rows(const __grid_constant__ tq_decode_args args) {
    __shared__ float table[32];
    extern __shared__ float4 shared[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const tq_rows & rows = args.rows;
    tq_share_table(args.codec, table);

    const int n_heads   = (rows.ne2.z - blockIdx.y + gridDim.y - 1)/gridDim.y;
    const int n_blocks  = n_heads*rows.n.z; // of a cell
    const int n_groups  = (n_blocks + (1 << args.side_bits) - 1) >> args.side_bits;
    const int n_at_once = 8 >> args.side_bits; // cells, twice: a lane decodes two blocks
    float factors[16];
    tq_factors_of_quarter(args.codec.rotation, lane, factors);

    const int first_cell = centered ? blockIdx.x*args.n_cells : 0;
    const int n_cells = min(args.n_cells, args.n_all - first_cell);
    tq_shared_center center;
    if (centered) { // inputs of the graph
        center = tq_share_center(args, (float *) shared, first_cell, n_cells, n_heads);
    }
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    // warps take turns: groups of blocks that are side by side, then the next cells
    const int n_items = (n_cells + 2*n_at_once - 1)/(2*n_at_once)*n_groups;
    const int n_warps = centered ? TQ_DECODE_WARPS : gridDim.x*TQ_DECODE_WARPS;
    for (int item = centered ? warp : blockIdx.x*TQ_DECODE_WARPS + warp; item < n_items; item += n_warps) {
        const int   step  = item/n_groups;
        const int   side  = ((item - step*n_groups) << args.side_bits) + (lane/4 & ((1 << args.side_bits) - 1));
        const int   block = min(side, n_blocks - 1);
        const uint2 by_n  = fast_div_modulo(block, rows.n);
        const int   i2    = blockIdx.y + by_n.x*gridDim.y;
        const int   at    = 64*by_n.y + tq_first_of_quarter(lane);

        int  cells[2];
        char * dst[2];
        const uint16_t * packed[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            cells[h] = (2*step + h)*n_at_once + (lane/4 >> args.side_bits);
            const uint2 by_ne1 = fast_div_modulo(first_cell + min(cells[h], n_cells - 1), rows.ne1);
            const int i1 = by_ne1.y;
            const int i3 = by_ne1.x;
            const int32_t * index = tq_index(rows, i1, i2, i3);
            packed[h] = (const uint16_t *) (args.src + (index ? *index : i1)*rows.packed_nb[0] + i2*rows.packed_nb[1] + i3*rows.packed_nb[2] +
                by_n.y*tq_block_bytes<bits>);
            dst[h] = args.dst + i1*rows.floats_nb[0] + i2*rows.floats_nb[1] + i3*rows.floats_nb[2] + at*sizeof(T);
        }
        const uint16_t scales[2] = { packed[0][0], packed[1][0] };
        const tq_words words = tq_load_quarters<kind, bits>(packed[0], packed[1], lane);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float v[16];
            tq_decode_quarter<kind>(args.codec, table, factors, words, h, scales[h], lane, v);
            if (side >= n_blocks || cells[h] >= n_cells) {
                continue;
            }
            if (centered) {
                const int  turn   = (cells[h]*(int) rows.n.z + (int) by_n.y)*TQ_DECODE_PITCH + tq_first_of_quarter(lane);
                const int  mine   = block*TQ_DECODE_PITCH + tq_first_of_quarter(lane);
                const bool turned = args.center.pos[first_cell + cells[h]] > 0;
                const float * start = args.center.centers + ((int64_t) 3*args.center.n_head + i2)*args.center.head_dim + at;
#pragma unroll
                for (int c = 0; c < 16; ++c) {
                    const int i = c < 8 ? c : c + 24;
                    const float x = turned ? center.m[mine + i]*center.cosines[turn + i] + center.other[mine + i]*center.sines[turn + i] : start[i];
                    v[c] = v[c]*center.scales[mine + i] + x;
                }
            }
            tq_store_8<T, T2>((T *) dst[h],      v,     args.aligned);
            tq_store_8<T, T2>((T *) dst[h] + 32, v + 8, args.aligned);
        }
    }
}

template <tq_kind kind, int bits, typename T, bool centered>
static void launch(const tq_decode_args & args, dim3 grid, size_t n_shared, cudaStream_t stream) {
    using T2 = std::conditional_t<std::is_same_v<T, float>, float2, std::conditional_t<std::is_same_v<T, half>, half2, nv_bfloat162>>;
    ggml_cuda_kernel_launch(tq_decode_rows<kind, bits, T, T2, centered>, ggml_cuda_kernel_launch_params(grid, dim3(32*TQ_DECODE_WARPS), n_shared, stream), args);
}

template <typename T>
void tq_cuda_decode(ggml_type type, const void * src, T * dst, const tq_rows & rows, const tq_key_center & center, cudaStream_t stream) {
    if (rows.n_blocks == 0) {
        return;
    }
    const int n    = rows.n.z;
    const int n_sm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    tq_decode_args args = {};
    args.src     = (const char *) src;
    args.dst     = (char *) dst;
    args.codec   = tq_make_codec(ggml_tq_params(), ggml_tq_type_of(type));
    args.rows    = rows;
    args.center  = center;
    args.n_all   = rows.n_blocks/(n*(int) rows.ne2.z);
    args.n_cells = args.n_all;
    args.aligned = ((uintptr_t) dst | rows.floats_nb[0] | rows.floats_nb[1] | rows.floats_nb[2]) % 16 == 0;

    const bool centered = center.pos != nullptr;
    dim3   grid;
    size_t n_shared = 0;
    int    n_heads  = rows.ne2.z;
    if (centered) { // as many cells and heads as shared memory holds, but for all multiprocessors
        n_heads      = std::min(n_heads, std::max(1, TQ_DECODE_HEADS/(64*n)));
        grid.y       = (rows.ne2.z + n_heads - 1)/n_heads;
        args.n_cells = std::max(8, (int) (args.n_all*(int64_t) grid.y/(2*n_sm)));
        args.n_cells = std::min(args.n_cells, std::max(1, TQ_DECODE_TURNS/(64*n)));
        grid.x       = (args.n_all + args.n_cells - 1)/args.n_cells;
        n_shared     = (size_t) (2*args.n_cells + 3*n_heads)*n*TQ_DECODE_PITCH*sizeof(float);
        GGML_ASSERT(grid.y <= 65535 && n_shared <= 48*1024 - sizeof(tq_codec::table));
    }
    args.side_bits = n_heads*n >= 8 ? 3 : n_heads*n >= 4 ? 2 : n_heads*n >= 2 ? 1 : 0;
    if (!centered) {
        const int n_items = (args.n_all + (16 >> args.side_bits) - 1)/(16 >> args.side_bits)*((n_heads*n + (1 << args.side_bits) - 1) >> args.side_bits);
        grid.x = (unsigned) ((n_items + TQ_DECODE_WARPS - 1)/TQ_DECODE_WARPS);
    }
    tq_dispatch(type, [&](auto kind, auto bits) {
        if (!centered) { // all of them at once
            grid.x = std::min<unsigned>(grid.x, tq_decode_resident(kind, false)*n_sm);
        }
        if (centered) {
            if constexpr (std::is_same_v<T, half>) { // of attention
                launch<kind, bits, T, true>(args, grid, n_shared, stream);
            } else {
                GGML_ABORT("centered keys are decoded to f16");
            }
        } else {
            launch<kind, bits, T, false>(args, grid, 0, stream);
        }
    });
}

template void tq_cuda_decode(ggml_type, const void *, half *,        const tq_rows &, const tq_key_center &, cudaStream_t);
template void tq_cuda_decode(ggml_type, const void *, nv_bfloat16 *, const tq_rows &, const tq_key_center &, cudaStream_t);
template void tq_cuda_decode(ggml_type, const void *, float *,       const tq_rows &, const tq_key_center &, cudaStream_t);
