#pragma once

// One block of 64 coordinates in the registers of one warp: lane l holds coordinates l (.x) and l + 32 (.y), so that a bit
// plane is two ballots. Sections are those of docs/format.md. Nothing here knows ggml.
//
// Encoders must agree with the C library to the bit: compile with -fmad=false and without -use_fast_math.

#include "tq-codec.h"

#include <cfloat>
#include <cmath>
#include <cstdint>

#define TQ_WARP 0xffffffffu

#ifdef __CUDACC__
#include <cuda_fp16.h>

static __device__ __forceinline__ float    tq_half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
static __device__ __forceinline__ uint16_t tq_float_to_half(float    f) { return __half_as_ushort(__float2half_rn(f)); }
static __device__ __forceinline__ float    tq_saturate     (float    f) { return __saturatef(f); }
#else
#include "warp.h" // tests/cuda: a warp in plain C++
#endif

template <int bits> static constexpr int tq_block_bytes = 2 + 8*bits;

//
// section 3
//

static __device__ __forceinline__ float2 tq_flip(float2 v, uint64_t signs, int lane) {
    v.x = (signs >>  lane      ) & 1 ? -v.x : v.x;
    v.y = (signs >> (lane + 32)) & 1 ? -v.y : v.y;
    return v;
}

static __device__ __forceinline__ float2 tq_scale(float2 v, float s) {
    return make_float2(v.x*s, v.y*s);
}

static __device__ __forceinline__ float2 tq_fwht(float2 v, int lane) {
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        const float x = __shfl_xor_sync(TQ_WARP, v.x, h);
        const float y = __shfl_xor_sync(TQ_WARP, v.y, h);
        v.x = lane & h ? x - v.x : v.x + x;
        v.y = lane & h ? y - v.y : v.y + y;
    }
    return make_float2(v.x + v.y, v.x - v.y);
}

static __device__ __forceinline__ float2 tq_rht(float2 v, uint64_t signs, int lane) {
    return tq_scale(tq_fwht(tq_flip(v, signs, lane), lane), 0.125f);
}

static __device__ __forceinline__ float2 tq_rht_inverse(float2 v, uint64_t signs, int lane) {
    return tq_flip(tq_scale(tq_fwht(v, lane), 0.125f), signs, lane);
}

// sum(a[i]*b[i]) in the tree of the format; every lane gets it
static __device__ __forceinline__ float tq_sum_of_products(float2 a, float2 b) {
    float s = a.x*b.x + a.y*b.y;
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        s += __shfl_xor_sync(TQ_WARP, s, h);
    }
    return s;
}

static __device__ __forceinline__ uint32_t tq_warp_max(uint32_t v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(TQ_WARP, v);
#else
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        v = max(v, __shfl_xor_sync(TQ_WARP, v, h));
    }
    return v;
#endif
}

//
// codes
//

// the table is read often and by lanes that disagree: it is in shared memory
static __device__ __forceinline__ float2 tq_look_up(const float * table, int x, int y) {
    return make_float2(table[x], table[y]);
}

// q + kappa*unsketch(+-1), -1 where a bit is set
static __device__ __forceinline__ float2 tq_add_sketch(const tq_codec & c, float2 q, bool x, bool y, int lane) {
    const float2 z = tq_rht_inverse(make_float2(x ? -1.0f : 1.0f, y ? -1.0f : 1.0f), c.sketch, lane);
    return make_float2(q.x + c.kappa*z.x, q.y + c.kappa*z.y);
}

// of a register (section 9)
template <int bits> static constexpr __host__ __device__ int tq_label(int reg) {
    constexpr int taps[3][4] = { TQ_TRELLIS_TAPS_2B, TQ_TRELLIS_TAPS_3B, TQ_TRELLIS_TAPS_4B };
    int label = 0;
    for (int k = 0; k < 4; ++k) {
        int parity = 0;
        for (int i = 0; i < 6; ++i) {
            parity ^= taps[bits - 2][k] >> i & 1 ? reg >> i : 0;
        }
        label |= (parity & 1) << k;
    }
    return label;
}

