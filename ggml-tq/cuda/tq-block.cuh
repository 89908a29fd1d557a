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

static __device__ __forceinline__ int tq_label(const tq_codec & c, int reg) {
    int label = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        label |= (__popc(c.taps[k] & reg) & 1) << k;
    }
    return label;
}

//
// section 5
//

// bits 16*half .. 16*half + 15 of plane p are halfword 1 + 4*p + half of a block
static __device__ __forceinline__ int tq_plane_bit(const uint16_t * block, int p, int i) {
    return (block[1 + 4*p + i/16] >> i%16) & 1;
}

// register of coordinate i: bit k is bit i - k of the plane of coded bits
static __device__ __forceinline__ int tq_register(uint64_t coded_reversed, int i) {
    const int shift = 63 - i;
    return (int) ((coded_reversed >> shift | coded_reversed << 1 << (63 - shift)) & 63);
}

// block is 2-byte aligned
template <tq_kind kind, int bits>
static __device__ __forceinline__ float2 tq_decode_block(const tq_codec & c, const float * table, const uint16_t * block, int lane) {
    constexpr int code_bits = kind == TQ_KIND_MSE ? bits : bits - 1;
    int x = 0;
    int y = 0;
#pragma unroll
    for (int p = 0; p < code_bits; ++p) {
        x |= tq_plane_bit(block, p, lane)      << p;
        y |= tq_plane_bit(block, p, lane + 32) << p;
    }
    if (kind == TQ_KIND_TCQ) {
        const uint16_t * plane = block + 1 + 4*code_bits;
        const uint64_t   coded = __brevll((uint64_t) plane[0] | (uint64_t) plane[1] << 16 | (uint64_t) plane[2] << 32 | (uint64_t) plane[3] << 48);
        x |= tq_label(c, tq_register(coded, lane))      << code_bits;
        y |= tq_label(c, tq_register(coded, lane + 32)) << code_bits;
    }
    float2 v = tq_look_up(table, x, y);
    if (kind == TQ_KIND_QJL) {
        v = tq_add_sketch(c, v, tq_plane_bit(block, code_bits, lane), tq_plane_bit(block, code_bits, lane + 32), lane);
    }
    return tq_rht_inverse(tq_scale(v, tq_half_to_float(block[0])), c.rotation, lane);
}

//
// section 4
//

// u of steps 1 to 4
struct tq_unit {
    float2   u;
    float    g;
    float    up;   // 2^e
    uint16_t d;    // if empty: the scale of a block without codes, 0 or NaN
    bool     empty;
};

static __device__ __forceinline__ tq_unit tq_normalize(const tq_codec & c, float2 x, int lane) {
    tq_unit r;
    r.d = 0;
    float amax = fmaxf(fabsf(x.x), fabsf(x.y)); // drops a NaN
    const bool finite = __all_sync(TQ_WARP, fabsf(x.x) <= FLT_MAX && fabsf(x.y) <= FLT_MAX);
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(TQ_WARP, amax, h));
    }
    r.empty = !finite || amax < 0x1p-60f;
    if (r.empty) {
        r.d = finite ? 0 : 0x7e00;
        return r;
    }
    const int e = min((int) (__float_as_uint(amax) >> 23) - 127, 126);
    r.up = __uint_as_float((uint32_t) (127 + e) << 23);
    const float2 y = tq_rht(tq_scale(x, __uint_as_float((uint32_t) (127 - e) << 23)), c.rotation, lane);
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

// steps 7 and 8, and the block's bytes; block is 2-byte aligned
template <tq_kind kind, int bits>
static __device__ __forceinline__ void tq_store_block(const tq_unit & n, const tq_codes & codes, uint16_t * block, int lane) {
    uint16_t d = n.d;
    if (!n.empty) {
        const float uq = tq_sum_of_products(n.u, codes.q);
        const float s  = !(uq > 0.0f) ? 0.0f : kind == TQ_KIND_MSE ? uq/tq_sum_of_products(codes.q, codes.q) : tq_sum_of_products(n.u, n.u)/uq;
        d = tq_scale_bits(s/n.g*n.up);
    }
    const bool zero = n.empty || d == 0;
    uint16_t half = d; // lane 0 writes the scale, lane 1 + 4*p + h halfword h of plane p
#pragma unroll
    for (int p = 0; p < bits; ++p) {
        const uint32_t lo = __ballot_sync(TQ_WARP, (codes.x >> p) & 1);
        const uint32_t hi = __ballot_sync(TQ_WARP, (codes.y >> p) & 1);
        const int h = lane - 1 - 4*p;
        if (h >= 0 && h < 4) {
            half = zero ? 0 : (uint16_t) ((h < 2 ? lo : hi) >> 16*(h & 1));
        }
    }
    if (lane < 1 + 4*bits) {
        block[lane] = half;
    }
}

//
// section 9: the encoder's search, lane = state
//

#define TQ_N_MULTIPLES 5

static __device__ __forceinline__ float tq_multiple(int k) {
    return k == 0 ? 0.85214379f : k == 1 ? 0.92311635f : k == 2 ? 1.0f : k == 3 ? 1.08328707f : 1.17351087f;
}

