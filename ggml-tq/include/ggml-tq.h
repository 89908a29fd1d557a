#pragma once

// ggml-tq: TurboQuant cache types as a portable C library. It needs neither ggml nor llama.cpp.
//
// A row of n floats (n a multiple of TQ_BLOCK_SIZE) becomes n/64 blocks: a randomized Hadamard rotation, codes, and one
// fp16 scale. Codes are Lloyd-Max (_mse), Lloyd-Max and one bit a coordinate of a QJL sketch of the residual (_qjl), or
// those of a trellis (_tcq). docs/format.md is the specification; every function here follows it to the bit.
//
// One key's way: tq_encode() writes it into the cache; a query is turned once by tq_encode_query(); tq_dot() scores the
// packed key against it. A value: tq_encode(), then tq_decode(). All take the parameters (seeds, codebooks) they work
// with: tq_params_default(), or a copy of it that a model's own values were set in. Keys can be centered before they are
// encoded: tq_center_*().

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TQ_FORMAT_VERSION 1  // state files and metadata carry it
#define TQ_BLOCK_SIZE     64 // coordinates a block

enum tq_type {
    TQ_TYPE_TQ2_MSE,
    TQ_TYPE_TQ3_MSE,
    TQ_TYPE_TQ4_MSE,
    TQ_TYPE_TQ2_QJL,
    TQ_TYPE_TQ3_QJL,
    TQ_TYPE_TQ4_QJL,
    TQ_TYPE_TQ2_TCQ,
    TQ_TYPE_TQ3_TCQ,
    TQ_TYPE_TQ4_TCQ,
    TQ_TYPE_COUNT,
};

enum tq_kind {
    TQ_KIND_MSE, // codebook
    TQ_KIND_QJL, // codebook and sketch of the residual
    TQ_KIND_TCQ, // trellis
};

// blocks as they lie in memory: plane p holds bit p of the 64 codes, a little-endian 64-bit word stored as bytes so
// that a block has no alignment; the last plane holds the signs of the sketched residual (_qjl), the coded bits (_tcq)
typedef struct { uint16_t d; uint8_t planes[2][8]; } tq2_block;
typedef struct { uint16_t d; uint8_t planes[3][8]; } tq3_block;
typedef struct { uint16_t d; uint8_t planes[4][8]; } tq4_block;

// 64 coordinates of a rotated query b = rotate(a) and of its sketch f = sketch(b), as int8 with one scale each
typedef struct { float db; float df; int8_t b[TQ_BLOCK_SIZE]; int8_t f[TQ_BLOCK_SIZE]; } tq_query_block;

struct tq_type_info {
    const char * name;       // "tq3_qjl"
    enum tq_kind kind;
    int          bits;       // bits a coordinate, sketch bit included; without the scale
    int          code_bits;  // bits of the codebook: bits for _mse, bits - 1 for _qjl, 0 for _tcq, which has none
    size_t       block_size; // bytes
};

// what one _mse or _qjl type rounds to: the first 2^code_bits centroids, ascending, and their midpoints
struct tq_quantizer {
    float centroids [16];
    float thresholds[15];
    float kappa;          // weight of the sketch's signs; 0 for _mse
};

#define TQ_QUANTIZER_COUNT (TQ_TYPE_TQ4_QJL + 1)

// a set of parameters (section 8); change it through the functions below only
struct tq_params {
    uint64_t rotation_seed;
    uint64_t sketch_seed;
    float    rotation_signs[TQ_BLOCK_SIZE];
    float    sketch_signs  [TQ_BLOCK_SIZE];
    struct tq_quantizer quantizers[TQ_QUANTIZER_COUNT];
    uint64_t hash;
};

// NULL if type is not one of enum tq_type
const struct tq_type_info * tq_get_type_info(enum tq_type type);

// type by exact name, or by the names "tq2", "tq3", "tq4" resolved by role: 'k' (keys) -> _qjl, 'v' (values) -> _mse.
// Returns TQ_TYPE_COUNT for any other name.
enum tq_type tq_type_from_name(const char * name, char role);

