#pragma once

// Attention of few queries over packed keys and values (docs/decisions/0008-cuda-attention.md).
//
// A CUDA block has one key head of one stream or two, up to N rows (queries times heads of the group) of each and a part of the cells. Its
// warps take tiles of 16 cells in turn, each with a pipeline of its own from global to shared memory. Scores and outputs are
// computed transposed, cells or coordinates along the 16 rows of a tensor-core operand and attention rows along its 8 columns,
// in the rotated basis. Up to four rows fill half of the columns: then a warp has two tiles at a time or, where there are many
// cells, two adjacent key heads. They take turns at the tensor cores, but share the columns, so that everything that is done to
// scores is done to both at once. Rows of two heads are longer, which wastes less of the 32 bytes that memory is read in. The
// block that is done last with a row combines the parts, in their order, and turns the output back.

#include "tq-fragment.cuh"
#include "tq-kernel.cuh"

#define TQ_TILE 16 // cells

struct tq_attention_args {
    const char * k;
    const char * v;
    int64_t k_nb[3];
    int64_t v_nb[3];
    const float * q;         // [D, n_q, n_head, n_stream]
    int64_t q_nb[3];
    const half * mask;       // [n_kv, n_q, 1, n_stream or 1] or nullptr
    int64_t mask_nb1;
    int64_t mask_nb3;
    int   mask_ne3;
    float scale, max_bias, cap;
    int   n_kv, n_q, n_head, n_head_kv, n_stream;
    uint3 group_div;         // heads of a key head, and
    uint3 head_kv_div;       // key heads over those of a block, as divisors (fastdiv)
    int   n_splits;
    int   n_warps, n_iter;   // warps of a block that have cells; turns of a warp,
    int   n_turn;            // so many of them adjacent: a power of two, at least 4 (a span) for centered keys
    int   n_stride;          // positions from one span to the next, mostly
    float  * part_o;         // [D, n_splits, n_head, n_q, n_stream]
    float2 * part_ml;        // [n_splits, n_head, n_q, n_stream]: greatest score (base 2), sum of weights
    int    * n_done;         // [blocks of the grid with one split]: zeros, and zeros again after the kernel
    const float * sinks;     // [n_head] or nullptr
    float  * dst;            // [D, n_head, n_q, n_stream]
    tq_codec k_codec;
    tq_codec v_codec;
    tq_key_center center;
};

// row of a key head's rows: heads of the group for one query after another
struct tq_row_place {
    int query, head; // head: of all
};

static __device__ __forceinline__ tq_row_place tq_place_of(const tq_attention_args & args, int head_kv, int row) {
    const uint2 p = fast_div_modulo(row, args.group_div);
    return { (int) p.x, (int) (head_kv*args.group_div.z + p.y) };
}

static __device__ __forceinline__ const float * tq_query(const tq_attention_args & args, int head_kv, int row, int stream) {
    const tq_row_place p = tq_place_of(args, head_kv, row);
    return (const float *) ((const char *) args.q + p.query*args.q_nb[0] + p.head*args.q_nb[1] + stream*args.q_nb[2]);
}

// bytes, where rows of D coordinates follow each other
static constexpr int tq_row_align(int D) { return D % 256 == 0 ? 8 : D % 128 == 0 ? 4 : 2; }

// a row of D coordinates; it is copied in pieces of 16 bytes that hold it, whatever its alignment; an odd number of them spreads
// banks
template <int D, int bits> struct tq_row_layout {
    static constexpr int align    = tq_row_align(D);
    static constexpr int block    = 2 + 8*bits;
    static constexpr int bytes    = D/64*block;
    static constexpr int n_pieces = (bytes + 16 - align + 15)/16;
    static constexpr int pitch    = 16*(n_pieces | 1);
};

template <int D, int N, int n_heads_, tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits> struct tq_attention_config {
    static constexpr int n_blocks = D/64;
    static constexpr int R8       = (N + 7)/8;
    static constexpr int n_cols   = 8*R8;
    static constexpr int n_heads  = n_heads_;       // key heads of a CUDA block,
    static constexpr int n_sides  = n_cols/N;       // one for each side of the columns, column c is row c % N of side c / N;
    static constexpr int n_tiles  = n_sides/n_heads; // or a tile for each
    static constexpr int n_rows   = N*n_heads;
    using k_row = tq_row_layout<n_heads*D, k_bits>;
    using v_row = tq_row_layout<n_heads*D, v_bits>;
    static constexpr int k_side   = n_heads > 1 ? k_row::bytes/n_heads : TQ_TILE*k_row::pitch; // in a stage, bytes from side to side
    static constexpr int v_side   = n_heads > 1 ? v_row::bytes/n_heads : TQ_TILE*v_row::pitch;
    static constexpr int n_warps  = D*R8 <= 128 ? 16 : 8;
    static constexpr bool q_in_registers = D*R8 <= 128;

    static constexpr int k_entries    = tq_pairs<k_kind, k_bits>::n_entries;
    static constexpr int v_entries    = tq_pairs<v_kind, v_bits>::n_entries;
    static constexpr int n_stages     = 2/n_sides;
    static constexpr int k_bytes      = n_tiles*TQ_TILE*k_row::pitch; // of a warp's stage
    static constexpr int stage_bytes  = n_tiles*TQ_TILE*(k_row::pitch + v_row::pitch);
    static constexpr int table_bytes  = 256*(k_entries > v_entries ? k_entries : v_entries);
    static constexpr int q_bytes      = n_cols*D*2*(k_kind == TQ_KIND_QJL ? 2 : 1);
    static constexpr int weight_pitch = D/2 + 1; // pairs of a row
    static constexpr int weight_bytes = n_rows*(2*weight_pitch + 2)*4;
    static constexpr int step_pitch   = 36; // of turned weights, in pairs of words: 32 lanes', and 4 that spread banks
    static constexpr int turned_bytes = R8*(D/16)*step_pitch*8;
    static constexpr int at_bytes     = n_tiles*D*4;
    static constexpr int center_bytes = weight_bytes + 64*D*2 + n_warps*(turned_bytes + n_cols*4 + at_bytes) + D*4;
    static constexpr int loop_bytes   = table_bytes + q_bytes + n_stages*n_warps*stage_bytes;
    static constexpr int n_merge      = R8*n_blocks*4*32; // accumulators of a warp, in fours
    static constexpr int n_sums       = n_merge < 32*n_warps ? 32*n_warps/n_merge : 1;
    static constexpr int merge_bytes  = n_warps*n_cols*(D + 1)*4 + n_sums*n_cols*(D + 4)*4;
    static constexpr int shared_bytes = loop_bytes > merge_bytes ? loop_bytes : merge_bytes;
};

//
// instructions
//

static __device__ __forceinline__ void tq_mma(float * d, const uint32_t * a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// an 8x8 matrix of 16-bit numbers; lane 4*g + j has numbers 2*j and 2*j + 1 of row g
static __device__ __forceinline__ uint32_t tq_transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// 16 bytes if needed; zeros if n is 0 and not 16
static __device__ __forceinline__ void tq_copy_16(uint32_t dst, const char * src, int n, bool needed) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p cp.async.cg.shared.global [%0], [%1], 16, %2;\n}"
        :: "r"(dst), "l"(src), "r"(n), "r"((int) needed) : "memory");
}

