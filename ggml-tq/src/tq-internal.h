#pragma once

// What the library's source files share.

#include "ggml-tq.h"

#define N TQ_BLOCK_SIZE

float tq_half_to_float(uint16_t h);

// for functions that are fast where their kind, or number of bits, is a constant
#ifdef _MSC_VER
#define ALWAYS_INLINE static __forceinline
#else
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#endif

// a plane: bit j is coordinate j
ALWAYS_INLINE uint64_t tq_load_u64(const uint8_t * p) {
    uint64_t w = 0;
    for (int i = 0; i < 8; ++i) {
        w |= (uint64_t) p[i] << 8*i;
    }
    return w;
}

ALWAYS_INLINE void tq_store_u64(uint8_t * p, uint64_t w) {
    for (int i = 0; i < 8; ++i) {
        p[i] = (uint8_t) (w >> 8*i);
    }
}

// bit i of b to byte i
ALWAYS_INLINE uint64_t tq_spread_bits(uint8_t b) {
    const uint64_t x = (b*0x0101010101010101ull) & 0x8040201008040201ull;
    return ((x + 0x7f7f7f7f7f7f7f7full) >> 7) & 0x0101010101010101ull;
}

// One of several implementations of the same functions, which follow it.
struct tq_implementation {
    const char * name;
    bool      (* available)(void); // on this machine
};

struct tq_choice {
    const struct tq_implementation * const * all; // the fastest first, NULL at the end
    const struct tq_implementation * current;     // NULL until it is needed
};

// as tq_rows_name and tq_rows_use
const char * tq_choice_name(const struct tq_choice * choice, int i);
const char * tq_choice_use (struct tq_choice * choice, const char * name);
const struct tq_implementation * tq_choice_current(struct tq_choice * choice);

// rows (sections 3 to 6): one implementation (tq-rows.h), for what a machine has

struct tq_rows_functions {
    struct tq_implementation base;
    void  (* encode)(const struct tq_params * params, enum tq_type type, const float * x, uint8_t * dst, int64_t n);
    void  (* decode)(const struct tq_params * params, enum tq_type type, bool rotated, const uint8_t * src, float * y, int64_t n);
    void  (* transform)(const float * from, float * to, int64_t n, const float * signs, bool inverse);
    void  (* encode_query)(const struct tq_params * params, const float * a, tq_query_block * dst, int64_t n);
    float (* dot)(const struct tq_params * params, enum tq_type type, const uint8_t * k, const tq_query_block * q, int64_t n);
};

extern const struct tq_rows_functions tq_rows_portable, tq_rows_avx2, tq_rows_avx512;

// the one in use
const struct tq_rows_functions * tq_rows(void);

// a file for processors that have more than the compiler was told of
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define TQ_X86
#define TQ_CPU_HAS(feature) __builtin_cpu_supports(feature)
#define TQ_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define TQ_BEGIN_TARGET(features) TQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TQ_END_TARGET             TQ_PRAGMA(clang attribute pop)
#else
#define TQ_BEGIN_TARGET(features) TQ_PRAGMA(GCC push_options) TQ_PRAGMA(GCC target(features))
#define TQ_END_TARGET             TQ_PRAGMA(GCC pop_options)
#endif
#endif

// centers (section 10)

#define TQ_CENTER_PAGE 256 // positions whose angles one part of the table holds
#define TQ_CENTER_SPAN 64  // positions that are scored together, from the middle both ways; as many as a tile's cells
#define TQ_CENTER_HALF (TQ_CENTER_SPAN/2)

ALWAYS_INLINE void tq_center_pair(const struct tq_center * center, int32_t i, int32_t * a, int32_t * b) {
    *a = center->neox ? i                   : 2*i;
    *b = center->neox ? i + center->n_rot/2 : 2*i + 1;
}

ALWAYS_INLINE int32_t tq_center_clamp(int32_t pos) {
    return pos < 0 ? 0 : pos & 0xffffff;
}

// tiles: one implementation, for what a machine has (tq-tile-*.h)

struct tq_tile_functions {
    struct tq_implementation base;
    void (* unpack)(const struct tq_tile_type * tile, bool values, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]);
    void (* scales)(const uint16_t * half, float * d); // 64 of them
    void (* split)(bool values, const float * x, const float * weights, float scale, struct tq_tile_numbers * dst);
    void (* multiply)(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step);
    int  (* coordinate)(int i);
    // For j < TQ_CENTER_HALF: e = w[r][2*n], then e += w[r][k]*angles[k*TQ_CENTER_HALF + j] for k from 0 to n - 1 in this order; o = 0, then
    // the same for k from n to 2*n - 1; each step rounded once (a fused multiply-add): scores of centers have the same bits everywhere.
    // sums[r*step + TQ_CENTER_HALF + j] += e + o, sums[r*step + TQ_CENTER_HALF - 1 - j] += e - o
    void (* turns)(const float * angles, int32_t n, const float * const * w, int n_queries, float * sums, size_t step);
};

// the one in use
const struct tq_tile_functions * tq_tile(void);

// trellis codes (section 9), bits 2, 3 or 4

#define TQ_TRELLIS_INDEX_BITS 5 // of the index into the table of levels
#define TQ_TRELLIS_BATCH      16 // blocks that are encoded together

const float * tq_trellis_table(int bits); // [32]

// plane c of coded bits -> that of a label: bit j is the parity of the register at j and the taps
ALWAYS_INLINE uint64_t tq_trellis_label_plane(uint64_t c, int taps) {
    uint64_t label = 0;
    for (int i = 0; i < 6; ++i) {
        if (taps >> i & 1) {
            label ^= i == 0 ? c : c << i | c >> (N - i); // bit j is c[j - i]
        }
    }
    return label;
}

// planes[bits*8] of a block -> index[TQ_TRELLIS_INDEX_BITS*8], the planes of the index into the table
void tq_trellis_index_planes(int bits, const uint8_t * planes, uint8_t * index);

// blocks u[n_blocks] of unit mean square, n_blocks at most TQ_TRELLIS_BATCH -> each coordinate's free bits and, the highest, its
// coded bit
void tq_trellis_encode(int bits, int n_blocks, const float (* u)[N], uint8_t (* codes)[N]);
