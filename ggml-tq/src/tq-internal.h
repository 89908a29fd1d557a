#pragma once

// What the library's source files share.

#include "ggml-tq.h"

#define N TQ_BLOCK_SIZE

// sum(a*b) of one block in the order of section 3
float tq_block_dot(const float * a, const float * b);

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

// trellis codes (section 9), bits 2, 3 or 4

#define TQ_TRELLIS_INDEX_BITS 5 // of the index into the table of levels
#define TQ_TRELLIS_BATCH      8 // blocks that are encoded together

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

// blocks u[n_blocks] of unit mean square, n_blocks at most TQ_TRELLIS_BATCH -> each coordinate's coded bit (bit 0) and free
// bits (from bit 1), and its level
void tq_trellis_encode(int bits, int n_blocks, const float (* u)[N], uint8_t (* codes)[N], float (* q)[N]);