static __device__ __forceinline__ void tq_copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int n> static __device__ __forceinline__ void tq_copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
}

// n bytes to the device's cache, rounded to 16
static __device__ __forceinline__ void tq_prefetch(const char * src, uint32_t n) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"((uintptr_t) src & ~(uintptr_t) 15), "r"((n + 15) & ~15) : "memory");
#else
    GGML_UNUSED_VARS(src, n);
#endif // __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
}

static __device__ __forceinline__ uint32_t tq_pack(float x, float y) {
    const half2 h = __floats2half2_rn(x, y);
    return *(const uint32_t *) &h;
}

static __device__ __forceinline__ float tq_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// one more; writes of the block before it (after a barrier) are seen by whom the count tells of them
static __device__ __forceinline__ int tq_count(int * n) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(n) : "memory");
    return before;
}

// an int in the order of floats, and back
static __device__ __forceinline__ int   tq_ordered  (float x) { const int i = __float_as_int(x); return i ^ ((i >> 31) & INT_MAX); }
static __device__ __forceinline__ float tq_unordered(int   i) { return __int_as_float(i ^ ((i >> 31) & INT_MAX)); }

// over the lanes of all g
static __device__ __forceinline__ float tq_max_of_cells(float x) {
    x = fmaxf(x, __shfl_xor_sync(TQ_WARP, x,  4));
    x = fmaxf(x, __shfl_xor_sync(TQ_WARP, x,  8));
    x = fmaxf(x, __shfl_xor_sync(TQ_WARP, x, 16));
    return x;
}

static __device__ __forceinline__ float tq_sum_of_cells(float x) {
    x += __shfl_xor_sync(TQ_WARP, x,  4);
    x += __shfl_xor_sync(TQ_WARP, x,  8);
    x += __shfl_xor_sync(TQ_WARP, x, 16);
    return x;
}

//
// shared memory
//

// How a lane copies its part of the rows of a tile. Lanes of one row are neighbors in a group of 4, 8 or 16: a quarter of a warp
// that has pieces of several rows needs several accesses. Bytes around a row in its first and last 16 are read, never more.
template <typename row> struct tq_copier {
    static constexpr int n_lanes = row::n_pieces <= 4 ? 4 : row::n_pieces <= 8 ? 8 : 16;
    static_assert(row::n_pieces <= 16, "a row has too many pieces");
    static constexpr int n_rows  = 32/n_lanes;
    static constexpr int n       = TQ_TILE/n_rows;
    static constexpr bool even   = n_rows*row::align % 16 == 0; // n_rows on, addresses have the same alignment
    const char * base;          // of the head's rows, rounded down
    uint32_t from[even ? 1 : n]; // offset of a piece in the first tile, UINT32_MAX where none is needed
    uint32_t nb1;

    __device__ tq_copier(const char * rows, uint32_t nb1, int lane) : base((const char *) ((uintptr_t) rows & ~(uintptr_t) 15)), nb1(nb1) {
        const int piece = lane % n_lanes;
#pragma unroll
        for (int i = 0; i < (even ? 1 : n); ++i) {
            const uint32_t start = (uint32_t) (rows - base) + (i*n_rows + lane/n_lanes)*nb1;
            from[i] = piece < row::n_pieces && 16*piece < row::bytes + (int) (start % 16) ? start/16*16 + 16*piece : UINT32_MAX;
        }
    }

    // the tile at an offset, to shared memory; of its cells n_cells are there
    __device__ void copy(uint32_t dst, uint32_t offset, int n_cells, int lane) const {
        dst += lane/n_lanes*row::pitch + lane%n_lanes*16;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const uint32_t start = from[even ? 0 : i];
            const uint32_t at    = offset + start + (even ? i*n_rows*nb1 : 0);
            tq_copy_16(dst + i*n_rows*row::pitch, base + at, i*n_rows + lane/n_lanes < n_cells ? 16 : 0, start != UINT32_MAX);
        }
    }
};

// the halfwords at 2*j of a block's planes, of two cells; before: 2*((j + 3) & 3)
template <tq_kind kind, int bits>
static __device__ __forceinline__ tq_words tq_read_block(const char * x, const char * y, int at, int before) {
    uint32_t px[bits], py[bits];
#pragma unroll
    for (int p = 0; p < bits; ++p) {
        px[p] = *(const uint16_t *) (x + at + 2 + 8*p);
        py[p] = *(const uint16_t *) (y + at + 2 + 8*p);
    }
    uint32_t cx = 0;
    uint32_t cy = 0;
    if constexpr (kind == TQ_KIND_TCQ) {
        cx = tq_both_low(*(const uint16_t *) (x + before + 2 + 8*(bits - 1)), px[bits - 1]);
        cy = tq_both_low(*(const uint16_t *) (y + before + 2 + 8*(bits - 1)), py[bits - 1]);
    }
    return tq_unpack<kind, bits>(px, py, cx, cy);
}

static __device__ __forceinline__ float tq_read_scale(const char * block) {
    return __half2float(*(const half *) block);
}

//
// scores
//

// one step of 16 coordinates: pairs of code word s
template <tq_kind kind>
static __device__ __forceinline__ void tq_key_operand(const char * table, uint32_t lane_offset, const tq_words & w, const tq_pair_signs & signs, int s, uint32_t * a) {
    a[0] = *(const uint32_t *) (table + tq_pair_offset(w.codes[s], 0, lane_offset));
    a[2] = *(const uint32_t *) (table + tq_pair_offset(w.codes[s], 1, lane_offset));
    a[1] = *(const uint32_t *) (table + tq_pair_offset(w.codes[s], 2, lane_offset));
    a[3] = *(const uint32_t *) (table + tq_pair_offset(w.codes[s], 3, lane_offset));
    if constexpr (kind == TQ_KIND_TCQ) {
        a[0] ^= tq_sign_of_key(signs, s, 0);
        a[2] ^= tq_sign_of_key(signs, s, 1);
        a[1] ^= tq_sign_of_key(signs, s, 2);
        a[3] ^= tq_sign_of_key(signs, s, 3);
    }
}

static __device__ __forceinline__ void tq_sketch_operand(const tq_pair_signs & signs, int s, uint32_t * a) {
    a[0] = tq_sign_of_key(signs, s, 0) | 0x3c003c00; // +-1
    a[2] = tq_sign_of_key(signs, s, 1) | 0x3c003c00;
    a[1] = tq_sign_of_key(signs, s, 2) | 0x3c003c00;
    a[3] = tq_sign_of_key(signs, s, 3) | 0x3c003c00;
}

// coordinates 2*m and 2*m + 1 of the four that a lane's pairs are of; h is the half step (tq_attention_parts)
template <tq_kind kind>
static __device__ __forceinline__ void tq_value_operand(const char * table, uint32_t lane_offset, const tq_value_pairs & p,
        uint32_t signs_ab, uint32_t signs_cd, int h, int m, uint32_t * a) {
    a[0] = *(const uint32_t *) (table + 128 + tq_pair_offset(p.even, m,     lane_offset));
    a[1] = *(const uint32_t *) (table + 128 + tq_pair_offset(p.odd,  m,     lane_offset));
    a[2] = *(const uint32_t *) (table + 128 + tq_pair_offset(p.even, m + 2, lane_offset));
    a[3] = *(const uint32_t *) (table + 128 + tq_pair_offset(p.odd,  m + 2, lane_offset));
    if constexpr (kind == TQ_KIND_TCQ) {
        const int even = 15 - 8*m - 2*h;
        const int odd  = even - 4;
        a[0] ^= (signs_ab << even) & 0x80008000;
        a[1] ^= (signs_ab << odd ) & 0x80008000;
        a[2] ^= (signs_cd << even) & 0x80008000;
        a[3] ^= (signs_cd << odd ) & 0x80008000;
    }
}