// bytes of a row of n coordinates; 0 if the type or n (not a positive multiple of 64) is invalid
size_t tq_row_size(enum tq_type type, int64_t n);

// bits a stored value, scale included: 8*block_size/64
double tq_bits_per_value(enum tq_type type);

// the built-in set
const struct tq_params * tq_params_default(void);

void tq_params_set_seeds(struct tq_params * params, uint64_t rotation_seed, uint64_t sketch_seed);

// 64-bit FNV-1a goes on by a number's four little-endian bytes; it starts from TQ_HASH_START
#define TQ_HASH_START 0xcbf29ce484222325ull
uint64_t tq_hash_float(uint64_t hash, float f);

// NULL, or what is wrong with the values; then params is as it was
const char * tq_params_set_codebook(struct tq_params * params, enum tq_type type, const float * centroids, size_t n);
const char * tq_params_set_kappa   (struct tq_params * params, enum tq_type type, float kappa);

// The functions below require n % TQ_BLOCK_SIZE == 0 and no overlap of source and destination. They neither allocate
// nor keep state, and may run in any number of threads.

// x[n] -> dst[tq_row_size(type, n)]. A block with a NaN or Inf decodes to NaN; a block whose largest magnitude is below
// 2^-60 (or whose scale is below fp16's smallest number) becomes zeros; a scale above 65504 saturates.
void tq_encode(const struct tq_params * params, enum tq_type type, const float * x, void * dst, int64_t n);

// src[tq_row_size(type, n)] -> x[n], in the original basis
void tq_decode(const struct tq_params * params, enum tq_type type, const void * src, float * x, int64_t n);

// a[n] -> dst[n/64]
void tq_encode_query(const struct tq_params * params, const float * a, tq_query_block * dst, int64_t n);

// inner product of the decoded row k and the query q, without decoding: error against tq_decode is the query's int8
// rounding only
float tq_dot(const struct tq_params * params, enum tq_type type, const void * k, const tq_query_block * q, int64_t n);

// true if every scale in the row is finite
bool tq_validate(enum tq_type type, const void * src, int64_t n);

// y = rotate(x) and back, block by block; in place allowed
void tq_rotate  (const struct tq_params * params, const float * x, float * y, int64_t n);
void tq_unrotate(const struct tq_params * params, const float * y, float * x, int64_t n);

// Centered keys (section 10): a row holds key - X_p(m), p its position, m the center of its layer and head, X_p RoPE. At
// position 0, whose key is hardly ever like the others, m is another center: `first`.

#define TQ_CENTER_ROWS 768 // of the table

struct tq_center {
    int32_t       head_dim;
    int32_t       n_rot; // coordinates that RoPE turns, the first ones; even, at most head_dim
    int32_t       neox;  // pairs are (i, i + n_rot/2), otherwise (2i, 2i + 1)
    const float * table; // [TQ_CENTER_ROWS][n_rot]; not read if n_rot is 0
};

// freqs[n_rot/2]: the angle by which one position turns each pair -> table[TQ_CENTER_ROWS*n_rot]
void tq_center_make_table(const double * freqs, int32_t n_rot, float * table);

// x[head_dim] += sign*X_pos(m), sign 1 or -1
void tq_center_add(const struct tq_center * center, const float * m, int32_t pos, float sign, float * x);

// <q, X_p(m)> for many positions p: q[head_dim], m and `first` become w[TQ_CENTER_QUERY_SIZE(n_rot)] once, then
// a position takes one product of n_rot terms; what a page of 256 positions shares is made when the page changes
#define TQ_CENTER_QUERY_SIZE(n_rot) (2*(n_rot) + 1)
struct tq_center_query {
    float * w;
    int32_t page;  // which positions w's second half is made for
    float   first; // the score at position 0, whose center is another
};
struct tq_center_query tq_center_query_init(const struct tq_center * center, const float * m, const float * first, const float * q,
    float * w);
float tq_center_score(const struct tq_center * center, struct tq_center_query * query, int32_t pos);

#ifdef __cplusplus
}
#endif
