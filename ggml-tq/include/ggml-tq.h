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

// The functions below require n % TQ_BLOCK_SIZE == 0 and no overlap of source and destination. They do not
// allocate, and may run in any number of threads.

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

// src[tq_row_size(type, n)] -> y[n] = rotate(what tq_decode() gives), without turning back and forth
void tq_decode_rotated(const struct tq_params * params, enum tq_type type, const void * src, float * y, int64_t n);

// y = sketch(x) and back, block by block; in place allowed
void tq_sketch  (const struct tq_params * params, const float * x, float * y, int64_t n);
void tq_unsketch(const struct tq_params * params, const float * y, float * x, int64_t n);

// All of these are there several times, of the same bits, and the fastest that the machine has is in use.

// the implementations that this machine has, the fastest first; NULL from their number on
const char * tq_rows_name(int i);

// for tests and benchmarks, while nothing else is computed: the implementation of this name from now on. Returns the name of the one in use if name
// is NULL, NULL if this machine has none of that name.
const char * tq_rows_use(const char * name);

// Attention on tiles (section 6): one block of up to 64 packed rows becomes bytes, which are multiplied with the numbers of
// many queries. Keys: a tile's lanes are its rows, a query's numbers its 64 rotated coordinates. Values: the lanes are
// coordinates, a query's numbers its weights of the 64 rows. Part 0 of a block are its levels, rounded to 8 bits (those of
// a trellis exactly); part 1 of a _qjl block its signs, for the sketched query. Numbers have 15 bits.
// Sums of products are exact integers: they depend neither on what else is multiplied nor on the machine.
//
// There are several implementations, of which the fastest that the machine has is in use. Tiles and numbers are in its own order.

#define TQ_TILE_SIZE (2*TQ_BLOCK_SIZE*TQ_BLOCK_SIZE) // of up to two bytes a coordinate

// those that this machine has, the fastest first; NULL from their number on
const char * tq_tile_name(int i);

// for tests and benchmarks, while nothing else is computed: the implementation of this name from now on. Returns the name of the one in use if name
// is NULL, NULL if this machine has none of that name.
const char * tq_tile_use(const char * name);

struct tq_tile_type {
    enum tq_type type;
    int    n_parts;
    int8_t table[TQ_BLOCK_SIZE];
    float  unit[2]; // a byte of a part stands for unit*byte
};

struct tq_tile_numbers { // 64 integers of magnitude up to 127*128, in the machine's order
    uint8_t digits[2*TQ_BLOCK_SIZE];
    int32_t sum;
};

struct tq_tile_type tq_tile_type_init(const struct tq_params * params, enum tq_type type);

// the block at first and those of the n_rows - 1 rows that follow at a distance of stride bytes -> dst[n_parts]; alignment to
// 64 bytes makes it faster. What stands for rows that are not there is not specified: keys' lanes mean nothing, values need weights of 0.
void tq_tile_unpack(const struct tq_tile_type * tile, bool values, const void * first, size_t stride, int n_rows,
        int8_t (* dst)[TQ_TILE_SIZE]);

// a hint that size bytes of each of these rows will be wanted, though not next
void tq_tile_prefetch(const void * first, size_t stride, int n_rows, size_t size);

// the scales of such blocks, d[64], 0 from n_rows on
void tq_tile_scales(const void * first, size_t stride, int n_rows, float * d);

// x[64]*weights[64] (NULL: ones) in units of tq_tile_number_scale(max); max is at least the largest magnitude of them. All 0 if
// max is not finite. To be multiplied with keys or with values.
void  tq_tile_split(bool values, const float * x, const float * weights, float max, struct tq_tile_numbers * dst);
float tq_tile_number_scale(float max);

// sums[r*step + lane] += <lane, numbers[r]> for n queries r and 64 lanes
void tq_tile_multiply(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step);

// the coordinate in lane i of a tile of values
int tq_tile_coordinate(int i);

// Centered keys (section 10): a row holds key - X_p(m), p its position, m the center of its layer and head, X_p RoPE. At
// position 0, whose key is hardly ever like the others, m is another center: `first`.

// of the table: 3 parts of 256; the angles of distances 0.5, 1.5, ... 31.5, [n_rot][32]; those of positions 31.5, 95.5, 159.5, 223.5
#define TQ_CENTER_ROWS 804

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
// two positions take one product of n_rot terms; what a span of 64 positions shares is made when the span changes.
// A score depends on q, the centers and p alone, to the bit.
#define TQ_CENTER_QUERY_SIZE(n_rot) (2*(n_rot) + 1)
struct tq_center_query {
    float * w;
    int32_t span;  // which positions w's second half is made for
    float   first; // the score at position 0, whose center is another
};
struct tq_center_query tq_center_query_init(const struct tq_center * center, const float * m, const float * first, const float * q,
    float * w);

// 64 cells by the spans of their positions
struct tq_center_cells {
    int n_runs;
    struct tq_center_run { int32_t span; int first, n; bool in_order; } runs[TQ_BLOCK_SIZE]; // span -1: position 0; in_order: cells and positions ascend by 1
    uint8_t cell[TQ_BLOCK_SIZE]; // of the runs, one after the other
    uint8_t at  [TQ_BLOCK_SIZE]; // its position within the span
};
// pos[64], of which only those of used[64] are read
void tq_center_cells_init(struct tq_center_cells * cells, const int32_t * pos, const bool * used);

// scores[r*step + cell] += <q, X_p(m)> of every cell that is used, for n queries r
void tq_center_scores(const struct tq_center * center, struct tq_center_query * queries, int n, const struct tq_center_cells * cells,
    float * scores, size_t step);

#ifdef __cplusplus
}
#endif