//
// centered keys (docs/format.md section 10)
//
// What a row's score gains at position p is the sum of wc*cos(p*w) + ws*sin(p*w) over pairs, with weights of the row. Cells
// mostly hold positions in order. For a span of 64 cells the weights are turned to the position of the first (exactly, in
// f32), and tensor cores multiply them, in f16, with the cosines less 1 and sines of 0 ... 63; what the 1 stands for is added
// in f32, so slow pairs, whose centers are the largest, lose nothing. Tiles with other positions are computed as they are.

template <typename cfg> struct tq_center_shared {
    char * base;

    static constexpr int D      = cfg::n_blocks*64;
    static constexpr int R8     = cfg::R8;
    static constexpr int n_rows = cfg::n_rows; // of all heads; column c is row c % n_rows
    static constexpr int N      = n_rows/cfg::n_heads;

    // [position/16][step][lane]: operand of cosines and sines
    __device__ uint4 * steps() const { return (uint4 *) base; }
    // of this warp: [row/8][step][lane]: operand of turned weights; [row]: the sums of turned weights of cosines
    __device__ uint2 * turned() const { return (uint2 *) (base + 64*D*2 + threadIdx.x/32*cfg::turned_bytes); }
    __device__ float * sums() const { return (float *) (base + 64*D*2 + cfg::n_warps*cfg::turned_bytes) + threadIdx.x/32*cfg::n_cols; }
    // of this lane: cosines and sines at the start of its warp's spans, [tile][i] of pairs lane + 32*i
    __device__ float2 * at() const {
        return (float2 *) (base + 64*D*2 + cfg::n_warps*(cfg::turned_bytes + cfg::n_cols*4) + threadIdx.x/32*cfg::at_bytes) + threadIdx.x%32;
    }
    // [pair]: cosine and sine of as many positions as it is to a warp's next span
    __device__ float2 * span() const { return (float2 *) (base + 64*D*2 + cfg::n_warps*(cfg::turned_bytes + cfg::n_cols*4 + cfg::at_bytes)); }

    // [row][pair] of (wc, ws), then [row] of what does not turn and [row] of what is the score's part at position 0
    __device__ float * weights() const { return (float *) (base + cfg::center_bytes - cfg::weight_bytes); }
    __device__ float2 & weight(int row, int pair) const { return ((float2 *) weights())[row*cfg::weight_pitch + pair]; }
    __device__ float  & rest  (int row)           const { return weights()[n_rows*2*cfg::weight_pitch + row]; }
    __device__ float  & first (int row)           const { return weights()[n_rows*(2*cfg::weight_pitch + 1) + row]; }

    static constexpr int n_steps = D/16; // those past n_rot are zero

    // scaled queries, [row][coordinate], until weights are made of them
    __device__ float & raw(int row, int i) const { return ((float *) (base + 64*D*2))[row*D + i]; }

    static constexpr int n_threads   = 32*cfg::n_warps;
    static constexpr int n_of_thread = (n_rows*D/2 + n_threads - 1)/n_threads;

    // centers: of the pairs whose weights this thread makes; of coordinates lane + 32*k of the key head of its warp's first
    // row, those that do not turn, and all at position 0
    struct operands {
        float m[n_of_thread][2];
        float rest[D/32], first[D/32];
    };

    // the first row whose rest this warp sums up; others, of the same key head, are n_warps on
    static __device__ int warp_row() { return cfg::n_warps - 1 - threadIdx.x/32; }

    // the operand of cosines and sines, and what is read for weights; none of it depends on earlier kernels
    __device__ operands start(const tq_attention_args & args, int head0) const {
        const tq_key_center & c = args.center;
        const int n_pairs = c.n_rot/2;
        operands x;
#pragma unroll
        for (int i = 0; i < n_of_thread; ++i) {
            const int row  = (i*n_threads + threadIdx.x) / (D/2);
            const int pair = (i*n_threads + threadIdx.x) % (D/2);
            const float * m = c.centers + (int64_t) (head0 + row/N % cfg::n_heads)*c.head_dim;
            x.m[i][0] = pair < n_pairs ? m[c.neox ? pair           : 2*pair    ] : 0.0f;
            x.m[i][1] = pair < n_pairs ? m[c.neox ? pair + n_pairs : 2*pair + 1] : 0.0f;
        }
        const float * m  = c.centers + (int64_t) (head0 + warp_row()/N % cfg::n_heads)*c.head_dim;
        const float * m0 = m + (int64_t) 3*c.n_head*c.head_dim;
#pragma unroll
        for (int k = 0; k < D/32; ++k) {
            const int i = threadIdx.x % 32 + 32*k;
            x.rest [k] = i < c.n_rot ? 0.0f : m[i];
            x.first[k] = m0[i];
        }
        if (threadIdx.x < D/2) {
            const int i = threadIdx.x;
            span()[i] = i < n_pairs ? tq_center_turn(c, i, args.n_stride) : make_float2(0.0f, 0.0f);
        }
#pragma unroll
        for (int i0 = 0; i0 < 4*n_steps*32; i0 += n_threads) {
            const int i    = i0 + threadIdx.x;
            const int g    = i % 32 / 4;
            const int j    = i % 4;
            const int step = i / 32 % n_steps;
            const int tile = i / 32 / n_steps;
            uint32_t a[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int pair = 8*step + j + 4*(k/2);
                const float * row = c.table + (16*tile + g + 8*(k % 2))*c.n_rot + pair;
                a[k] = pair < n_pairs ? tq_pack(row[0] - 1.0f, row[n_pairs]) : 0;
            }
            steps()[i] = make_uint4(a[0], a[1], a[2], a[3]);
        }
        return x;
    }

    __device__ void weigh(const tq_attention_args & args, const operands & x) const {
        const tq_key_center & c = args.center;
        const int n_pairs = c.n_rot/2;
        const int lane    = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < n_of_thread; ++i) {
            const int row  = (i*n_threads + threadIdx.x) / (D/2);
            const int pair = (i*n_threads + threadIdx.x) % (D/2);
            if (row < n_rows) {
                const float qa = pair < n_pairs ? raw(row, c.neox ? pair           : 2*pair    ) : 0.0f;
                const float qb = pair < n_pairs ? raw(row, c.neox ? pair + n_pairs : 2*pair + 1) : 0.0f;
                weight(row, pair) = make_float2(qa*x.m[i][0] + qb*x.m[i][1], qb*x.m[i][0] - qa*x.m[i][1]);
            }
        }
        for (int row = warp_row(); row < n_rows; row += cfg::n_warps) {
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int k = 0; k < D/32; ++k) {
                sum.x += raw(row, lane + 32*k)*x.rest [k];
                sum.y += raw(row, lane + 32*k)*x.first[k];
            }
#pragma unroll
            for (int h = 16; h > 0; h /= 2) {
                sum.x += __shfl_xor_sync(TQ_WARP, sum.x, h);
                sum.y += __shfl_xor_sync(TQ_WARP, sum.y, h);
            }
            if (lane == 0) {
                rest (row) = sum.x;
                first(row) = sum.y;
            }
        }
        __syncthreads();
        for (int i = lane; i < (N > 4 ? cfg::turned_bytes/8 : 0); i += 32) { // rows that are not used stay 0
            turned()[i] = make_uint2(0, 0);
        }
        __syncwarp();
    }

    // what turns weights to the spans whose first cells are at positions p (of the lane's own side); last: those of the spans
    // before, INT_MIN if there are none
    __device__ void seek(const tq_attention_args & args, int p, int last) const {
        const tq_key_center & c = args.center;
#pragma unroll
        for (int t = 0; t < cfg::n_tiles; ++t) {
            const int  p_t  = __shfl_sync(TQ_WARP, p, 2*t);
            const bool next = p_t == __shfl_sync(TQ_WARP, last, 2*t) + args.n_stride;
#pragma unroll
            for (int i = 0; i < D/64; ++i) {
                const int pair = threadIdx.x % 32 + 32*i;
                float2 & at = this->at()[t*(D/2) + 32*i];
                if (next) { // some spans on, the error is far below that of f16
                    const float2 a = at;
                    const float2 b = span()[pair];
                    at = make_float2(a.x*b.x - a.y*b.y, a.x*b.y + a.y*b.x);
                } else {
                    at = pair < c.n_rot/2 ? tq_center_turn(c, pair, p_t) : make_float2(0.0f, 0.0f);
                }
            }
        }
    }

    __device__ void turn(int n_rows_used) const {
        const int lane = threadIdx.x % 32;
        float2 at[cfg::n_tiles][D/64];
#pragma unroll
        for (int t = 0; t < cfg::n_tiles; ++t) {
#pragma unroll
            for (int i = 0; i < D/64; ++i) {
                at[t][i] = this->at()[t*(D/2) + 32*i];
            }
        }
        uint32_t * turned_at = (uint32_t *) (turned() + lane/8*cfg::step_pitch + lane % 4) + lane/4 % 2;
#pragma unroll
        for (int r = 0; r < cfg::R8; ++r) {
            float sum[8];
#pragma unroll
            for (int i0 = 0; i0 < 8; i0 += 4) { // four rows, or none of them
                sum[i0] = sum[i0 + 1] = sum[i0 + 2] = sum[i0 + 3] = 0.0f;
                if ((8*r + i0) % N < n_rows_used) {
#pragma unroll
                    for (int i = i0; i < i0 + 4; ++i) {
                        const int tile = (8*r + i) / n_rows;
#pragma unroll
                        for (int k = 0; k < D/64; ++k) {
                            const float2 w  = weight((8*r + i) % n_rows, lane + 32*k);
                            const float  wc = w.x*at[tile][k].x + w.y*at[tile][k].y;
                            const float  ws = w.y*at[tile][k].x - w.x*at[tile][k].y;
                            sum[i] += wc;
                            turned_at[2*((r*n_steps + 4*k)*cfg::step_pitch + 4*i)] = tq_pack(wc, ws);
                        }
                    }
                }
            }
            // over the lanes; lane l is left with row l/4 of the eight
#pragma unroll
            for (int h = 4; h > 0; h /= 2) {
                const bool upper = lane & 4*h;
#pragma unroll
                for (int i = 0; i < h; ++i) {
                    const float x = __shfl_xor_sync(TQ_WARP, upper ? sum[i] : sum[i + h], 4*h);
                    sum[i] = (upper ? sum[i + h] : sum[i]) + x;
                }
            }
            sum[0] += __shfl_xor_sync(TQ_WARP, sum[0], 2);
            sum[0] += __shfl_xor_sync(TQ_WARP, sum[0], 1);
            if (lane % 4 == 0) {
                sums()[8*r + lane/4] = sum[0] + rest((8*r + lane/4) % n_rows);
            }
        }
    }

    // the centers' part of the scores of a tile, if its positions are in order
    __device__ void score(int tile, float (*s)[4]) const {
        const int lane = threadIdx.x % 32;
        const int j    = lane % 4;
        float other[R8][4] = {}; // so that steps wait less for each other
#pragma unroll
        for (int r = 0; r < R8; ++r) {
            const float2 sum = *(const float2 *) (sums() + 8*r + 2*j);
            s[r][0] = s[r][2] = sum.x;
            s[r][1] = s[r][3] = sum.y;
        }
#pragma unroll
        for (int i = 0; i < n_steps; ++i) {
            const uint4 w = steps()[(tile*n_steps + i)*32 + lane];
            const uint32_t a[4] = { w.x, w.y, w.z, w.w };
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                const uint2 b = turned()[(r*n_steps + i)*cfg::step_pitch + lane];
                tq_mma(i % 2 ? other[r] : s[r], a, b.x, b.y);
            }
        }
