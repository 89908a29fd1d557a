#pragma once

// Packed blocks to fragments of tensor-core operands. A lane of a warp has a halfword (16 coordinates) of each bit plane of a
// block, of two tokens at a time, and turns them into addresses in a table of pairs of levels in shared memory. All of it is
// arithmetic on words; nothing here is of one coordinate. Levels, codes and planes are those of docs/format.md.
//
// Tensor cores do not care for the order of what they sum over, so coordinates are not put in order:
//   nibble n of half h of code word s is the code of coordinate 4*n + s of the lane's halfword, of token h
// A byte of the address is the codes of two levels, which one look-up gives. The table has a copy for each bank, so that
// lanes that disagree do not wait for each other: entry b is at 256*b, the copy of lane l at 4*l (keys) or 128 + 4*l (values).

#include "tq-block.cuh"

template <tq_kind kind, int bits> struct tq_pairs {
    // bits of a code; the levels of a trellis code are symmetric: 16 levels and a sign
    static constexpr int  code_bits = kind == TQ_KIND_TCQ ? 4 : kind == TQ_KIND_QJL ? bits - 1 : bits;
    static constexpr bool has_sign  = kind == TQ_KIND_TCQ;                            // of levels
    static constexpr bool has_plane = kind == TQ_KIND_TCQ || kind == TQ_KIND_QJL;     // signs are filled
    static constexpr int  n_entries = (((1 << code_bits) - 1) | ((1 << code_bits) - 1) << 4) + 1;
};

struct tq_words {
    uint32_t codes[4];
    uint32_t signs;    // of levels (_tcq) or of the sketch (_qjl): bit i of half h is coordinate i of token h
};

// bit 16 + i of the result is label k of coordinate i: coded has the halfword in its high half, the one before it in its low half
template <int taps> static __device__ __forceinline__ uint32_t tq_label_plane(uint32_t coded) {
    uint32_t label = 0;
#pragma unroll
    for (int b = 0; b < 6; ++b) {
        label ^= (taps >> b) & 1 ? coded << b : 0;
    }
    return label;
}

// bits of x where mask is 1, of y elsewhere; the compiler makes two instructions of the same in C
static __device__ __forceinline__ uint32_t tq_select(uint32_t mask, uint32_t x, uint32_t y) {
#ifdef __CUDACC__
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(x), "r"(y));
    return r;
#else
    return (x & mask) | (y & ~mask);
#endif
}

static __device__ __forceinline__ uint32_t tq_both_low (uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
static __device__ __forceinline__ uint32_t tq_both_high(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

template <int bits, int k> static __device__ __forceinline__ uint32_t tq_label_of_two(uint32_t coded_x, uint32_t coded_y) {
    constexpr uint8_t all[3][4] = { TQ_TRELLIS_TAPS_2B, TQ_TRELLIS_TAPS_3B, TQ_TRELLIS_TAPS_4B };
    constexpr int taps = all[bits - 2][k];
    return tq_both_high(tq_label_plane<taps>(coded_x), tq_label_plane<taps>(coded_y));
}

// planes x[p], y[p]: the lane's halfword of plane p of the two tokens; coded_x, coded_y for _tcq as in tq_label_plane
template <tq_kind kind, int bits>
static __device__ __forceinline__ tq_words tq_unpack(const uint32_t * x, const uint32_t * y, uint32_t coded_x, uint32_t coded_y) {
    tq_words r;
    uint32_t p[4] = { 0, 0, 0, 0 };
    constexpr int n_own = kind == TQ_KIND_MSE ? bits : bits - 1; // planes that are bits of the code as they are
#pragma unroll
    for (int i = 0; i < n_own; ++i) {
        p[i] = tq_both_low(x[i], y[i]);
    }
    r.signs = 0;
    if constexpr (kind == TQ_KIND_QJL) {
        r.signs = tq_both_low(x[bits - 1], y[bits - 1]);
    }
    if constexpr (kind == TQ_KIND_TCQ) {
        constexpr int n_labels = 6 - bits; // the last one is the sign
        if constexpr (bits == 4) {
            p[3] = tq_label_of_two<4, 0>(coded_x, coded_y);
        } else if constexpr (bits == 3) {
            p[2] = tq_label_of_two<3, 0>(coded_x, coded_y);
            p[3] = tq_label_of_two<3, 1>(coded_x, coded_y);
        } else {
            p[1] = tq_label_of_two<2, 0>(coded_x, coded_y);
            p[2] = tq_label_of_two<2, 1>(coded_x, coded_y);
            p[3] = tq_label_of_two<2, 2>(coded_x, coded_y);
        }
        r.signs = tq_label_of_two<bits, n_labels - 1>(coded_x, coded_y);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            p[i] ^= r.signs;
        }
    }
    // bits of four planes to nibbles: two rounds of exchanges between words
    const uint32_t a02 = tq_select(0x33333333, p[0],      p[2] << 2);
    const uint32_t b02 = tq_select(0x33333333, p[0] >> 2, p[2]);
    const uint32_t a13 = tq_select(0x33333333, p[1],      p[3] << 2);
    const uint32_t b13 = tq_select(0x33333333, p[1] >> 2, p[3]);
    r.codes[0] = tq_select(0x55555555, a02,      a13 << 1);
    r.codes[1] = tq_select(0x55555555, a02 >> 1, a13);
    r.codes[2] = tq_select(0x55555555, b02,      b13 << 1);
    r.codes[3] = tq_select(0x55555555, b02 >> 1, b13);
    return r;
}

// the offset of a look-up: byte i of codes, and the lane's own copy; lane_offset < 256
static __device__ __forceinline__ uint32_t tq_pair_offset(uint32_t codes, int i, uint32_t lane_offset) {
    return __byte_perm(codes, lane_offset, 0x5504 | i << 4);
}

// keys: byte i of code word s is a pair of one token, token i/2: coordinates s + 8*(i%2) and 4 more

// their signs at bits 15 and 31
struct tq_pair_signs { uint32_t token[2]; };

static __device__ __forceinline__ tq_pair_signs tq_signs_of_keys(uint32_t signs) {
    const uint32_t odd = signs >> 4;
    return { { tq_both_low(signs, odd), tq_both_high(signs, odd) } };
}

static __device__ __forceinline__ uint32_t tq_sign_of_key(const tq_pair_signs & signs, int s, int i) {
    return (signs.token[i/2] << (15 - s - 8*(i%2))) & 0x80008000;
}

// values: pairs are of two tokens a and b, after the warp has been transposed: words ab and cd have the codes of four
// coordinates of a (low half) and b, of c and d. Byte i of even is coordinate 2*(i%2), of odd 2*(i%2) + 1, of (a, b) for i < 2, of (c, d) otherwise.
struct tq_value_pairs { uint32_t even, odd; };

static __device__ __forceinline__ tq_value_pairs tq_pairs_of_values(uint32_t ab, uint32_t cd) {
    const uint32_t x = tq_both_low (ab, cd);
    const uint32_t y = tq_both_high(ab, cd);
    return { tq_select(0x0f0f0f0f, x, y << 4), tq_select(0x0f0f0f0f, x >> 4, y) };
}