// shared memory of a warp that searches
template <int bits> struct tq_search {
    static constexpr int free_bits = bits - 1;
    static constexpr int n_labels  = 32 >> free_bits;
    float v[64];
    float dist[64*n_labels];
};

// one coordinate of a run: the lane's new cost, and for all states a bit: whether its register is s + 32
static __device__ __forceinline__ uint32_t tq_step(float & cost, float dist0, float dist1, int lane) {
    const float a = __shfl_sync(TQ_WARP, cost, lane >> 1)        + dist0;
    const float b = __shfl_sync(TQ_WARP, cost, (lane >> 1) + 16) + dist1;
    cost = b < a ? b : a;
    return __ballot_sync(TQ_WARP, b < a);
}

// the register that leads into state, and in state the one before it
static __device__ __forceinline__ int tq_back(uint32_t word, int & state) {
    const int reg = state | (int) ((word >> state) & 1) << 5;
    state = reg >> 1;
    return reg;
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

// the path of one multiple; quality is that of step 4
template <int bits>
static __device__ __forceinline__ tq_codes tq_path(const tq_codec & c, const float * table, float2 u, float multiple,
        tq_search<bits> & search, float & quality, int lane) {
    constexpr int free_bits = tq_search<bits>::free_bits;
    constexpr int n_labels  = tq_search<bits>::n_labels;
    constexpr int n_free    = 1 << free_bits;

    const float2 v = tq_scale(u, multiple);
    search.v[lane]      = v.x;
    search.v[lane + 32] = v.y;
    __syncwarp();

    // dist of every coordinate and label; a lane stays with one label
    const int own = lane % n_labels;
    float row[n_free];
#pragma unroll
    for (int w = 0; w < n_free; ++w) {
        row[w] = table[own*n_free + w];
    }
    for (int i = lane/n_labels; i < 64; i += 32/n_labels) {
        float least = 0.0f;
#pragma unroll
        for (int w = 0; w < n_free; ++w) {
            const float d = search.v[i] - row[w];
            least = w == 0 || d*d < least ? d*d : least;
        }
        search.dist[i*n_labels + own] = least;
    }
    __syncwarp();

    const float * dist0 = search.dist + tq_label(c, lane);
    const float * dist1 = search.dist + tq_label(c, lane + 32);

    // the seam; lane i keeps the word of coordinate i
    float    cost = 0.0f;
    uint32_t back_x = 0;
    uint32_t back_y = 0;
#pragma unroll 8
    for (int i = 32; i < 64; ++i) {
        tq_step(cost, dist0[i*n_labels], dist1[i*n_labels], lane);
    }
#pragma unroll 8
    for (int i = 0; i < 32; ++i) {
        const uint32_t word = tq_step(cost, dist0[i*n_labels], dist1[i*n_labels], lane);
        back_x = lane == i ? word : back_x;
    }
    float least = cost;
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        least = fminf(least, __shfl_xor_sync(TQ_WARP, least, h));
    }
    int seam = __ffs(__ballot_sync(TQ_WARP, cost == least)) - 1;
    for (int i = 31; i >= 0; --i) {
        tq_back(__shfl_sync(TQ_WARP, back_x, i), seam);
    }

    // the path through the seam
    cost = lane == seam ? 0.0f : INFINITY;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) {
        const uint32_t word = tq_step(cost, dist0[i*n_labels], dist1[i*n_labels], lane);
        back_x = lane == i ? word : back_x;
    }
#pragma unroll 8
    for (int i = 0; i < 32; ++i) {
        const uint32_t word = tq_step(cost, dist0[(i + 32)*n_labels], dist1[(i + 32)*n_labels], lane);
        back_y = lane == i ? word : back_y;
    }
    int state = seam;
    int reg_x = 0;
    int reg_y = 0;
    for (int i = 31; i >= 0; --i) {
        const int reg = tq_back(__shfl_sync(TQ_WARP, back_y, i), state);
        reg_y = lane == i ? reg : reg_y;
    }
    for (int i = 31; i >= 0; --i) {
        const int reg = tq_back(__shfl_sync(TQ_WARP, back_x, i), state);
        reg_x = lane == i ? reg : reg_x;
    }

    const int label_x = tq_label(c, reg_x);
    const int label_y = tq_label(c, reg_y);
    const int w_x = tq_free_bits<bits>(table, label_x, v.x);
    const int w_y = tq_free_bits<bits>(table, label_y, v.y);
    tq_codes r;
    r.q = tq_look_up(table, label_x*n_free + w_x, label_y*n_free + w_y);
    r.x = (uint32_t) (w_x | (reg_x & 1) << free_bits);
    r.y = (uint32_t) (w_y | (reg_y & 1) << free_bits);
    quality = tq_sum_of_products(u, r.q)/sqrtf(tq_sum_of_products(r.q, r.q));
    return r;
}

// the first of the best
static __device__ __forceinline__ int tq_best(const float * quality) {
    int best = 0;
    for (int k = 1; k < TQ_N_MULTIPLES; ++k) {
        best = quality[k] > quality[best] ? k : best;
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