#pragma unroll
        for (int r = 0; r < R8; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[r][i] += other[r][i];
            }
        }
    }

    // whether they are, of the cells that are seen: positions p of this lane's cells; start: that of the first cell of its span
    static __device__ bool in_order(const int * p, int start, int tile, const bool (*seen)[4]) {
        const int g  = threadIdx.x % 32 / 4;
        bool      ok = true;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            bool any = false;
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                any |= seen[r][2*t] || seen[r][2*t + 1];
            }
            ok &= !any || p[t] == start + TQ_TILE*tile + g + 8*t;
        }
        return __all_sync(TQ_WARP, ok);
    }

    // the same at any positions
    __device__ void score_any(const tq_attention_args & args, const int * p, float (*s)[4]) const {
        const tq_key_center & c = args.center;
        const int j = threadIdx.x % 4;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            float sum[R8][2];
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                sum[r][0] = rest((8*r + 2*j    ) % n_rows);
                sum[r][1] = rest((8*r + 2*j + 1) % n_rows);
            }
#pragma unroll 1
            for (int pair = 0; pair < c.n_rot/2; ++pair) {
                const float2 at = tq_center_turn(c, pair, p[t]);
#pragma unroll
                for (int r = 0; r < R8; ++r) {
                    const float2 w0 = weight((8*r + 2*j    ) % n_rows, pair);
                    const float2 w1 = weight((8*r + 2*j + 1) % n_rows, pair);
                    sum[r][0] += w0.x*at.x + w0.y*at.y;
                    sum[r][1] += w1.x*at.x + w1.y*at.y;
                }
            }
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                s[r][2*t    ] = sum[r][0];
                s[r][2*t + 1] = sum[r][1];
            }
        }
    }
};

// by the sum of weights
static __device__ __forceinline__ float2 tq_divide(float2 o, float sum) {
    return tq_scale(o, sum > 0.0f ? 1.0f/sum : sum == 0.0f ? 0.0f : sum); // a NaN passes
}

