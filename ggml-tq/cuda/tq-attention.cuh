#pragma once

// Attention of few queries over packed keys and values (docs/decisions/0008-cuda-attention.md).
//
// A CUDA block has one key head of one stream, up to 8*R8 rows (queries times heads of the group) and a part of the cells. Its
// warps take tiles of 16 cells in turn, each with a pipeline of its own from global to shared memory. Scores and outputs are
// computed transposed, cells or coordinates along the 16 rows of a tensor-core operand and attention rows along its 8 columns,
// in the rotated basis. The block that is done last with a row combines the parts, in their order, and turns the output back.

#include "tq-fragment.cuh"
#include "tq-kernel.cuh"

#define TQ_TILE   16 // cells
#define TQ_STAGES 2  // tiles of a warp in shared memory

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
    uint3 head_kv_div;       // key heads, as divisors (fastdiv)
    int   n_splits, n_iter;  // n_iter: tiles of a warp
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

// a row of one head; it is copied in pieces of 16 bytes that hold it, whatever its alignment; an odd number of them spreads banks
template <int D, int bits> struct tq_row_layout {
    static constexpr int align    = D % 256 == 0 ? 8 : D % 128 == 0 ? 4 : 2;
    static constexpr int block    = 2 + 8*bits;
    static constexpr int bytes    = D/64*block;
    static constexpr int n_pieces = (bytes + 16 - align + 15)/16;
    static constexpr int pitch    = 16*(n_pieces | 1);
};

template <int D, int R8, tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits> struct tq_attention_config {
    using k_row = tq_row_layout<D, k_bits>;
    using v_row = tq_row_layout<D, v_bits>;
    static constexpr int n_blocks = D/64;
    static constexpr int n_rows   = 8*R8;
    static constexpr int n_warps  = D*R8 <= 128 ? 16 : 8;
    static constexpr bool q_in_registers = D*R8 <= 128;

    static constexpr int k_entries    = tq_pairs<k_kind, k_bits>::n_entries;
    static constexpr int v_entries    = tq_pairs<v_kind, v_bits>::n_entries;
    static constexpr int stage_bytes  = TQ_TILE*(k_row::pitch + v_row::pitch); // of a warp
    static constexpr int table_bytes  = 256*(k_entries > v_entries ? k_entries : v_entries);
    static constexpr int q_bytes      = n_rows*D*2*(k_kind == TQ_KIND_QJL ? 2 : 1);
    static constexpr int weight_pitch = D/2 + 1; // pairs of a row
    static constexpr int weight_bytes = n_rows*(2*weight_pitch + 2)*4;
    static constexpr int step_pitch   = 36; // of turned weights, in pairs of words: 32 lanes', and 4 that spread banks
    static constexpr int turned_bytes = n_rows/8*(D/16)*step_pitch*8;
    static constexpr int center_bytes = 64*D*2 + n_warps*(turned_bytes + n_rows*4 + D*4) + D*4;
    static constexpr int n_stages     = TQ_STAGES;
    static constexpr int loop_bytes   = table_bytes + q_bytes + weight_bytes + n_stages*n_warps*stage_bytes;
    static constexpr int merge_bytes  = n_warps*n_rows*(D + 2)*4;
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

static __device__ __forceinline__ uint32_t tq_pack(float x, float y) {
    const half2 h = __floats2half2_rn(x, y);
    return *(const uint32_t *) &h;
}

static __device__ __forceinline__ float tq_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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

// How a lane copies its part of the rows of a tile. Sixteen rows on, addresses have the same alignment, so this is found once.
// Bytes around a row in its first and last 16 are read, never more.
template <typename row> struct tq_copier {
    static constexpr int n = (TQ_TILE*row::n_pieces + 31)/32;
    const char * base;    // the tile's first row
    int64_t  step;        // a tile
    int      from[n];     // offset of a piece, INT_MIN where none is needed

    __device__ tq_copier(const char * base, int64_t nb1, int lane) : base(base), step(TQ_TILE*nb1) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const int cell  = (32*i + lane)/row::n_pieces;
            const int piece = (32*i + lane)%row::n_pieces;
            const int skew  = (int) ((uintptr_t) (base + cell*nb1) & 15);
            from[i] = cell < TQ_TILE && 16*piece < row::bytes + skew ? (int) (cell*nb1) - skew + 16*piece : INT_MIN;
        }
    }

    // to shared memory, and on to the next tile
    __device__ void copy(uint32_t dst, int n_cells, int lane) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const int at = 32*i + lane;
            const int dst_at = row::pitch == 16*row::n_pieces ? 16*at : at/row::n_pieces*row::pitch + at%row::n_pieces*16;
            const bool some  = at/row::n_pieces < n_cells;
            const char * src = some ? base + from[i] : (const char *) ((uintptr_t) base & ~(uintptr_t) 15); // zeros: from nowhere
            tq_copy_16(dst + dst_at, src, some ? 16 : 0, from[i] != INT_MIN);
        }
        base += step;
    }
};