//
// section 5
//

// register of coordinate i: bit k is bit i - k of the plane of coded bits
static __device__ __forceinline__ int tq_register(uint64_t coded_reversed, int i) {
    const int shift = 63 - i;
    return (int) ((coded_reversed >> shift | coded_reversed << 1 << (63 - shift)) & 63);
}

//
// section 4
//

// u of steps 1 to 4; numbers, if of no use, where the block is empty
struct tq_unit {
    float2   u;
    float    g;
    float    up;   // 2^e
    uint16_t d;    // if empty: the scale of a block without codes, 0 or NaN
    bool     empty;
};

static __device__ __forceinline__ tq_unit tq_normalize(const tq_codec & c, float2 x, int lane) {
    tq_unit r;
    const bool     finite = __all_sync(TQ_WARP, fabsf(x.x) <= FLT_MAX && fabsf(x.y) <= FLT_MAX);
    const uint32_t amax   = tq_warp_max(__float_as_uint(fmaxf(fabsf(x.x), fabsf(x.y))));
    r.empty = !finite || amax < __float_as_uint(0x1p-60f);
    r.d     = finite ? 0 : 0x7e00;
    const int e = r.empty ? 0 : min((int) (amax >> 23) - 127, 126);
    r.up = __uint_as_float((uint32_t) (127 + e) << 23);
    x = r.empty ? make_float2(1.0f, 1.0f) : tq_scale(x, __uint_as_float((uint32_t) (127 - e) << 23));
    const float2 y = tq_rht(x, c.rotation, lane);
    r.g = 8.0f/sqrtf(tq_sum_of_products(y, y));
    r.u = tq_scale(y, r.g);
    return r;
}

// the codes of one lane's two coordinates, all planes, and what they decode to
struct tq_codes {
    uint32_t x, y;
    float2   q;
};

template <tq_kind kind, int bits>
static __device__ __forceinline__ tq_codes tq_quantize(const tq_codec & c, const float * table, float2 u, int lane) {
    constexpr int code_bits = kind == TQ_KIND_MSE ? bits : bits - 1;
    tq_codes r = { 0, 0, { 0.0f, 0.0f } };
#pragma unroll
    for (int k = 0; k < (1 << code_bits) - 1; ++k) {
        r.x += u.x > c.thresholds[k];
        r.y += u.y > c.thresholds[k];
    }
    r.q = tq_look_up(table, r.x, r.y);
    if (kind == TQ_KIND_QJL) {
        const float2 w = tq_rht(make_float2(u.x - r.q.x, u.y - r.q.y), c.sketch, lane);
        r.q  = tq_add_sketch(c, r.q, w.x < 0.0f, w.y < 0.0f, lane);
        r.x |= (uint32_t) (w.x < 0.0f) << code_bits;
        r.y |= (uint32_t) (w.y < 0.0f) << code_bits;
    }
    return r;
}

static __device__ __forceinline__ uint16_t tq_scale_bits(float d) {
    return d >= 65504.0f ? 0x7bff : tq_float_to_half(d);
}

// steps 7 and 8 and the block's bytes: halfword lane of it, for lanes that have one. quality is that of section 9.
template <tq_kind kind, int bits>
static __device__ __forceinline__ uint16_t tq_halfword(const tq_unit & n, const tq_codes & codes, float & quality, int lane) {
    const float uq = tq_sum_of_products(n.u, codes.q);
    const float uu = kind == TQ_KIND_MSE ? 0.0f : tq_sum_of_products(n.u, n.u);
    const float qq = kind == TQ_KIND_QJL ? 0.0f : tq_sum_of_products(codes.q, codes.q);
    const float s  = !(uq > 0.0f) ? 0.0f : kind == TQ_KIND_MSE ? uq/qq : uu/uq;
    const uint16_t d = n.empty ? n.d : tq_scale_bits(s/n.g*n.up);
    quality = kind == TQ_KIND_TCQ ? uq/sqrtf(qq) : 0.0f;
    const bool zero = n.empty || d == 0;
    uint16_t half = d; // lane 0 has the scale, lane 1 + 4*p + h halfword h of plane p
#pragma unroll
    for (int p = 0; p < bits; ++p) {
        const uint32_t lo = __ballot_sync(TQ_WARP, (codes.x >> p) & 1);
        const uint32_t hi = __ballot_sync(TQ_WARP, (codes.y >> p) & 1);
        const int h = lane - 1 - 4*p;
        if (h >= 0 && h < 4) {
            half = zero ? 0 : (uint16_t) ((h < 2 ? lo : hi) >> 16*(h & 1));
        }
    }
    return half;
}