// coordinates lane and lane + 32 of the output of a row, from its parts; sink: a score (base 2) without a value
template <int D> static __device__ __forceinline__ float2 tq_combine(const float * part_o, const float2 * part_ml, int n_splits, float sink) {
    constexpr int n = 32; // so many loads at once
    const int lane = threadIdx.x % 32;
    float  top = fmaxf(sink, -1e30f);
    float  sum = lane == 0 ? tq_exp2(sink - top) : 0.0f; // of this lane's parts
    float2 o   = make_float2(0.0f, 0.0f);
    for (int i0 = 0; i0 < n_splits; i0 += n) {
        const float2 ml = i0 + lane < n_splits ? __ldcg(part_ml + i0 + lane) : make_float2(-1e30f, 0.0f);
        float2 part[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool some = i0 + i < n_splits;
            part[i] = some ? make_float2(__ldcg(part_o + (i0 + i)*D), __ldcg(part_o + (i0 + i)*D + 32)) : make_float2(0.0f, 0.0f);
        }
        const float before = top;
        top = fmaxf(top, ml.x);
#pragma unroll
        for (int h = 16; h > 0; h /= 2) {
            top = fmaxf(top, __shfl_xor_sync(TQ_WARP, top, h));
        }
        const float down = tq_exp2(before - top);
        const float w    = tq_exp2(ml.x - top);
        sum = sum*down + ml.y*w;
        o   = tq_scale(o, down);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float wi = __shfl_sync(TQ_WARP, w, i);
            o.x += part[i].x*wi;
            o.y += part[i].y*wi;
        }
    }
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        sum += __shfl_xor_sync(TQ_WARP, sum, h);
    }
    return tq_divide(o, sum);
}

template <int D, int N, int n_heads, tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits, bool centered>
static __global__ void __launch_bounds__(32*tq_attention_config<D, N, n_heads, k_kind, k_bits, v_kind, v_bits>::n_warps, 1)
tq_attention_parts(const __grid_constant__ tq_attention_args args) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
    using cfg = tq_attention_config<D, N, n_heads, k_kind, k_bits, v_kind, v_bits>;
    using k_row = typename cfg::k_row;
    using v_row = typename cfg::v_row;
    constexpr int n_warps  = cfg::n_warps;
    constexpr int n_blocks = cfg::n_blocks;
    constexpr int n_sides  = cfg::n_sides;
    constexpr int n_tiles  = cfg::n_tiles;
    constexpr int n_cols   = cfg::n_cols;
    constexpr int n_rows   = cfg::n_rows;
    constexpr int R8       = cfg::R8;

    extern __shared__ __align__(256) char shared[];
    char * const table    = shared;
    half * const q_shared = (half *) (shared + cfg::table_bytes);
    char * const stages   = shared + cfg::table_bytes + cfg::q_bytes;
    const tq_center_shared<cfg> centers = { shared + cfg::loop_bytes };
    __shared__ int merge_top[n_rows];

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int g    = lane / 4;
    const int j    = lane % 4;

    const int split  = blockIdx.y;
    const uint2 part_and_head = fast_div_modulo(blockIdx.x, args.head_kv_div);
    const int row0   = part_and_head.x*N;
    const int head0  = part_and_head.y*n_heads; // the first key head
    const int stream = blockIdx.z;
    const int group  = args.group_div.z;
    const int n_rows_used = min(N, group*args.n_q - row0);

    if (threadIdx.x < n_rows) {
        merge_top[threadIdx.x] = INT_MIN;
    }

    // what this warp reads: tiles of warps take turns, so that what a block reads at a time is close together
    const char * k_base = args.k + head0*args.k_nb[1] + stream*args.k_nb[2];
    const char * v_base = args.v + head0*args.v_nb[1] + stream*args.v_nb[2];
    const int k_nb  = (int) args.k_nb[0];
    const int v_nb  = (int) args.v_nb[0];
    const auto cell_of = [&](int tile, int it) { // the first of a tile
        const int it0 = it & -args.n_turn;
        return ((split*args.n_iter + it0)*args.n_warps*n_tiles + (warp*n_tiles + tile)*min(args.n_turn, args.n_iter - it0) + it - it0)*TQ_TILE;
    };
    const int own      = j/2 % n_sides; // the side whose scores this lane has
    const int own_tile = own % n_tiles;
    const int n_iter   = warp < args.n_warps && cell_of(0, 0) < args.n_kv ? args.n_iter : 0;

    // The first tiles on their way to the device's cache, while earlier kernels may still write cells: it is where all meet.
    // A block's part of the rows of all heads, but for the last row.
    if (lane < 2*n_tiles && n_iter > 0 && cell_of(lane/2, 0) + TQ_TILE <= args.n_kv) {
        const bool     keys = lane % 2 == 0;
        const int64_t  nb   = keys ? args.k_nb[0] : args.v_nb[0];
        const uint32_t n    = (uint32_t) (TQ_TILE - 1)*nb/args.head_kv_div.z;
        if ((keys ? args.k_nb[1] : args.v_nb[1]) < nb) {
            tq_prefetch((keys ? args.k + stream*args.k_nb[2] : args.v + stream*args.v_nb[2]) + cell_of(lane/2, 0)*nb + part_and_head.y*n, n);
        }
    }

    {   // pairs of levels; 2*n_warps entries on, the low nibble is the same
        const bool  of_values = threadIdx.x & 8;
        const int   i_low     = threadIdx.x / 16 % 16;
        const float low       = of_values ? args.v_codec.table[i_low] : args.k_codec.table[i_low];
#pragma unroll
        for (int i = threadIdx.x; i < cfg::table_bytes/16; i += 32*n_warps) {
            const uint32_t w = tq_pack(low, of_values ? args.v_codec.table[i / 256] : args.k_codec.table[i / 256]);
            ((uint4 *) table)[i] = make_uint4(w, w, w, w);
        }
    }
    typename tq_center_shared<cfg>::operands center_operands;
    if constexpr (centered) {
        center_operands = centers.start(args, head0);
    }

    const tq_copier<k_row> k_copier(k_base, k_nb, lane);
    const tq_copier<v_row> v_copier(v_base, v_nb, lane);
    char * const stage0 = stages + warp*cfg::n_stages*cfg::stage_bytes;
    const uint32_t stage0_address = (uint32_t) __cvta_generic_to_shared(stage0);
    const auto copy = [&](const auto & copier, int nb, int pitch, int at, int it) {
        if (it < n_iter) {
#pragma unroll
            for (int t = 0; t < n_tiles; ++t) {
                const int cell = cell_of(t, it);
                const uint32_t dst = stage0_address + it % cfg::n_stages*cfg::stage_bytes + at + t*TQ_TILE*pitch;
                copier.copy(dst, (uint32_t) cell*nb, args.n_kv - cell, lane);
            }
        }
        tq_copy_commit();
    };
    const auto copy_keys   = [&](int it) { copy(k_copier, k_nb, k_row::pitch, 0,            it); };
    const auto copy_values = [&](int it) { copy(v_copier, v_nb, v_row::pitch, cfg::k_bytes, it); };

    // columns 2*j and 2*j + 1 of each eight are this lane's
    float slope[R8][2];
    int mask_at[R8][2]; // row of the mask
#pragma unroll
    for (int r = 0; r < R8; ++r) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const tq_row_place place = tq_place_of(args, head0 + own % n_heads, min(row0 + (8*r + 2*j + e) % N, group*args.n_q - 1));
            slope[r][e] = 1.44269504f;
            if (args.max_bias > 0.0f) {
                const int   n2 = 1 << (31 - __clz(args.n_head));
                const float m0 = exp2f(-args.max_bias/n2);
                const float m1 = exp2f(-args.max_bias/n2/2.0f);
                slope[r][e] *= place.head < n2 ? powf(m0, place.head + 1) : powf(m1, 2*(place.head - n2) + 1);
            }
            mask_at[r][e] = place.query*(int) (args.mask_nb1/sizeof(half));
        }
    }
    const half * mask = args.mask ? (const half *) ((const char *) args.mask + stream % args.mask_ne3*args.mask_nb3) + g : nullptr;

    // blocks of queries that this warp rotates
    constexpr int n_turns = (n_cols*n_blocks + n_warps - 1)/n_warps;
    const float q_scale = args.cap != 0.0f ? args.scale/args.cap : args.scale*1.44269504f;
    const float * q_of[n_turns];
    float2 x[n_turns], x_scale[n_turns];
