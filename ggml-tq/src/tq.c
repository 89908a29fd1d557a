// Types, parameters, and the functions of ggml-tq.h on rows, which tq-rows.h has. Sections are those of docs/format.md.
// Compile without floating-point contraction: encoders must agree to the bit.

#include "tq-internal.h"
#include "tq-codebooks.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "the format needs float arithmetic that is not evaluated in a wider type (on x86: SSE2)"
#endif

_Static_assert(sizeof(tq2_block) == 18 && sizeof(tq3_block) == 26 && sizeof(tq4_block) == 34, "blocks have no padding");
_Static_assert(sizeof(tq_query_block) == 2*sizeof(float) + 2*N, "query blocks have no padding");

static const struct tq_type_info type_info[TQ_TYPE_COUNT] = {
    [TQ_TYPE_TQ2_MSE] = { "tq2_mse", TQ_KIND_MSE, 2, 2, sizeof(tq2_block) },
    [TQ_TYPE_TQ3_MSE] = { "tq3_mse", TQ_KIND_MSE, 3, 3, sizeof(tq3_block) },
    [TQ_TYPE_TQ4_MSE] = { "tq4_mse", TQ_KIND_MSE, 4, 4, sizeof(tq4_block) },
    [TQ_TYPE_TQ2_QJL] = { "tq2_qjl", TQ_KIND_QJL, 2, 1, sizeof(tq2_block) },
    [TQ_TYPE_TQ3_QJL] = { "tq3_qjl", TQ_KIND_QJL, 3, 2, sizeof(tq3_block) },
    [TQ_TYPE_TQ4_QJL] = { "tq4_qjl", TQ_KIND_QJL, 4, 3, sizeof(tq4_block) },
    [TQ_TYPE_TQ2_TCQ] = { "tq2_tcq", TQ_KIND_TCQ, 2, 0, sizeof(tq2_block) },
    [TQ_TYPE_TQ3_TCQ] = { "tq3_tcq", TQ_KIND_TCQ, 3, 0, sizeof(tq3_block) },
    [TQ_TYPE_TQ4_TCQ] = { "tq4_tcq", TQ_KIND_TCQ, 4, 0, sizeof(tq4_block) },
};

//
// types
//

const struct tq_type_info * tq_get_type_info(enum tq_type type) {
    return (unsigned) type < TQ_TYPE_COUNT ? &type_info[type] : NULL;
}

enum tq_type tq_type_from_name(const char * name, char role) {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        if (strcmp(name, type_info[t].name) == 0) {
            return (enum tq_type) t;
        }
    }
    if (strlen(name) == 3 && strncmp(name, "tq", 2) == 0 && name[2] >= '2' && name[2] <= '4') {
        return (enum tq_type) ((role == 'k' ? TQ_TYPE_TQ2_QJL : TQ_TYPE_TQ2_MSE) + (name[2] - '2'));
    }
    return TQ_TYPE_COUNT;
}

size_t tq_row_size(enum tq_type type, int64_t n) {
    const struct tq_type_info * info = tq_get_type_info(type);
    return info && n > 0 && n % N == 0 ? (size_t) (n/N)*info->block_size : 0;
}

double tq_bits_per_value(enum tq_type type) {
    return 8.0*(double) tq_row_size(type, N)/N;
}

//
// parameters (section 8)
//

#define SIGN(w, i)    (((w) >> (i)) & 1 ? -1.0f : 1.0f)
#define SIGNS_8(w, i)  SIGN(w, i), SIGN(w, (i)+1), SIGN(w, (i)+2), SIGN(w, (i)+3), \
                       SIGN(w, (i)+4), SIGN(w, (i)+5), SIGN(w, (i)+6), SIGN(w, (i)+7)
#define SIGNS_64(w)    SIGNS_8(w, 0), SIGNS_8(w, 8), SIGNS_8(w, 16), SIGNS_8(w, 24), \
                       SIGNS_8(w, 32), SIGNS_8(w, 40), SIGNS_8(w, 48), SIGNS_8(w, 56)

static const struct tq_params default_params = {
    .rotation_seed  = TQ_ROTATION_SEED,
    .sketch_seed    = TQ_SKETCH_SEED,
    .rotation_signs = { SIGNS_64(TQ_ROTATION_SIGNS) },
    .sketch_signs   = { SIGNS_64(TQ_SKETCH_SIGNS)   },
    .quantizers     = {
        [TQ_TYPE_TQ2_MSE] = { TQ_CODEBOOK_2B, 0.0f },
        [TQ_TYPE_TQ3_MSE] = { TQ_CODEBOOK_3B, 0.0f },
        [TQ_TYPE_TQ4_MSE] = { TQ_CODEBOOK_4B, 0.0f },
        [TQ_TYPE_TQ2_QJL] = { TQ_CODEBOOK_1B, TQ_KAPPA_1B },
        [TQ_TYPE_TQ3_QJL] = { TQ_CODEBOOK_2B, TQ_KAPPA_2B },
        [TQ_TYPE_TQ4_QJL] = { TQ_CODEBOOK_3B, TQ_KAPPA_3B },
    },
    .hash           = TQ_PARAMS_HASH,
};

const struct tq_params * tq_params_default(void) {
    return &default_params;
}

static uint64_t fnv1a(uint64_t h, uint64_t word, int n_bytes) {
    for (int i = 0; i < n_bytes; ++i) {
        h = (h ^ ((word >> 8*i) & 0xff))*0x100000001b3ull;
    }
    return h;
}