// block is 2-byte aligned
template <int bits>
static __device__ __forceinline__ void tq_store_block(uint16_t half, void * block, int lane) {
    if (lane < 1 + 4*bits) {
        ((uint16_t *) block)[lane] = half;
    }
}

//
// section 9: the encoder's search, lane = state
//
// It takes as long as its chain of shuffles. So two coordinates are one step: a lane gets the costs of four states, and computes
// the two between by itself; sums and comparisons are those of the format. The coded bits of a path move along with its cost,
// beside that chain, so nothing is traced back.
//

#define TQ_N_MULTIPLES 5

static __device__ __forceinline__ float tq_multiple(int k) {
    return k == 0 ? 0.85214379f : k == 1 ? 0.92311635f : k == 2 ? 1.0f : k == 3 ? 1.08328707f : 1.17351087f;
}

// shared memory of a warp that searches
template <int bits> struct tq_search {
    static constexpr int free_bits = bits - 1;
    static constexpr int n_labels  = 32 >> free_bits;
    static constexpr int flip16    = tq_label<bits>(16); // between labels of registers r and r + 16
    static constexpr int flip32    = tq_label<bits>(32);
    float2 dist[64*n_labels]; // of a coordinate to labels l and l ^ flip32
    float  v[64];
};

// what a lane, s, of a search needs besides the coordinates
template <int bits> struct tq_searcher {
    static constexpr int n_free   = 1 << (bits - 1);
    static constexpr int n_labels = tq_search<bits>::n_labels;
    // distances of coordinate 0
    const float2 * between;   // registers s/2      and s/2 + 32, which lead to state s/2
    const float2 * between16; // registers s/2 + 16 and s/2 + 48, which lead to state s/2 + 16
    const float2 * last;      // registers s        and s + 32
    // the label to which the lane measures distances, those of every 32/n_labels-th coordinate
    const float * v;
    float *       dist;
    float *       dist32;     // as a label's ^ flip32
    float         level[n_free];
};

template <int bits>
static __device__ __forceinline__ tq_searcher<bits> tq_prepare(tq_search<bits> & search, const float * table, int lane) {
    constexpr int n_labels = tq_search<bits>::n_labels;
    const int label = tq_label<bits>(lane >> 1);
    const int own   = lane % n_labels;
    const int first = lane / n_labels;
    tq_searcher<bits> r;
    r.between   = search.dist + label;
    r.between16 = search.dist + (label ^ tq_search<bits>::flip16);
    r.last      = search.dist + tq_label<bits>(lane);
    r.v         = search.v + first;
    r.dist      = &search.dist[first*n_labels + own].x;
    r.dist32    = &search.dist[first*n_labels + (own ^ tq_search<bits>::flip32)].y;
#pragma unroll
    for (int w = 0; w < r.n_free; ++w) {
        r.level[w] = table[own*r.n_free + w];
    }
    return r;
}

// Distances of every coordinate to every label: the least square is the square of the least.
template <int bits>
static __device__ __forceinline__ void tq_measure(const tq_searcher<bits> & at) {
    constexpr int n = 64*tq_searcher<bits>::n_labels/32; // coordinates of a lane
#pragma unroll 1
    for (int j = 0; j < n; j += 8) {
        float v[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            v[k] = at.v[(j + k)*(64/n)];
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float least = fabsf(v[k] - at.level[0]);
#pragma unroll
            for (int w = 1; w < at.n_free; ++w) {
                least = fminf(least, fabsf(v[k] - at.level[w]));
            }
            at.dist  [(j + k)*64] = least*least; // 32 pairs further
            at.dist32[(j + k)*64] = least*least;
        }
    }
}

