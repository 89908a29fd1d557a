#pragma once

// What upstream's ggml tables need to know about the cache types. The patches name these macros and functions, each in
// one line; the substance is here.

#include "ggml.h"
#include "ggml-tq.h"

#ifdef __cplusplus
extern "C" {
#endif

// The parameters (seeds, codebooks) that tensors of these types in this process are read and written with: the built-in
// ones, or a copy of those last set. Only llama-tq.cpp sets them, and only while no cache of these types exists.
const struct tq_params * ggml_tq_params(void);
void ggml_tq_set_params(const struct tq_params * params); // NULL: the built-in ones

// X(GGML_TYPE_ suffix, prefix of the functions)
#define GGML_TQ_FOR_EACH(X) \
    X(TQ2_MSE, tq2_mse) X(TQ3_MSE, tq3_mse) X(TQ4_MSE, tq4_mse) \
    X(TQ2_QJL, tq2_qjl) X(TQ3_QJL, tq3_qjl) X(TQ4_QJL, tq4_qjl) \
    X(TQ2_TCQ, tq2_tcq) X(TQ3_TCQ, tq3_tcq) X(TQ4_TCQ, tq4_tcq)

// one of the stored types
static inline bool ggml_tq_is_type(enum ggml_type type) {
    return type >= GGML_TYPE_TQ2_MSE && type <= GGML_TYPE_TQ4_TCQ;
}

// its place in the library; the ids in ggml.h are in the order of enum tq_type
static inline enum tq_type ggml_tq_type_of(enum ggml_type type) {
    return (enum tq_type) (type - GGML_TYPE_TQ2_MSE);
}

// case labels of the stored types, for upstream's switches over quantized types
#define GGML_TQ_CASES \
    case GGML_TYPE_TQ2_MSE: case GGML_TYPE_TQ3_MSE: case GGML_TYPE_TQ4_MSE: \
    case GGML_TYPE_TQ2_QJL: case GGML_TYPE_TQ3_QJL: case GGML_TYPE_TQ4_QJL: \
    case GGML_TYPE_TQ2_TCQ: case GGML_TYPE_TQ3_TCQ: case GGML_TYPE_TQ4_TCQ:

#define GGML_TQ_DECLARE(TYPE, name) \
    void ggml_##name##_from_float(const float * x, void * y, int64_t n); \
    void ggml_##name##_to_float  (const void * x, float * y, int64_t n); \
    void ggml_##name##_vec_dot   (int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
GGML_TQ_FOR_EACH(GGML_TQ_DECLARE)
#undef GGML_TQ_DECLARE

void ggml_tq_query_from_float(const float * x, void * y, int64_t n);

// rows of ggml.c's type_traits
#define GGML_TQ_TRAITS_ROW(TYPE, name) \
    [GGML_TYPE_##TYPE] = { \
        .type_name      = #name, \
        .blck_size      = TQ_BLOCK_SIZE, \
        .type_size      = TQ_BLOCK_BYTES_##TYPE, \
        .is_quantized   = true, \
        .to_float       = ggml_##name##_to_float, \
        .from_float_ref = ggml_##name##_from_float, \
    },
#define GGML_TQ_TYPE_TRAITS \
    GGML_TQ_FOR_EACH(GGML_TQ_TRAITS_ROW) \
    [GGML_TYPE_TQ_QUERY] = { \
        .type_name      = "tq_query", \
        .blck_size      = TQ_BLOCK_SIZE, \
        .type_size      = sizeof(tq_query_block), \
        .is_quantized   = true, \
    },
#define TQ_BLOCK_BYTES_TQ2_MSE sizeof(tq2_block)
#define TQ_BLOCK_BYTES_TQ3_MSE sizeof(tq3_block)
#define TQ_BLOCK_BYTES_TQ4_MSE sizeof(tq4_block)
#define TQ_BLOCK_BYTES_TQ2_QJL sizeof(tq2_block)
#define TQ_BLOCK_BYTES_TQ3_QJL sizeof(tq3_block)
#define TQ_BLOCK_BYTES_TQ4_QJL sizeof(tq4_block)
#define TQ_BLOCK_BYTES_TQ2_TCQ sizeof(tq2_block)
#define TQ_BLOCK_BYTES_TQ3_TCQ sizeof(tq3_block)
#define TQ_BLOCK_BYTES_TQ4_TCQ sizeof(tq4_block)

// rows of ggml-cpu.c's type_traits_cpu: rows of K are scored against a query that was rotated once
#define GGML_TQ_TRAITS_CPU_ROW(TYPE, name) \
    [GGML_TYPE_##TYPE] = { \
        .from_float   = ggml_##name##_from_float, \
        .vec_dot      = ggml_##name##_vec_dot, \
        .vec_dot_type = GGML_TYPE_TQ_QUERY, \
        .nrows        = 1, \
    },
#define GGML_TQ_TYPE_TRAITS_CPU \
    GGML_TQ_FOR_EACH(GGML_TQ_TRAITS_CPU_ROW) \
    [GGML_TYPE_TQ_QUERY] = { \
        .from_float   = ggml_tq_query_from_float, \
    },

// a FLASH_ATTN_EXT that the CPU backend leaves to ggml-tq-attention.h; and the bytes of work buffer that it needs there
static inline bool ggml_tq_attends(const struct ggml_tensor * op) {
    return ggml_tq_is_type(op->src[1]->type) || ggml_tq_is_type(op->src[2]->type);
}
size_t ggml_tq_flash_attn_work_size(const struct ggml_tensor * op, int n_threads); // 0 for other ops

// ggml_quantize_chunk: n floats to dst; returns bytes written
size_t ggml_tq_quantize(enum ggml_type type, const float * src, void * dst, int64_t n);

// ggml_validate_row_data: nb blocks
bool ggml_tq_validate(enum ggml_type type, const void * data, size_t nb);

#ifdef __cplusplus
}
#endif
