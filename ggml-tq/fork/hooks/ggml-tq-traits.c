#include "ggml-tq-traits.h"

#include <stdio.h>

static struct tq_params         set;           // the one that a model brought
static const struct tq_params * active = NULL; // NULL: the built-in one

const struct tq_params * ggml_tq_params(void) {
    return active ? active : tq_params_default();
}

void ggml_tq_set_params(const struct tq_params * params) {
    if (params) {
        set = *params;
    }
    active = params ? &set : NULL;
}

// ggml's tables hold one function a type, the library takes parameters and type as arguments
#define GGML_TQ_DEFINE(TYPE, name) \
    void ggml_##name##_from_float(const float * x, void * y, int64_t n) { \
        tq_encode(ggml_tq_params(), TQ_TYPE_##TYPE, x, y, n); \
    } \
    void ggml_##name##_to_float(const void * x, float * y, int64_t n) { \
        tq_decode(ggml_tq_params(), TQ_TYPE_##TYPE, x, y, n); \
    } \
    void ggml_##name##_vec_dot(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) { \
        GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc); \
        *s = tq_dot(ggml_tq_params(), TQ_TYPE_##TYPE, x, y, n); \
    }
GGML_TQ_FOR_EACH(GGML_TQ_DEFINE)

void ggml_tq_query_from_float(const float * x, void * y, int64_t n) {
    tq_encode_query(ggml_tq_params(), x, y, n);
}

size_t ggml_tq_quantize(enum ggml_type type, const float * src, void * dst, int64_t n) {
    tq_encode(ggml_tq_params(), ggml_tq_type_of(type), src, dst, n);
    return tq_row_size(ggml_tq_type_of(type), n);
}

bool ggml_tq_validate(enum ggml_type type, const void * data, size_t nb) {
    if (!tq_validate(ggml_tq_type_of(type), data, (int64_t) nb*TQ_BLOCK_SIZE)) {
        fprintf(stderr, "%s: a block's scale is not finite\n", __func__);
        return false;
    }
    return true;
}