// Coordinates i and i + 1 of a run: a lane's cost, and the state before them that its path comes from.
template <int bits>
static __device__ __forceinline__ int tq_two_steps(const tq_searcher<bits> & at, int i, float & cost, int lane) {
    using search = tq_search<bits>;
    const float2 d0 = at.between[i*search::n_labels];
    const float2 d1 = search::flip16 ? at.between16[i*search::n_labels] : d0;
    const float2 d  = at.last[(i + 1)*search::n_labels];
    const int    k  = lane >> 2;
    const float a0 = __shfl_sync(TQ_WARP, cost, k)      + d0.x;
    const float b0 = __shfl_sync(TQ_WARP, cost, k + 16) + d0.y;
    const float a1 = __shfl_sync(TQ_WARP, cost, k + 8)  + d1.x;
    const float b1 = __shfl_sync(TQ_WARP, cost, k + 24) + d1.y;
    const float a  = fminf(a0, b0) + d.x;
    const float b  = fminf(a1, b1) + d.y;
    cost = fminf(a, b);
    const int from0 = b0 < a0 ? k + 16 : k;
    const int from1 = b1 < a1 ? k + 24 : k + 8;
    return b < a ? from1 : from0;
}

// from a path that ends in a lane's state to the two coded bits that left the register
static __device__ __forceinline__ uint32_t tq_extend(uint32_t path, int from) {
    return __shfl_sync(TQ_WARP, path, from) << 2 | (uint32_t) from >> 3;
}

// the first lane of least value, which is not negative
static __device__ __forceinline__ int tq_first_least(float v) {
    const uint32_t order = ~__float_as_uint(v);
    return __ffs(__ballot_sync(TQ_WARP, order == tq_warp_max(order))) - 1;
}

// the free bits that gave dist
template <int bits>
static __device__ __forceinline__ int tq_free_bits(const float * table, int label, float v) {
    constexpr int n = 1 << (bits - 1);
    int   best = 0;
    float least = 0.0f;
#pragma unroll
    for (int w = 0; w < n; ++w) {
        const float d = v - table[label*n + w];
        if (w == 0 || d*d < least) {
            least = d*d;
            best  = w;
        }
    }
    return best;
}

// the codes of a path
template <int bits>
static __device__ __forceinline__ tq_codes tq_codes_of_path(const float * table, float2 v, uint64_t coded_reversed, int lane) {
    constexpr int free_bits = bits - 1;
    constexpr int n_free    = 1 << free_bits;
    const int reg_x = tq_register(coded_reversed, lane);
    const int reg_y = tq_register(coded_reversed, lane + 32);
    const int label_x = tq_label<bits>(reg_x);
    const int label_y = tq_label<bits>(reg_y);
    const int w_x = tq_free_bits<bits>(table, label_x, v.x);
    const int w_y = tq_free_bits<bits>(table, label_y, v.y);
    tq_codes r;
    r.q = tq_look_up(table, label_x*n_free + w_x, label_y*n_free + w_y);
    r.x = (uint32_t) (w_x | (reg_x & 1) << free_bits);
    r.y = (uint32_t) (w_y | (reg_y & 1) << free_bits);
    return r;
}