#pragma unroll
    for (int t = 0; t < n_turns; ++t) {
        const int col  = (t*n_warps + warp)/n_blocks;
        const int b    = (t*n_warps + warp)%n_blocks;
        const int head = head0 + col/N % n_heads;
        q_of[t] = col < n_cols && col % N < n_rows_used ? tq_query(args, head, row0 + col % N, stream) + 64*b + lane : nullptr;
        x_scale[t] = make_float2(1.0f, 1.0f);
        if constexpr (centered) {
            x_scale[t].x = tq_center_scale(args.center, head, 64*b + lane,      2);
            x_scale[t].y = tq_center_scale(args.center, head, 64*b + lane + 32, 2);
        }
    }

    const int32_t * pos = args.center.pos + (int64_t) stream*args.n_kv; // unless keys are not centered
    int span_first = 0; // positions of the first cells of the own side's span, and of its next one
    int span_next  = 0;
    if constexpr (centered) {
        const int cell = cell_of(own_tile, 0);
        span_first = n_iter > 0 && cell < args.n_kv ? max(pos[cell], 0) : 0;
        centers.seek(args, span_first, INT_MIN);
    }

    // So far nothing was read that kernels write: what describes centers are inputs of a graph. The next kernel may start to
    // do as much.
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();

#pragma unroll
    for (int t = 0; t < n_turns; ++t) {
        x[t] = q_of[t] ? make_float2(q_of[t][0], q_of[t][32]) : make_float2(0.0f, 0.0f);
    }
    copy_keys(0); // of all warps, before other copies: scores begin while those come

    // as the operands of the steps: [column/8][block][s][lane][n]
#pragma unroll
    for (int t = 0; t < n_turns; ++t) {
        const int col = (t*n_warps + warp)/n_blocks;
        const int b   = (t*n_warps + warp)%n_blocks;
        if (col < n_cols) {
            x[t] = tq_scale(x[t], q_scale);
            if (centered && col < n_rows) {
                centers.raw(col, 64*b + lane     ) = x[t].x;
                centers.raw(col, 64*b + lane + 32) = x[t].y;
            }
            x[t] = tq_rht(make_float2(x[t].x*x_scale[t].x, x[t].y*x_scale[t].y), args.k_codec.rotation, lane);
            half * dst = q_shared + ((col/8*n_blocks + b)*4 + lane % 4)*128 + col%8*16 + lane/16*4 + lane % 16/4;
            dst[0] = __float2half_rn(x[t].x);
            dst[8] = __float2half_rn(x[t].y);
            if constexpr (k_kind == TQ_KIND_QJL) {
                const float2 f = tq_scale(tq_rht(x[t], args.k_codec.sketch, lane), args.k_codec.kappa);
                dst[n_cols*D    ] = __float2half_rn(f.x);
                dst[n_cols*D + 8] = __float2half_rn(f.y);
            }
        }
    }
    __syncthreads();
    copy_values(0);
#pragma unroll
    for (int it = 1; it < cfg::n_stages; ++it) {
        copy_keys(it);
        copy_values(it);
    }
    if constexpr (centered) {
        centers.weigh(args, center_operands);
    }

    uint2 q_frag[cfg::q_in_registers ? R8*n_blocks*4 : 1];
    uint2 f_frag[cfg::q_in_registers && k_kind == TQ_KIND_QJL ? R8*n_blocks*4 : 1];
    const uint2 * q_at = (const uint2 *) q_shared + lane;
    if constexpr (cfg::q_in_registers) {
#pragma unroll
        for (int i = 0; i < R8*n_blocks*4; ++i) {
            q_frag[i] = q_at[32*i];
            if constexpr (k_kind == TQ_KIND_QJL) {
                f_frag[i] = q_at[32*(i + R8*n_blocks*4)];
            }
        }
    }

    float m[R8][2], l[R8][2];
    float o[R8][n_blocks*4][4];
    float d_ref = 1e-9f; // values are scaled by its reciprocal, so that weights times scales fit f16
    float d_inv = 1e9f;
#pragma unroll
    for (int r = 0; r < R8; ++r) {
        m[r][0] = m[r][1] = -1e30f;
        l[r][0] = l[r][1] = 0.0f;
#pragma unroll
        for (int i = 0; i < n_blocks*4; ++i) {
            o[r][i][0] = o[r][i][1] = o[r][i][2] = o[r][i][3] = 0.0f;
        }
    }
    const uint32_t lane_offset = 4*lane;

    // this lane's rows in a stage, of cells g and, eight rows on, g + 8; the own side's have the scales that it needs
    const int k_at   = g*k_row::pitch + ((uint32_t) (uintptr_t) (k_base + g*k_nb) & 15);
    const int v_at   = g*v_row::pitch + ((uint32_t) (uintptr_t) (v_base + g*v_nb) & 15) + cfg::k_bytes;
    const int k_own  = k_at + own*cfg::k_side;
    const int v_own  = v_at + own*cfg::v_side;
    const int at     = 2*j;
    const int before = 2*((j + 3) & 3);

    for (int it = 0; it < n_iter; ++it) {
        const char * stage = stage0 + it % cfg::n_stages*cfg::stage_bytes;

        // masks and positions are not looked at before scores are there
        const int cell = cell_of(own_tile, it);
        uint16_t mask_of[R8][4];
        int p[2] = { 0, 0 };
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int  at    = cell + 8*t;
            const bool valid = at + g < args.n_kv;
#pragma unroll
            for (int r = 0; r < R8; ++r) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    mask_of[r][2*t + e] = valid ? mask ? __half_as_ushort(mask[mask_at[r][e] + at]) : 0 : 0xfc00; // -inf
                }
            }
            if (centered && valid) {
                p[t] = pos[at + g];
            }
        }
        if constexpr (centered) {
            if (it % 4 == 0) {
                if (it > 0) {
                    const int last = span_first;
                    span_first = max(span_next, 0);
                    centers.seek(args, span_first, last);
                }
                centers.turn(n_rows_used);
            }
            if (it % 4 == 2 && it + 2 < n_iter) {
                const int next = cell_of(own_tile, it + 2);
                span_next = next < args.n_kv ? pos[next] : 0;
            }
        }
        tq_copy_wait<2*cfg::n_stages - 1>(); // keys
        __syncwarp();

        float center[R8][4];
        if constexpr (centered) {
            centers.score(it % 4, center);
        }
        float s[R8][4] = {};