// the lane's halfwords of a block of two cells
template <tq_kind kind, int bits>
static __device__ __forceinline__ tq_words tq_read_block(const char * x, const char * y, int j) {
    uint32_t px[bits], py[bits];
#pragma unroll
    for (int p = 0; p < bits; ++p) {
        px[p] = *(const uint16_t *) (x + 2 + 8*p + 2*j);
        py[p] = *(const uint16_t *) (y + 2 + 8*p + 2*j);
    }
    uint32_t cx = 0;
    uint32_t cy = 0;
    if constexpr (kind == TQ_KIND_TCQ) {
        const int before = 2 + 8*(bits - 1) + 2*((j + 3) & 3);
        cx = tq_both_low(*(const uint16_t *) (x + before), px[bits - 1]);
        cy = tq_both_low(*(const uint16_t *) (y + before), py[bits - 1]);
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

    static constexpr int D = cfg::n_blocks*64;

    // [position/16][step][lane]: operand of cosines and sines
    __device__ uint4 * steps() const { return (uint4 *) base; }
    // of this warp: [row/8][step][lane]: operand of turned weights; [row]: the sums of turned weights of cosines
    __device__ uint2 * turned() const { return (uint2 *) (base + 64*D*2 + threadIdx.x/32*cfg::turned_bytes); }
    __device__ float * sums() const { return (float *) (base + 64*D*2 + cfg::n_warps*cfg::turned_bytes) + threadIdx.x/32*cfg::n_rows; }
    // of this lane: cosines and sines at the start of its warp's span, of pairs lane + 32*i
    __device__ float2 * at() const {
        return (float2 *) (base + 64*D*2 + cfg::n_warps*(cfg::turned_bytes + cfg::n_rows*4)) + threadIdx.x/32*(D/2) + threadIdx.x%32;
    }
    // [pair]: cosine and sine of 64 positions
    __device__ float2 * span() const { return (float2 *) (base + 64*D*2 + cfg::n_warps*(cfg::turned_bytes + cfg::n_rows*4 + D*4)); }

    // [row][pair] of (wc, ws), then [row] of what does not turn and [row] of what is the score's part at position 0
    static __device__ float2 & weight(float * weights, int row, int pair) { return ((float2 *) weights)[row*cfg::weight_pitch + pair]; }
    static __device__ float  & rest  (float * weights, int row)           { return weights[cfg::n_rows*2*cfg::weight_pitch + row]; }
    static __device__ float  & first (float * weights, int row)           { return weights[cfg::n_rows*(2*cfg::weight_pitch + 1) + row]; }

    static constexpr int n_steps = D/16; // those past n_rot are zero

    // weights, and the operand of cosines and sines. The centers of a key head are looked up here and nowhere else.
    __device__ void start(const tq_attention_args & args, float * weights, int row0, int n_rows_used, int head, int stream, float q_scale) const {
        const tq_key_center & c = args.center;
        const float * m = c.centers + (int64_t) head*c.head_dim;
        const int n_pairs = c.n_rot/2;
        constexpr int n_threads = 32*cfg::n_warps;
#pragma unroll
        for (int i0 = 0; i0 < cfg::n_rows*D/2; i0 += n_threads) {
            const int row  = (i0 + threadIdx.x) / (D/2);
            const int pair = (i0 + threadIdx.x) % (D/2);
            if (row < n_rows_used && pair < n_pairs) {
                const float * q = tq_query(args, head, row0 + row, stream);
                const int a = c.neox ? pair           : 2*pair;
                const int b = c.neox ? pair + n_pairs : 2*pair + 1;
                weight(weights, row, pair) = make_float2(q_scale*(q[a]*m[a] + q[b]*m[b]), q_scale*(q[b]*m[a] - q[a]*m[b]));
            } else if (row < cfg::n_rows) {
                weight(weights, row, pair) = make_float2(0.0f, 0.0f);
            }
        }
        if (threadIdx.x < cfg::n_rows) {
            float sum = 0.0f;
            if (threadIdx.x < n_rows_used && c.n_rot < D) {
                const float * q = tq_query(args, head, row0 + threadIdx.x, stream);
                for (int k = c.n_rot; k < D; ++k) {
                    sum += q_scale*q[k]*m[k];
                }
            }
            rest(weights, threadIdx.x) = sum;
        }
        const float * m0 = m + (int64_t) 3*c.n_head*c.head_dim;
        for (int row = threadIdx.x/32; row < cfg::n_rows; row += cfg::n_warps) {
            float sum = 0.0f;
            if (row < n_rows_used) {
                const float * q = tq_query(args, head, row0 + row, stream);
#pragma unroll
                for (int i = 0; i < D; i += 32) {
                    sum += q_scale*q[i + threadIdx.x % 32]*m0[i + threadIdx.x % 32];
                }
            }
#pragma unroll
            for (int h = 16; h > 0; h /= 2) {
                sum += __shfl_xor_sync(TQ_WARP, sum, h);
            }
            if (threadIdx.x % 32 == 0) {
                first(weights, row) = sum;
            }
        }
        for (int i = threadIdx.x % 32; i < cfg::turned_bytes/8; i += 32) { // rows that are not used stay 0
            turned()[i] = make_uint2(0, 0);
        }
        if (threadIdx.x < D/2) {
            const int i = threadIdx.x;
            span()[i] = i < n_pairs ? make_float2(c.table[64*c.n_rot + i], c.table[64*c.n_rot + i + n_pairs]) : make_float2(0.0f, 0.0f);
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
    }

    // weights for the span whose first cell is at position p; last: that of the span before, INT_MIN if there is none
    __device__ void turn(const tq_attention_args & args, float * weights, int n_rows_used, int p, int last) const {
        const tq_key_center & c = args.center;
        const int lane = threadIdx.x % 32;
        float2 at[D/64];
#pragma unroll
        for (int i = 0; i < D/64; ++i) {
            const int pair = lane + 32*i;
            if (p == last + 64) { // some spans on, the error is far below that of f16
                const float2 a = this->at()[32*i];
                const float2 b = span()[pair];
                at[i] = make_float2(a.x*b.x - a.y*b.y, a.x*b.y + a.y*b.x);
            } else {
                at[i] = pair < c.n_rot/2 ? tq_center_turn(c, pair, p) : make_float2(0.0f, 0.0f);
            }
            this->at()[32*i] = at[i];
        }
        uint32_t * turned_at = (uint32_t *) (turned() + lane/8*cfg::step_pitch + lane % 4) + lane/4 % 2;
#pragma unroll
        for (int r = 0; r < cfg::n_rows/8; ++r) {
            float sum[8];
#pragma unroll
            for (int i0 = 0; i0 < 8; i0 += 4) { // four rows, or none of them
                sum[i0] = sum[i0 + 1] = sum[i0 + 2] = sum[i0 + 3] = 0.0f;
                if (8*r + i0 < n_rows_used) {
#pragma unroll
                    for (int i = i0; i < i0 + 4; ++i) {
#pragma unroll
                        for (int k = 0; k < D/64; ++k) {
                            const float2 w  = weight(weights, 8*r + i, lane + 32*k);
                            const float  wc = w.x*at[k].x + w.y*at[k].y;
                            const float  ws = w.y*at[k].x - w.x*at[k].y;
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
                sums()[8*r + lane/4] = sum[0] + rest(weights, 8*r + lane/4);
            }
        }
    }

    // the centers' part of the scores of a tile, if its positions are in order
    template <int R8> __device__ void score(int tile, float (*s)[4]) const {
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

    // whether they are, of the cells that are seen: positions p of this lane's cells; start: that of the first cell of the span
    template <int R8> static __device__ bool in_order(const int * p, int start, int tile, const bool (*seen)[4]) {
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
    template <int R8> __device__ void score_any(const tq_attention_args & args, float * weights, const int * p, float (*s)[4]) const {
        const tq_key_center & c = args.center;
        const int j = threadIdx.x % 4;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            float sum[R8][2];
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                sum[r][0] = rest(weights, 8*r + 2*j);
                sum[r][1] = rest(weights, 8*r + 2*j + 1);
            }
#pragma unroll 1
            for (int pair = 0; pair < c.n_rot/2; ++pair) {
                const float2 at = tq_center_turn(c, pair, p[t]);
#pragma unroll
                for (int r = 0; r < R8; ++r) {
                    const float2 w0 = weight(weights, 8*r + 2*j,     pair);
                    const float2 w1 = weight(weights, 8*r + 2*j + 1, pair);
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

// coordinates lane and lane + 32 of the output of a row, from its parts; sink: a score (base 2) without a value
template <int D> static __device__ __forceinline__ float2 tq_combine(const float * part_o, const float2 * part_ml, int n_splits, float sink) {
    float  top = fmaxf(sink, -1e30f);
    float  sum = tq_exp2(sink - top);
    float2 o   = make_float2(0.0f, 0.0f);
    for (int i0 = 0; i0 < n_splits; i0 += 16) { // so many loads at once
        float2 ml[16];
        float2 part[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const bool some = i0 + i < n_splits;
            ml  [i] = some ? __ldcg(part_ml + i0 + i) : make_float2(-1e30f, 0.0f);
            part[i] = some ? make_float2(__ldcg(part_o + (i0 + i)*D), __ldcg(part_o + (i0 + i)*D + 32)) : make_float2(0.0f, 0.0f);
        }
        const float before = top;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            top = fmaxf(top, ml[i].x);
        }
        const float down = tq_exp2(before - top);
        sum *= down;
        o = tq_scale(o, down);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float w = tq_exp2(ml[i].x - top);
            sum += ml[i].y*w;
            o.x += part[i].x*w;
            o.y += part[i].y*w;
        }
    }
    return tq_scale(o, sum > 0.0f ? 1.0f/sum : sum == 0.0f ? 0.0f : sum); // a NaN passes
}

template <int D, int R8, tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits, bool centered>
static __global__ void __launch_bounds__(32*tq_attention_config<D, R8, k_kind, k_bits, v_kind, v_bits>::n_warps, 1)
tq_attention_parts(const __grid_constant__ tq_attention_args args) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
    using cfg = tq_attention_config<D, R8, k_kind, k_bits, v_kind, v_bits>;
    using k_row = typename cfg::k_row;
    using v_row = typename cfg::v_row;
    constexpr int n_warps  = cfg::n_warps;
    constexpr int n_blocks = cfg::n_blocks;
    constexpr int n_rows   = cfg::n_rows;

    extern __shared__ __align__(256) char shared[];
    char  * const table    = shared;
    half  * const q_shared = (half *) (shared + cfg::table_bytes);
    float * const weights  = (float *) (shared + cfg::table_bytes + cfg::q_bytes); // of centered keys
    char  * const stages   = shared + cfg::table_bytes + cfg::q_bytes + cfg::weight_bytes;
    const tq_center_shared<cfg> centers = { shared + cfg::loop_bytes };
    __shared__ half levels[2][16];
    __shared__ int  merge_top[n_rows];

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int g    = lane / 4;
    const int j    = lane % 4;

    const int split  = blockIdx.y;
    const uint2 part_and_head = fast_div_modulo(blockIdx.x, args.head_kv_div);
    const int row0   = part_and_head.x*n_rows;
    const int head   = part_and_head.y;
    const int stream = blockIdx.z;
    const int group  = args.group_div.z;
    const int n_rows_used = min(n_rows, group*args.n_q - row0);

    if (threadIdx.x < n_rows) {
        merge_top[threadIdx.x] = INT_MIN;
    }
    // pairs of levels
    if (threadIdx.x < 16) {
        levels[0][threadIdx.x] = __float2half_rn(tq_level<k_kind, k_bits>(args.k_codec, threadIdx.x));
    } else if (threadIdx.x < 32) {
        levels[1][threadIdx.x - 16] = __float2half_rn(tq_level<v_kind, v_bits>(args.v_codec, threadIdx.x - 16));
    }
    __syncthreads();
    {
        const half * of = levels[threadIdx.x / 8 % 2];
        const half  low = of[threadIdx.x / 16 % 16]; // 2*n_warps entries on, the low nibble is the same
#pragma unroll
        for (int i = threadIdx.x; i < cfg::table_bytes/16; i += 32*n_warps) {
            const half2 pair = __halves2half2(low, of[i / 256]);
            const uint32_t w = *(const uint32_t *) &pair;
            ((uint4 *) table)[i] = make_uint4(w, w, w, w);
        }
    }

    ggml_cuda_pdl_sync(); // so far nothing was read that another kernel writes

    // what this warp reads
    const char * k_base = args.k + head*args.k_nb[1] + stream*args.k_nb[2];
    const char * v_base = args.v + head*args.v_nb[1] + stream*args.v_nb[2];
    const int first = (split*n_warps + warp)*args.n_iter*TQ_TILE; // cell
    char * const stage0 = stages + warp*cfg::n_stages*cfg::stage_bytes;
    const uint32_t stage0_address = (uint32_t) __cvta_generic_to_shared(stage0);

    tq_copier<k_row> k_copier(k_base + first*args.k_nb[0], args.k_nb[0], lane);
    tq_copier<v_row> v_copier(v_base + first*args.v_nb[0], args.v_nb[0], lane);
    // this lane's rows in a stage, of cells g and g + 8
    const int kx_at =  g     *k_row::pitch + ((uint32_t) (uintptr_t) (k_base + (first + g    )*args.k_nb[0]) & 15);
    const int ky_at = (g + 8)*k_row::pitch + ((uint32_t) (uintptr_t) (k_base + (first + g + 8)*args.k_nb[0]) & 15);
    const int vx_at =  g     *v_row::pitch + ((uint32_t) (uintptr_t) (v_base + (first + g    )*args.v_nb[0]) & 15) + TQ_TILE*k_row::pitch;
    const int vy_at = (g + 8)*v_row::pitch + ((uint32_t) (uintptr_t) (v_base + (first + g + 8)*args.v_nb[0]) & 15) + TQ_TILE*k_row::pitch;

    int n_iter = 0; // tiles of this warp
    if (first < args.n_kv) {
        n_iter = min(args.n_iter, (args.n_kv - first + TQ_TILE - 1)/TQ_TILE);
    }
    const auto issue = [&](int it) {
        if (it < n_iter) {
            const uint32_t dst = stage0_address + it % cfg::n_stages*cfg::stage_bytes;
            const int n_cells  = args.n_kv - first - it*TQ_TILE;
            k_copier.copy(dst,                        n_cells, lane);
            v_copier.copy(dst + TQ_TILE*k_row::pitch, n_cells, lane);
        }
        tq_copy_commit();
    };
#pragma unroll
    for (int it = 0; it < cfg::n_stages - 1; ++it) {
        issue(it);
    }

    // queries, rotated, as the operands of the steps: [row/8][block][s][lane][n]
    const float q_scale = args.cap != 0.0f ? args.scale/args.cap : args.scale*1.44269504f;
    for (int i = warp; i < n_rows*n_blocks; i += n_warps) {
        const int row = i / n_blocks;
        const int b   = i % n_blocks;
        float2 x = make_float2(0.0f, 0.0f);
        if (row < n_rows_used) {
            const float * q = tq_query(args, head, row0 + row, stream) + 64*b + lane;
            x = make_float2(q[0]*q_scale, q[32]*q_scale);
            if constexpr (centered) {
                x.x *= tq_center_scale(args.center, head, 64*b + lane,      2);
                x.y *= tq_center_scale(args.center, head, 64*b + lane + 32, 2);
            }
            x = tq_rht(x, args.k_codec.rotation, lane);
        }
        half * dst = q_shared + ((row/8*n_blocks + b)*4 + lane % 4)*128 + row % 8*16 + lane % 16/4;
        dst[lane/16*4    ] = __float2half_rn(x.x);
        dst[lane/16*4 + 8] = __float2half_rn(x.y);
        if constexpr (k_kind == TQ_KIND_QJL) {
            x = tq_scale(tq_rht(x, args.k_codec.sketch, lane), args.k_codec.kappa);
            dst += n_rows*D;
            dst[lane/16*4    ] = __float2half_rn(x.x);
            dst[lane/16*4 + 8] = __float2half_rn(x.y);
        }
    }

    if constexpr (centered) {
        centers.start(args, weights, row0, n_rows_used, head, stream, q_scale);
    }
    __syncthreads();

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

    // rows 2*j and 2*j + 1 of each eight are this lane's
    float slope[R8][2];
    int mask_at[R8][2]; // row of the mask
#pragma unroll
    for (int r = 0; r < R8; ++r) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const tq_row_place place = tq_place_of(args, head, min(row0 + 8*r + 2*j + e, group*args.n_q - 1));
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

    const half * mask = args.mask ? (const half *) ((const char *) args.mask + stream % args.mask_ne3*args.mask_nb3) + first + g : nullptr;

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

    const int32_t * pos = args.center.pos + (int64_t) stream*args.n_kv + first; // unless keys are not centered
    int span_first = 0;                                                        // position of a span's first cell, and of the next one's
    int span_next  = centered && n_iter > 0 ? pos[0] : 0;

    for (int it = 0; it < n_iter; ++it) {
        issue(it + cfg::n_stages - 1);

        // masks and positions are not looked at before scores are there
        uint16_t mask_of[R8][4];
        int p[2] = { 0, 0 };
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int  at    = it*TQ_TILE + 8*t;
            const bool valid = first + at + g < args.n_kv;
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
        if (centered && it % 4 == 0) {
            const int last = it == 0 ? INT_MIN : span_first;
            span_first = max(span_next, 0);
            centers.turn(args, weights, n_rows_used, span_first, last);
        }
        if (centered && it % 4 == 2 && it + 2 < n_iter) {
            span_next = pos[(it + 2)*TQ_TILE];
        }
        tq_copy_wait<cfg::n_stages - 1>();
        __syncwarp();
        const char * stage = stage0 + it % cfg::n_stages*cfg::stage_bytes;
        const char * kx = stage + kx_at;
        const char * ky = stage + ky_at;
        const char * vx = stage + vx_at;
        const char * vy = stage + vy_at;

        float center[R8][4];
        if constexpr (centered) {
            centers.template score<R8>(it % 4, center);
        }
        bool  seen[R8][4];
        float s[R8][4];
#pragma unroll
        for (int r = 0; r < R8; ++r) {
            s[r][0] = s[r][1] = s[r][2] = s[r][3] = 0.0f;
        }
#pragma unroll
        for (int b = 0; b < n_blocks; ++b) {
            constexpr int size = k_row::block;
            const tq_words w = tq_read_block<k_kind, k_bits>(kx + b*size, ky + b*size, j);
            const tq_pair_signs signs = tq_signs_of_keys(w.signs);
            float acc[R8][4] = {};
#pragma unroll
            for (int st = 0; st < 4; ++st) {
                uint32_t a[4];
                tq_key_operand<k_kind>(table, lane_offset, w, signs, st, a);
#pragma unroll
                for (int r = 0; r < R8; ++r) {
                    const int   i = (r*n_blocks + b)*4 + st;
                    const uint2 q = cfg::q_in_registers ? q_frag[cfg::q_in_registers ? i : 0] : q_at[32*i];
                    tq_mma(acc[r], a, q.x, q.y);
                }
                if constexpr (k_kind == TQ_KIND_QJL) {
                    tq_sketch_operand(signs, st, a);
#pragma unroll
                    for (int r = 0; r < R8; ++r) {
                        const int   i = (r*n_blocks + b)*4 + st;
                        const uint2 f = cfg::q_in_registers ? f_frag[cfg::q_in_registers ? i : 0] : q_at[32*(i + R8*n_blocks*4)];
                        tq_mma(acc[r], a, f.x, f.y);
                    }
                }
            }
            const float dx = tq_read_scale(kx + b*size);
            const float dy = tq_read_scale(ky + b*size);
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                s[r][0] += dx*acc[r][0];
                s[r][1] += dx*acc[r][1];
                s[r][2] += dy*acc[r][2];
                s[r][3] += dy*acc[r][3];
            }
        }

#pragma unroll
        for (int r = 0; r < R8; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                seen[r][i] = mask_of[r][i] != 0xfc00;
            }
        }
        if constexpr (centered) {
            if (!centers.template in_order<R8>(p, span_first, it % 4, seen)) {
                centers.template score_any<R8>(args, weights, p, center);
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                if (p[t] <= 0) { // position 0 has a center of its own
#pragma unroll
                    for (int r = 0; r < R8; ++r) {
                        center[r][2*t    ] = centers.first(weights, 8*r + 2*j);
                        center[r][2*t + 1] = centers.first(weights, 8*r + 2*j + 1);
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
        float dx[n_blocks], dy[n_blocks];
#pragma unroll
        for (int b = 0; b < n_blocks; ++b) {
            constexpr int size = v_row::block;
            dx[b] = tq_read_scale(vx + b*size);
            dy[b] = tq_read_scale(vy + b*size);
            raise |= fmaxf(dx[b], dy[b]) > 8.0f*d_ref;
        }
        if (__any_sync(TQ_WARP, raise)) { // rare after the first tiles
            float d_max = d_ref;
#pragma unroll
            for (int b = 0; b < n_blocks; ++b) {
                d_max = fmaxf(d_max, fmaxf(dx[b], dy[b]));
            }
            d_max = tq_max_of_cells(d_max); // the same in all j
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
            const tq_words w = tq_read_block<v_kind, v_bits>(vx + b*size, vy + b*size, j);
            // weights of cells, times their scales
            uint32_t p0[R8], p1[R8];
            const float ex = dx[b]*d_inv;
            const float ey = dy[b]*d_inv;
#pragma unroll
            for (int r = 0; r < R8; ++r) {
                p0[r] = tq_transpose(tq_pack(s[r][0] == 0.0f ? 0.0f : s[r][0]*ex, s[r][1] == 0.0f ? 0.0f : s[r][1]*ex));
                p1[r] = tq_transpose(tq_pack(s[r][2] == 0.0f ? 0.0f : s[r][2]*ey, s[r][3] == 0.0f ? 0.0f : s[r][3]*ey));
            }
            uint32_t signs_ab = 0;
            uint32_t signs_cd = 0;
            if constexpr (v_kind == TQ_KIND_TCQ) {
                signs_ab = tq_transpose(__byte_perm(w.signs, 0, 0x1010)) >> (g & 1);
                signs_cd = tq_transpose(__byte_perm(w.signs, 0, 0x3232)) >> (g & 1);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const tq_value_pairs pairs = tq_pairs_of_values(
                    tq_transpose(tq_both_low (w.codes[2*h], w.codes[2*h + 1])),
                    tq_transpose(tq_both_high(w.codes[2*h], w.codes[2*h + 1])));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    uint32_t a[4];
                    tq_value_operand<v_kind>(table, lane_offset, pairs, signs_ab, signs_cd, h, i, a);
#pragma unroll
                    for (int r = 0; r < R8; ++r) {
                        tq_mma(o[r][4*b + 2*h + i], a, p0[r], p1[r]);
                    }
                }
            }
        }
        __syncwarp();
    }
    tq_copy_wait<0>();

    // the warps' parts become one
    __syncthreads();
    float  * merge_l = (float *) shared;                   // [n_warps][n_rows]
    float4 * merge_o = (float4 *) (merge_l + n_warps*n_rows); // [n_warps][R8][n_blocks*4][32]
    if (g == 0) {
#pragma unroll
        for (int r = 0; r < R8; ++r) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                atomicMax(&merge_top[8*r + 2*j + e], tq_ordered(m[r][e]));
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R8; ++r) {
        float down[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            down[e] = tq_exp2(m[r][e] - tq_unordered(merge_top[8*r + 2*j + e]));
            l[r][e] = tq_sum_of_cells(l[r][e]);
            if (g == 0) {
                merge_l[warp*n_rows + 8*r + 2*j + e] = l[r][e]*down[e];
            }
            down[e] *= d_ref;
        }
#pragma unroll
        for (int i = 0; i < n_blocks*4; ++i) {
            merge_o[((warp*R8 + r)*n_blocks*4 + i)*32 + lane] =
                make_float4(o[r][i][0]*down[0], o[r][i][1]*down[1], o[r][i][2]*down[0], o[r][i][3]*down[1]);
        }
    }
    __syncthreads();
    const auto part_of = [&](int row) { // of the output
        const tq_row_place place = tq_place_of(args, head, row0 + row);
        return (((int64_t) stream*args.n_q + place.query)*args.n_head + place.head)*args.n_splits + split;
    };
    for (int i = threadIdx.x; i < R8*n_blocks*4*32; i += 32*n_warps) { // 32*n_warps is a multiple of 32: the lane stays the same
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < n_warps; ++w) {
            const float4 x = merge_o[w*R8*n_blocks*4*32 + i];
            sum.x += x.x;
            sum.y += x.y;
            sum.z += x.z;
            sum.w += x.w;
        }
        const int tile = i / 32 % (n_blocks*4); // block, half step, coordinates 4*n, n = 2*(tile % 2) and one more
        const int row  = i / 32 / (n_blocks*4)*8 + 2*j;
        const int x    = tile/4*64 + 16*(g >> 1) + 8*(tile % 2) + 2*(tile / 2 % 2) + (g & 1);
        if (row < n_rows_used) {
            float * dst = args.part_o + part_of(row)*D + x;
            dst[0] = sum.x;
            dst[4] = sum.z;
        }
        if (row + 1 < n_rows_used) {
            float * dst = args.part_o + part_of(row + 1)*D + x;
            dst[0] = sum.y;
            dst[4] = sum.w;
        }
    }
    if (threadIdx.x < n_rows_used) {
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < n_warps; ++w) {
            all += merge_l[w*n_rows + threadIdx.x];
        }
        args.part_ml[part_of(threadIdx.x)] = make_float2(tq_unordered(merge_top[threadIdx.x]), all);
    }

    // the last of the blocks with these rows combines them
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int * n_done = args.n_done + blockIdx.z*gridDim.x + blockIdx.x;
        is_last = atomicAdd(n_done, 1) == args.n_splits - 1;
        if (is_last) {
            *n_done = 0;
        }
    }
    ggml_cuda_pdl_lc();
    __syncthreads();
    if (!is_last) {
        return;
    }
    __threadfence();
    for (int i = warp; i < n_rows_used*n_blocks; i += n_warps) { // a warp a block of 64
        const int row = i / n_blocks;
        const int64_t part = part_of(row) - split;
        const float sink = args.sinks ? args.sinks[tq_place_of(args, head, row0 + row).head]*1.44269504f : -INFINITY;
        const float2 o = tq_combine<D>(args.part_o + part*D + i % n_blocks*64 + lane, args.part_ml + part, args.n_splits, sink);
        const float2 x = tq_rht_inverse(o, args.v_codec.rotation, lane);
        float * dst = args.dst + part/args.n_splits*D + i % n_blocks*64 + lane;
        dst[ 0] = x.x;
        dst[32] = x.y;
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
}

// what a launch of one instance needs
struct tq_attention_kernel {
    void (*launch)(const tq_attention_args & args, dim3 grid, cudaStream_t stream);
    int n_warps, n_rows, shared_bytes, center_bytes; // center_bytes: of shared memory, more for centered keys
};

template <int D, int R8, tq_kind k_kind, int k_bits, tq_kind v_kind, int v_bits>
static tq_attention_kernel tq_attention_instance() {
    using cfg = tq_attention_config<D, R8, k_kind, k_bits, v_kind, v_bits>;
    return { [](const tq_attention_args & args, dim3 grid, cudaStream_t stream) {
        if (args.center.pos) {
            constexpr int shared_bytes = cfg::shared_bytes + cfg::center_bytes;
            const auto kernel = tq_attention_parts<D, R8, k_kind, k_bits, v_kind, v_bits, true>;
            CUDA_SET_SHARED_MEMORY_LIMIT(kernel, shared_bytes);
            ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(32*cfg::n_warps), (size_t) shared_bytes, stream), args);
        } else {
            constexpr int shared_bytes = cfg::shared_bytes;
            const auto kernel = tq_attention_parts<D, R8, k_kind, k_bits, v_kind, v_bits, false>;
            CUDA_SET_SHARED_MEMORY_LIMIT(kernel, shared_bytes);
            ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(32*cfg::n_warps), (size_t) shared_bytes, stream), args);
        }
    }, cfg::n_warps, cfg::n_rows, cfg::shared_bytes, cfg::center_bytes };
}

// the instances of a key type and a kind of value types; { nullptr, ... } where there is none
template <tq_kind k_kind, int k_bits, tq_kind v_kind> tq_attention_kernel tq_attention_find(int v_bits, int head_dim, int n_rows);