// the path of one multiple
template <int bits>
static __device__ __forceinline__ tq_codes tq_path(const float * table, float2 u, float multiple,
        tq_search<bits> & search, const tq_searcher<bits> & at, int lane) {
    const float2 v = tq_scale(u, multiple);
    search.v[lane]      = v.x;
    search.v[lane + 32] = v.y;
    __syncwarp();
    tq_measure<bits>(at);
    __syncwarp();

    // Four runs of half a block: 32 ... 63 and 0 ... 31 from all states find the seam, 0 ... 31 and 32 ... 63 from there the
    // path. They are one loop, so that its instructions are soon in caches. A path is extended a step late: costs go first.
    float    cost = 0.0f;
    uint32_t path = 0; // bits that left the register; those of a run begin with the state before it
    int      from = lane;
    uint32_t path_x = 0;
    int      from_x = 0;
    int      seam = 0;
#pragma unroll 1
    for (int r = 0; r < 4; ++r) {
        if (r == 2) {
            seam = (int) (__shfl_sync(TQ_WARP, tq_extend(path, from), tq_first_least(cost)) >> 27);
            cost = lane == seam ? 0.0f : INFINITY;
        }
        path_x = path;
        from_x = from;
        const int first = r == 0 || r == 3 ? 32 : 0;
#pragma unroll 8
        for (int i = 0; i < 32; i += 2) {
            const int next = tq_two_steps<bits>(at, first + i, cost, lane);
            path = tq_extend(path, from);
            from = next;
        }
    }
    const uint32_t path_y = __shfl_sync(TQ_WARP, tq_extend(path, from), seam);
    path_x = __shfl_sync(TQ_WARP, tq_extend(path_x, from_x), path_y >> 27);
    const uint64_t coded_reversed = ((uint64_t) path_x << 32 | path_y) << 5 | (uint64_t) seam;

    return tq_codes_of_path<bits>(table, v, coded_reversed, lane);
}

// the first of the best
static __device__ __forceinline__ int tq_best(const float * quality) {
    int   best = 0;
    float most = quality[0];
#pragma unroll
    for (int k = 1; k < TQ_N_MULTIPLES; ++k) {
        const float q = quality[k];
        best = q > most ? k : best;
        most = q > most ? q : most;
    }
    return best;
}

//
// section 10
//

// where rows of keys are centered; pos is nullptr where they are not
struct tq_key_center {
    const int32_t * pos;
    const float   * centers;  // [head_dim, n_head_kv, 4]: centers, scales, 1/scales, those of position 0
    const float   * table;    // [n_rot, 768]
    int             head_dim;
    int             n_rot;
    bool            neox;
    int             n_head;
};

// the scale of coordinate i of a head (plane 1), or its reciprocal (plane 2)
static __device__ __forceinline__ float tq_center_scale(const tq_key_center & c, int head, int i, int plane) {
    return c.centers[((int64_t) plane*c.n_head + head)*c.head_dim + i];
}

// cosine and sine of a pair's angle at position p, as in a cell that is empty where it is negative
static __device__ __forceinline__ float2 tq_center_turn(const tq_key_center & c, int pair, int p) {
    p = max(p, 0);
    const int digits[3] = { p & 255, (p >> 8) & 255, (p >> 16) & 255 };
    const int n_pairs = c.n_rot/2;
    const float * row = c.table + (int64_t) digits[0]*c.n_rot + pair;
    float cs = row[0];
    float sn = row[n_pairs];
#pragma unroll
    for (int k = 1; k < 3; ++k) {
        if (digits[k] != 0) {
            row = c.table + (int64_t) (256*k + digits[k])*c.n_rot + pair;
            const float ck = row[0];
            const float sk = row[n_pairs];
            const float cn = cs*ck - sn*sk;
            sn = cs*sk + sn*ck;
            cs = cn;
        }
    }
    return make_float2(cs, sn);
}

// X_p(m) at coordinate i of a head
static __device__ __forceinline__ float tq_center_at(const tq_key_center & c, int head, int i, int p) {
    const float * m = c.centers + ((int64_t) (p > 0 ? 0 : 3)*c.n_head + head)*c.head_dim;
    if (i >= c.n_rot) {
        return m[i];
    }
    const int  n_pairs = c.n_rot/2;
    const int  pair    = c.neox ? i % n_pairs : i/2;
    const bool second  = c.neox ? i >= n_pairs : i & 1;
    const int  a       = c.neox ? pair : 2*pair;
    const int  b       = c.neox ? pair + n_pairs : 2*pair + 1;
    const float2 turn  = tq_center_turn(c, pair, p);
    return second ? m[a]*turn.y + m[b]*turn.x : m[a]*turn.x - m[b]*turn.y;
}