#pragma unroll
        for (int b = 0; b < n_blocks; ++b) {
            constexpr int size = k_row::block;
            float acc[n_sides][R8][4] = {};
#pragma unroll
            for (int h = 0; h < n_sides; ++h) {
                const char * k = stage + k_at + h*cfg::k_side + b*size;
                const tq_words w = tq_read_block<k_kind, k_bits>(k, k + 8*k_row::pitch, at, before);
                const tq_pair_signs signs = tq_signs_of_keys(w.signs);
#pragma unroll
                for (int st = 0; st < 4; ++st) {
                    uint32_t a[4];
                    tq_key_operand<k_kind>(table, lane_offset, w, signs, st, a);
#pragma unroll
                    for (int r = 0; r < R8; ++r) {
                        const int   i = (r*n_blocks + b)*4 + st;
                        const uint2 q = cfg::q_in_registers ? q_frag[cfg::q_in_registers ? i : 0] : q_at[32*i];
                        tq_mma(acc[h][r], a, q.x, q.y);
                    }
                    if constexpr (k_kind == TQ_KIND_QJL) {
                        tq_sketch_operand(signs, st, a);
#pragma unroll
                        for (int r = 0; r < R8; ++r) {
                            const int   i = (r*n_blocks + b)*4 + st;
                            const uint2 f = cfg::q_in_registers ? f_frag[cfg::q_in_registers ? i : 0] : q_at[32*(i + R8*n_blocks*4)];
                            tq_mma(acc[h][r], a, f.x, f.y);
                        }
                    }
                }
            }
            const float dx = tq_read_scale(stage + k_own + b*size);
            const float dy = tq_read_scale(stage + k_own + b*size + 8*k_row::pitch);
#pragma unroll
            for (int r = 0; r < R8; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[r][i] += (i < 2 ? dx : dy)*(own == 1 ? acc[n_sides - 1][r][i] : acc[0][r][i]);
                }
            }
        }
        __syncwarp();
        copy_keys(it + cfg::n_stages);

        bool seen[R8][4];
#pragma unroll
        for (int r = 0; r < R8; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                seen[r][i] = mask_of[r][i] != 0xfc00;
            }
        }
        if constexpr (centered) {
            if (!centers.in_order(p, span_first, it % 4, seen)) {
                centers.score_any(args, p, center);
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                if (p[t] <= 0) { // position 0 has a center of its own
#pragma unroll
                    for (int r = 0; r < R8; ++r) {
                        center[r][2*t    ] = centers.first((8*r + 2*j    ) % n_rows);
                        center[r][2*t + 1] = centers.first((8*r + 2*j + 1) % n_rows);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < R8; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[r][i] += center[r][i];
                }
            }
        }

        if (args.cap != 0.0f) { // cap*tanh(s)
#pragma unroll
            for (int r = 0; r < R8; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[r][i] = args.cap*1.44269504f*(1.0f - 2.0f/(1.0f + tq_exp2(2.88539008f*s[r][i])));
                }
            }
        }
        bool raise = false;
#pragma unroll
        for (int r = 0; r < R8; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[r][i] = seen[r][i] ? s[r][i] + __half2float(__ushort_as_half(mask_of[r][i]))*slope[r][i % 2] : -INFINITY;
                raise |= s[r][i] > m[r][i % 2] + 6.0f;
            }
        }
        tq_copy_wait<2*cfg::n_stages - 1>(); // values
        __syncwarp();
        float dx[n_blocks], dy[n_blocks];
#pragma unroll
        for (int b = 0; b < n_blocks; ++b) {
            constexpr int size = v_row::block;
            dx[b] = tq_read_scale(stage + v_own + b*size);
            dy[b] = tq_read_scale(stage + v_own + b*size + 8*v_row::pitch);
            raise |= fmaxf(dx[b], dy[b]) > 8.0f*d_ref;
        }
        if (__any_sync(TQ_WARP, raise)) { // rare after the first tiles
            float d_max = d_ref;
#pragma unroll
            for (int b = 0; b < n_blocks; ++b) {
                d_max = fmaxf(d_max, fmaxf(dx[b], dy[b]));
            }
            d_max = tq_max_of_cells(d_max); // the same in all j of a side
            const float d_down = d_ref/d_max;
            d_ref = d_max;
            d_inv = 1.0f/d_max;
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                float down[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float top = fmaxf(m[r][e], tq_max_of_cells(fmaxf(s[r][e], s[r][e + 2])));
                    down[e] = tq_exp2(m[r][e] - top);
                    m[r][e] = top;
                    l[r][e] *= down[e];
                    down[e] *= d_down;
                }
#pragma unroll
                for (int i = 0; i < n_blocks*4; ++i) {
                    o[r][i][0] *= down[0];
                    o[r][i][1] *= down[1];
                    o[r][i][2] *= down[0];
                    o[r][i][3] *= down[1];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < R8; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[r][i] = tq_exp2(s[r][i] - m[r][i % 2]);
                l[r][i % 2] += s[r][i];
            }
        }

#pragma unroll
        for (int b = 0; b < n_blocks; ++b) {
            constexpr int size = v_row::block;
            // weights of cells, times their scales
            uint32_t p0[R8], p1[R8];
            const float ex = dx[b]*d_inv;
            const float ey = dy[b]*d_inv;
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                p0[r] = tq_transpose(tq_pack(s[r][0] == 0.0f ? 0.0f : s[r][0]*ex, s[r][1] == 0.0f ? 0.0f : s[r][1]*ex));
                p1[r] = tq_transpose(tq_pack(s[r][2] == 0.0f ? 0.0f : s[r][2]*ey, s[r][3] == 0.0f ? 0.0f : s[r][3]*ey));
            }
