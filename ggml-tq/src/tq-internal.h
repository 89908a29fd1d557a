#pragma once

// What the library's source files share.

#include "ggml-tq.h"

#define N TQ_BLOCK_SIZE

// sum(a*b) of one block in the order of section 3
float tq_block_dot(const float * a, const float * b);

uint64_t tq_load_u64 (const uint8_t * p);
void     tq_store_u64(uint8_t * p, uint64_t w);

// trellis codes (section 9), bits 2, 3 or 4

#define TQ_TRELLIS_INDEX_BITS 5 // of the index into the table of levels
#define TQ_TRELLIS_BATCH      8 // blocks that are encoded together

const float * tq_trellis_table(int bits); // [32]

// planes[bits*8] of a block -> index[TQ_TRELLIS_INDEX_BITS*8], the planes of the index into the table
void tq_trellis_index_planes(int bits, const uint8_t * planes, uint8_t * index);

// blocks u[n_blocks] of unit mean square, n_blocks at most TQ_TRELLIS_BATCH -> each coordinate's coded bit (bit 0) and free
// bits (from bit 1), and its level
void tq_trellis_encode(int bits, int n_blocks, const float (* u)[N], uint8_t (* codes)[N], float (* q)[N]);