uint64_t tq_hash_float(uint64_t h, float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    return fnv1a(h, u, 4);
}

static void update_hash(struct tq_params * params) {
    uint64_t h = fnv1a(TQ_HASH_START, TQ_FORMAT_VERSION, 4);
    h = fnv1a(h, params->rotation_seed, 8);
    h = fnv1a(h, params->sketch_seed,   8);
    for (int t = 0; t < TQ_QUANTIZER_COUNT; ++t) {
        for (int k = 0; k < 1 << type_info[t].code_bits; ++k) {
            h = tq_hash_float(h, params->quantizers[t].centroids[k]);
        }
        h = tq_hash_float(h, params->quantizers[t].kappa);
    }
    params->hash = h;
}

static void set_signs(float * signs, uint64_t seed) { // the first output of SplitMix64 (section 3)
    uint64_t z = seed + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30))*0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27))*0x94D049BB133111EBull;
    z =  z ^ (z >> 31);
    for (int i = 0; i < N; ++i) {
        signs[i] = SIGN(z, i);
    }
}

void tq_params_set_seeds(struct tq_params * params, uint64_t rotation_seed, uint64_t sketch_seed) {
    params->rotation_seed = rotation_seed;
    params->sketch_seed   = sketch_seed;
    set_signs(params->rotation_signs, rotation_seed);
    set_signs(params->sketch_signs,   sketch_seed);
    update_hash(params);
}

const char * tq_params_set_codebook(struct tq_params * params, enum tq_type type, const float * centroids, size_t n) {
    const struct tq_type_info * info = tq_get_type_info(type);
    if (!info || info->kind == TQ_KIND_TCQ) {
        return "the type has no codebook";
    }
    if (n != (size_t) 1 << info->code_bits) {
        return "wrong number of centroids";
    }
    for (size_t k = 0; k < n; ++k) {
        if (!(fabsf(centroids[k]) <= FLT_MAX)) {
            return "a centroid is not finite";
        }
        if (fabsf(centroids[k]) > 8.0f) {
            return "a centroid is beyond 8";
        }
        if (k > 0 && !(centroids[k - 1] < centroids[k])) {
            return "centroids are not ascending";
        }
    }
    struct tq_quantizer * quantizer = &params->quantizers[type];
    memcpy(quantizer->centroids, centroids, n*sizeof(float));
    for (size_t k = 0; k + 1 < n; ++k) {
        quantizer->thresholds[k] = (centroids[k] + centroids[k + 1])/2.0f;
    }
    update_hash(params);
    return NULL;
}

const char * tq_params_set_kappa(struct tq_params * params, enum tq_type type, float kappa) {
    const struct tq_type_info * info = tq_get_type_info(type);
    if (!info || info->kind != TQ_KIND_QJL) {
        return "the type has no sketch";
    }
    if (!(kappa >= 0.0f && kappa <= 2.0f)) {
        return "not between 0 and 2";
    }
    params->quantizers[type].kappa = kappa;
    update_hash(params);
    return NULL;
}

//
// half precision; not every C compiler has a type of it
//

float tq_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t e    = (h >> 10) & 0x1f;
    const uint32_t m    = h & 0x3ff;
    uint32_t u;
    float f;
    if (e == 0) {
        f = (float) m*0x1p-24f;
        memcpy(&u, &f, sizeof(u));
        u |= sign;
    } else {
        u = sign | (e == 31 ? 0x7f800000 : (e + 112) << 23) | (m << 13);
    }
    memcpy(&f, &u, sizeof(f));
    return f;
}

//
// rows (sections 3 to 6), by the implementation in use
//

void tq_rotate(const struct tq_params * params, const float * x, float * y, int64_t n) {
    tq_rows()->transform(x, y, n, params->rotation_signs, false);
}

void tq_unrotate(const struct tq_params * params, const float * y, float * x, int64_t n) {
    tq_rows()->transform(y, x, n, params->rotation_signs, true);
}

void tq_sketch(const struct tq_params * params, const float * x, float * y, int64_t n) {
    tq_rows()->transform(x, y, n, params->sketch_signs, false);
}

void tq_unsketch(const struct tq_params * params, const float * y, float * x, int64_t n) {
    tq_rows()->transform(y, x, n, params->sketch_signs, true);
}

void tq_encode(const struct tq_params * params, enum tq_type type, const float * x, void * dst, int64_t n) {
    tq_rows()->encode(params, type, x, dst, n);
}

void tq_decode(const struct tq_params * params, enum tq_type type, const void * src, float * x, int64_t n) {
    tq_rows()->decode(params, type, false, src, x, n);
}

void tq_decode_rotated(const struct tq_params * params, enum tq_type type, const void * src, float * y, int64_t n) {
    tq_rows()->decode(params, type, true, src, y, n);
}

void tq_encode_query(const struct tq_params * params, const float * a, tq_query_block * dst, int64_t n) {
    tq_rows()->encode_query(params, a, dst, n);
}

float tq_dot(const struct tq_params * params, enum tq_type type, const void * k, const tq_query_block * q, int64_t n) {
    return tq_rows()->dot(params, type, k, q, n);
}

bool tq_validate(enum tq_type type, const void * src, int64_t n) {
    const struct tq_type_info * info = &type_info[type];
    const uint8_t * block = src;
    for (int64_t i = 0; i < n; i += N, block += info->block_size) {
        if ((block[1] & 0x7c) == 0x7c) {
            return false;
        }
    }
    return true;
}