#pragma unroll
            for (int h = 0; h < n_sides; ++h) {
                const char * v = stage + v_at + h*cfg::v_side + b*size;
                const tq_words w = tq_read_block<v_kind, v_bits>(v, v + 8*v_row::pitch, at, before);
                const bool mine = n_sides == 1 || g / 4 == h; // column g is of this side
                uint32_t signs_ab = 0;
                uint32_t signs_cd = 0;
                if constexpr (v_kind == TQ_KIND_TCQ) {
                    signs_ab = tq_transpose(__byte_perm(w.signs, 0, 0x1010)) >> (g & 1);
                    signs_cd = tq_transpose(__byte_perm(w.signs, 0, 0x3232)) >> (g & 1);
                }
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const tq_value_pairs pairs = tq_pairs_of_values(
                        tq_transpose(tq_both_low (w.codes[2*n], w.codes[2*n + 1])),
                        tq_transpose(tq_both_high(w.codes[2*n], w.codes[2*n + 1])));
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        uint32_t a[4];
                        tq_value_operand<v_kind>(table, lane_offset, pairs, signs_ab, signs_cd, n, i, a);
#pragma unroll
                        for (int r = 0; r < R8; ++r) {
                            tq_mma(o[r][4*b + 2*n + i], a, mine ? p0[r] : 0, mine ? p1[r] : 0);
                        }
                    }
                }
            }
        }
        __syncwarp();
        copy_values(it + cfg::n_stages);
    }
    tq_copy_wait<0>();

    // the parts of warps and tiles become one
    __syncthreads();
    float  * merge_l = (float *) shared;                           // [n_warps][n_cols]
    float4 * merge_o = (float4 *) (merge_l + n_warps*n_cols);      // [n_warps][R8][n_blocks*4][32]
    float  * sums    = (float *) (merge_o + n_warps*cfg::n_merge); // [n_sums][n_cols][sum_pitch]: of every n_sums-th warp
    constexpr int sum_pitch = D + 4; // spreads banks
    if (g == 0) {
#pragma unroll
        for (int r = 0; r < R8; ++r) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                atomicMax(&merge_top[(8*r + 2*j + e) % n_rows], tq_ordered(m[r][e]));
            }
        }
    }
    __syncthreads();
    if (warp < args.n_warps) {
#pragma unroll
        for (int r = 0; r < R8; ++r) {
            float down[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                down[e] = tq_exp2(m[r][e] - tq_unordered(merge_top[(8*r + 2*j + e) % n_rows]));
                l[r][e] = tq_sum_of_cells(l[r][e]);
                if (g == 0) {
                    merge_l[warp*n_cols + 8*r + 2*j + e] = l[r][e]*down[e];
                }
                down[e] *= d_ref;
            }
#pragma unroll
            for (int i = 0; i < n_blocks*4; ++i) {
                merge_o[warp*cfg::n_merge + (r*n_blocks*4 + i)*32 + lane] =
                    make_float4(o[r][i][0]*down[0], o[r][i][1]*down[1], o[r][i][2]*down[0], o[r][i][3]*down[1]);
            }
        }
    }
    __syncthreads();
    for (int i0 = threadIdx.x; i0 < cfg::n_sums*cfg::n_merge; i0 += 32*n_warps) { // 32*n_warps is a multiple of 32: the lane stays the same
        const int i = i0 % cfg::n_merge;
        const int n = i0 / cfg::n_merge;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < n_warps; w += cfg::n_sums) {
            if (w + n < args.n_warps) {
                const float4 x = merge_o[(w + n)*cfg::n_merge + i];
                sum.x += x.x;
                sum.y += x.y;
                sum.z += x.z;
                sum.w += x.w;
            }
        }
        const int tile = i / 32 % (n_blocks*4); // block, half step, coordinates 4*n, n = 2*(tile % 2) and one more
        const int col  = i / 32 / (n_blocks*4)*8 + 2*j;
        float * dst = sums + (n*n_cols + col)*sum_pitch + tile/4*64 + 16*(g >> 1) + 8*(tile % 2) + 2*(tile / 2 % 2) + (g & 1);
        dst[0]             = sum.x;
        dst[4]             = sum.z;
        dst[sum_pitch]     = sum.y;
        dst[sum_pitch + 4] = sum.w;
    }
    __syncthreads();
    const auto used   = [&](int row) { return row % N < n_rows_used; };
    const auto place  = [&](int row) { return tq_place_of(args, head0 + row/N, row0 + row % N); };
    const auto row_of = [&](int row) { // of the output
        const tq_row_place p = place(row);
        return ((int64_t) stream*args.n_q + p.query)*args.n_head + p.head;
    };
    const auto sum_of = [&](int row, int i) { // over the block's warps: coordinate i
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < cfg::n_sums*n_tiles; ++n) {
            sum += sums[(n*n_rows + row)*sum_pitch + i];
        }
        return sum;
    };
    const auto weights_of = [&](int row) {
        float sum = lane < args.n_warps*n_tiles ? merge_l[lane*n_rows + row] : 0.0f;
#pragma unroll
        for (int h = 16; h > 0; h /= 2) {
            sum += __shfl_xor_sync(TQ_WARP, sum, h);
        }
        return sum;
    };
    const auto sink_of = [&](int row) { // a score (base 2) without a value
        return args.sinks ? args.sinks[place(row).head]*1.44269504f : -INFINITY;
    };
    const auto write = [&](int row, int b, float2 o) { // lane's coordinates of block b
        const float2 x = tq_rht_inverse(o, args.v_codec.rotation, lane);
        float * dst = args.dst + row_of(row)*D + 64*b + lane;
        dst[ 0] = x.x;
        dst[32] = x.y;
    };
    if (args.n_splits == 1) {
        for (int i = warp; i < n_rows*n_blocks; i += n_warps) { // a warp a block of 64
            const int row = i / n_blocks;
            const int b   = i % n_blocks;
            if (used(row)) {
                const float sink = sink_of(row);
                const float top  = tq_unordered(merge_top[row]);
                const float down = tq_exp2(top - fmaxf(top, sink));
                const float sum  = weights_of(row)*down + tq_exp2(sink - fmaxf(top, sink));
                write(row, b, tq_divide(make_float2(sum_of(row, 64*b + lane)*down, sum_of(row, 64*b + lane + 32)*down), sum));
            }
        }
        return;
    }
    for (int i = threadIdx.x; i < n_rows*D; i += 32*n_warps) {
        if (used(i/D)) {
            args.part_o[(row_of(i/D)*args.n_splits + split)*D + i%D] = sum_of(i/D, i%D);
        }
    }
    for (int row = n_warps - 1 - warp; row < n_rows; row += n_warps) {
        const float sum = weights_of(row);
        if (lane == 0 && used(row)) {
            args.part_ml[row_of(row)*args.n_splits + split] = make_float2(tq_unordered(merge_top[row]), sum);
        }
    }

    // the last of the blocks with these rows combines them
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        int * n_done = args.n_done + blockIdx.z*gridDim.x + blockIdx.x;
        is_last = tq_count(n_done) == args.n_splits - 1;
        if (is_last) {
            *n_done = 0;
        }
    }
    __syncthreads();
    if (!is_last) {
        return;
    }
    for (int i = warp; i < n_rows*n_blocks; i += n_warps) {
        const int row = i / n_blocks;
        const int b   = i % n_blocks;
        if (used(row)) {
            const int64_t part = row_of(row)*args.n_splits;
            write(row, b, tq_combine<D>(args.part_o + part*D + 64*b + lane, args.part_ml + part, args.n_splits, sink_of(row)));
        }
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
}

// what a launch of one instance needs
struct tq_attention_kernel {
    void (*launch)(const tq_attention_args & args, dim3 grid, cudaStream_t stream);
    int n_warps;      // of a CUDA block
    int n_tiles;      // of a warp at a time
    int n_heads;      // key heads of a CUDA block, adjacent in memory
    int n_rows;       // of one
    int shared_bytes;
    int center_bytes; // of shared memory, more for centered keys
};

template <int D, int N, int n_heads, tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits>
static tq_attention_kernel tq_attention_instance() {
    using cfg = tq_attention_config<D, N, n_heads, k_kind, k_bits, v_kind, v_bits>;
    return { [](const tq_attention_args & args, dim3 grid, cudaStream_t stream) {
        if (args.center.pos) {
            constexpr int shared_bytes = cfg::shared_bytes + cfg::center_bytes;
            const auto kernel = tq_attention_parts<D, N, n_heads, k_kind, k_bits, v_kind, v_bits, true>;
            CUDA_SET_SHARED_MEMORY_LIMIT(kernel, shared_bytes);
            ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(32*cfg::n_warps), (size_t) shared_bytes, stream), args);
        } else {
            constexpr int shared_bytes = cfg::shared_bytes;
            const auto kernel = tq_attention_parts<D, N, n_heads, k_kind, k_bits, v_kind, v_bits, false>;
            CUDA_SET_SHARED_MEMORY_LIMIT(kernel, shared_bytes);
            ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(32*cfg::n_warps), (size_t) shared_bytes, stream), args);
        }
    }, cfg::n_warps, cfg::n_tiles, n_heads, N, cfg::shared_bytes, cfg::center_bytes };
}

// the instances of a key type and a kind of value types; { nullptr, ... } where there is none
template <tq_kind k_kind, int k_bits, tq_kind v_kind> tq_attention_kernel tq_attention_find(int v_bits, int head_dim, int n_rows, bool pairs);
