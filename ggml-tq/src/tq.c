// The reference implementation of docs/format.md in portable C: the section numbers below are its.
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
// fp16; not every C compiler has a half type
//

static uint16_t fp32_to_fp16(float f) { // f >= 0 and finite: to nearest even, saturating
    if (f >= 65504.0f) {
        return 0x7bff;
    }
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    const int e = (int) (u >> 23) - 127;
    if (e < -25) {
        return 0;
    }
    // keep 10 bits of the mantissa, fewer below 2^-14, where the implicit one becomes explicit
    const int      drop = e < -14 ? 13 + (-14 - e) : 13;
    const uint32_t m    = (u & 0x7fffff) | 0x800000;
    const uint32_t half = 1u << (drop - 1);
    const uint32_t odd  = (m >> drop) & 1;
    const uint32_t r    = (m + half - 1 + odd) >> drop;
    return (uint16_t) (e < -14 ? r : ((uint32_t) (e + 14) << 10) + r);
}

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
// bit planes: 8 coordinates a byte in memory, one coordinate a byte in registers (plain words, no SIMD needed)
//

// tq_spread_bits() back: bit 0 of byte i to bit i
static uint8_t gather_bits(uint64_t x) {
    return (uint8_t) (((x & 0x0101010101010101ull)*0x0102040810204080ull) >> 56);
}

// codes[i] from n_planes planes
static void unpack(const uint8_t * planes, int n_planes, uint8_t * codes) {
    for (int j = 0; j < N/8; ++j) {
        uint64_t w = 0;
        for (int p = 0; p < n_planes; ++p) {
            w |= tq_spread_bits(planes[8*p + j]) << p;
        }
        tq_store_u64(codes + 8*j, w);
    }
}

static void pack(const uint8_t * codes, int n_planes, uint8_t * planes) {
    for (int j = 0; j < N/8; ++j) {
        const uint64_t w = tq_load_u64(codes + 8*j);
        for (int p = 0; p < n_planes; ++p) {
            planes[8*p + j] = gather_bits(w >> p);
        }
    }
}

//
// section 3: transforms and sums of one block
//

// one stage: neighbours' sums to the lower half, differences to the upper. That turns the bits of the index by one, so
// six equal stages are the strides 1, 2, 4, ... 32 and end in natural order; the compiler vectorizes each.
static void fwht_stage(const float * restrict v, float * restrict t) {
    for (int i = 0; i < N/2; ++i) {
        t[i]       = v[2*i] + v[2*i + 1];
        t[i + N/2] = v[2*i] - v[2*i + 1];
    }
}

static void fwht(float * v) {
    float t[N];
    for (int h = 1; h < N; h *= 4) {
        fwht_stage(v, t);
        fwht_stage(t, v);
    }
}

static void scale(float * v, float s) {
    for (int i = 0; i < N; ++i) {
        v[i] *= s;
    }
}

static void rht(float * v, const float * signs) {
    for (int i = 0; i < N; ++i) {
        v[i] *= signs[i];
    }
    fwht(v);
    scale(v, 0.125f);
}

static void rht_inverse(float * v, const float * signs) {
    fwht(v);
    for (int i = 0; i < N; ++i) {
        v[i] *= 0.125f*signs[i];
    }
}

// the order is part of the format: halves are added until one number is left
float tq_block_dot(const float * a, const float * b) {
    float t[N];
    for (int i = 0; i < N; ++i) {
        t[i] = a[i]*b[i];
    }
    for (int h = N/2; h > 0; h /= 2) {
        for (int i = 0; i < h; ++i) {
            t[i] += t[i + h];
        }
    }
    return t[0];
}

static void transform(const float * from, float * to, int64_t n, const float * signs, void (* of_block)(float *, const float *)) {
    memmove(to, from, (size_t) n*sizeof(float));
    for (int64_t i = 0; i < n; i += N) {
        of_block(to + i, signs);
    }
}

void tq_rotate(const struct tq_params * params, const float * x, float * y, int64_t n) {
    transform(x, y, n, params->rotation_signs, rht);
}

void tq_unrotate(const struct tq_params * params, const float * y, float * x, int64_t n) {
    transform(y, x, n, params->rotation_signs, rht_inverse);
}

void tq_sketch(const struct tq_params * params, const float * x, float * y, int64_t n) {
    transform(x, y, n, params->sketch_signs, rht);
}

void tq_unsketch(const struct tq_params * params, const float * y, float * x, int64_t n) {
    transform(y, x, n, params->sketch_signs, rht_inverse);
}

//
// codes
//

// q[i] = c[codes[i]]
static void look_up(const float * c, const uint8_t * codes, float * q) {
    for (int i = 0; i < N; ++i) {
        q[i] = c[codes[i]];
    }
}

// the look-up table of a type, and the codes[i] into it
static const float * unpack_codes(const struct tq_params * params, enum tq_type type, const uint8_t * planes, uint8_t * codes) {
    const struct tq_type_info * info = &type_info[type];
    if (info->kind == TQ_KIND_TCQ) {
        uint8_t index[TQ_TRELLIS_INDEX_BITS*8];
        tq_trellis_index_planes(info->bits, planes, index);
        unpack(index, TQ_TRELLIS_INDEX_BITS, codes);
        return tq_trellis_table(info->bits);
    }
    unpack(planes, info->code_bits, codes);
    return params->quantizers[type].centroids;
}

// q += kappa * unsketch(signs), the sketch's estimate of the residual
static void add_sketch(const struct tq_params * params, float kappa, const uint8_t * sign_bits, float * q) {
    float z[N];
    for (int i = 0; i < N; ++i) {
        z[i] = 1.0f - 2.0f*(float) sign_bits[i];
    }
    rht_inverse(z, params->sketch_signs);
    for (int i = 0; i < N; ++i) {
        q[i] += kappa*z[i];
    }
}

//
// section 4
//

// steps 1-4: x as unit-mean-square u; false where the block is written already (not finite, or zeros)
static bool normalize(const struct tq_params * params, const float * x, uint8_t * block, float * u, float * g, int * e) {
    float amax   = 0.0f;
    bool  finite = true;
    for (int i = 0; i < N; ++i) {
        const float a = fabsf(x[i]);
        finite = finite && a <= FLT_MAX;
        amax   = a > amax ? a : amax;
    }
    if (!finite) {
        block[1] = 0x7e; // d = NaN
        return false;
    }
    if (amax < 0x1p-60f) {
        return false;
    }
    frexpf(amax, e);
    *e = *e > 127 ? 126 : *e - 1; // amax is in [2^e, 2^(e+1)), and 2^-e a normal number

    const float down = ldexpf(1.0f, -*e);
    for (int i = 0; i < N; ++i) {
        u[i] = x[i]*down;
    }
    rht(u, params->rotation_signs);
    *g = 8.0f/sqrtf(tq_block_dot(u, u));
    scale(u, *g);
    return true;
}

// steps 5 and 6: codes of u into planes, and what they decode to
static void encode_codes(const struct tq_params * params, enum tq_type type, const float * u, uint8_t * planes, float * q) {
    const struct tq_type_info * info      = &type_info[type];
    const struct tq_quantizer * quantizer = &params->quantizers[type];

    int32_t n_above[N] = { 0 };
    for (int k = 0; k < (1 << info->code_bits) - 1; ++k) {
        for (int i = 0; i < N; ++i) {
            n_above[i] += u[i] > quantizer->thresholds[k];
        }
    }
    uint8_t codes[N];
    for (int i = 0; i < N; ++i) {
        codes[i] = (uint8_t) n_above[i];
    }
    pack(codes, info->code_bits, planes);
    look_up(quantizer->centroids, codes, q);

    if (info->kind == TQ_KIND_QJL) {
        float   r[N];
        uint8_t sign_bits[N];
        for (int i = 0; i < N; ++i) {
            r[i] = u[i] - q[i];
        }
        rht(r, params->sketch_signs);
        for (int i = 0; i < N; ++i) {
            sign_bits[i] = r[i] < 0.0f;
        }
        pack(sign_bits, 1, planes + 8*info->code_bits);
        add_sketch(params, quantizer->kappa, sign_bits, q);
    }
}

// steps 7 and 8
static void encode_scale(const struct tq_type_info * info, const float * u, const float * q, float g, int e, uint8_t * block) {
    // of least error, or unbiased; not positive only with codebooks that nothing rounds to
    const float uq = tq_block_dot(u, q);
    const float s  = !(uq > 0.0f) ? 0.0f : info->kind == TQ_KIND_MSE ? uq/tq_block_dot(q, q) : tq_block_dot(u, u)/uq;

    const uint16_t d = fp32_to_fp16(ldexpf(s/g, e));
    if (d == 0) {
        memset(block, 0, info->block_size);
        return;
    }
    block[0] = (uint8_t) d;
    block[1] = (uint8_t) (d >> 8);
}

// Blocks go through the trellis several at a time: their searches are independent, and run in parallel lanes.
static void encode_tcq(const struct tq_params * params, enum tq_type type, const float * x, uint8_t * dst, int64_t n) {
    const struct tq_type_info * info = &type_info[type];
    memset(dst, 0, (size_t) (n/N)*info->block_size);

    struct { uint8_t * block; float g; int e; } at[TQ_TRELLIS_BATCH];
    float u[TQ_TRELLIS_BATCH][N];
    float q[TQ_TRELLIS_BATCH][N];
    uint8_t bits[TQ_TRELLIS_BATCH][N]; // c, then w, from the lowest bit
    int n_batch = 0;
    for (int64_t i = 0; i < n; i += N, dst += info->block_size) {
        at[n_batch].block = dst;
        n_batch += normalize(params, x + i, dst, u[n_batch], &at[n_batch].g, &at[n_batch].e);
        if (n_batch == TQ_TRELLIS_BATCH || (i + N == n && n_batch > 0)) {
            tq_trellis_encode(info->bits, n_batch, (const float (*)[N]) u, bits, q);
            for (int b = 0; b < n_batch; ++b) {
                uint8_t * planes = at[b].block + sizeof(uint16_t);
                uint8_t packed[4*8];
                pack(bits[b], info->bits, packed);
                memcpy(planes, packed + 8, (size_t) (info->bits - 1)*8); // w
                memcpy(planes + 8*(info->bits - 1), packed, 8);          // c
                encode_scale(info, u[b], q[b], at[b].g, at[b].e, at[b].block);
            }
            n_batch = 0;
        }
    }
}

void tq_encode(const struct tq_params * params, enum tq_type type, const float * x, void * dst, int64_t n) {
    const struct tq_type_info * info = &type_info[type];
    if (info->kind == TQ_KIND_TCQ) {
        encode_tcq(params, type, x, dst, n);
        return;
    }
    uint8_t * block = dst;
    for (int64_t i = 0; i < n; i += N, block += info->block_size) {
        float u[N];
        float q[N];
        float g;
        int   e;
        memset(block, 0, info->block_size);
        if (normalize(params, x + i, block, u, &g, &e)) {
            encode_codes(params, type, u, block + sizeof(uint16_t), q);
            encode_scale(info, u, q, g, e, block);
        }
    }
}

static float block_scale(const uint8_t * block) {
    return tq_half_to_float((uint16_t) (block[0] | block[1] << 8));
}

//
// section 5
//

void tq_decode_rotated(const struct tq_params * params, enum tq_type type, const void * src, float * y, int64_t n) {
    const struct tq_type_info * info = &type_info[type];
    const uint8_t * block = src;
    for (int64_t i = 0; i < n; i += N, block += info->block_size) {
        const uint8_t * planes = block + sizeof(uint16_t);
        float * v = y + i;
        uint8_t codes[N];
        look_up(unpack_codes(params, type, planes, codes), codes, v);
        if (info->kind == TQ_KIND_QJL) {
            unpack(planes + 8*info->code_bits, 1, codes);
            add_sketch(params, params->quantizers[type].kappa, codes, v);
        }
        scale(v, block_scale(block));
    }
}

void tq_decode(const struct tq_params * params, enum tq_type type, const void * src, float * x, int64_t n) {
    tq_decode_rotated(params, type, src, x, n);
    tq_unrotate(params, x, x, n);
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

//
// section 6
//

// returns the scale
static float encode_int8(const float * v, int8_t * dst) {
    float amax   = 0.0f;
    bool  finite = true;
    for (int i = 0; i < N; ++i) {
        const float a = fabsf(v[i]);
        finite = finite && a <= FLT_MAX;
        amax   = a > amax ? a : amax;
    }
    memset(dst, 0, N);
    if (!finite) { // of 64 rotated coordinates none is finite where one input was not
        return NAN;
    }
    if (amax < 0x1p-100f) {
        return 0.0f;
    }
    const float d  = amax/127.0f;
    const float id = 1.0f/d;
    for (int i = 0; i < N; ++i) {
        // adding 1.5*2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits
        const float f = v[i]*id + 0x1.8p23f;
        uint32_t u;
        memcpy(&u, &f, sizeof(u));
        dst[i] = (int8_t) (u & 0xff);
    }
    return d;
}

void tq_encode_query(const struct tq_params * params, const float * a, tq_query_block * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += N, ++dst) {
        float b[N];
        float f[N];
        memcpy(b, a + i, sizeof(b));
        rht(b, params->rotation_signs);
        memcpy(f, b, sizeof(f));
        rht(f, params->sketch_signs);
        dst->db = encode_int8(b, dst->b);
        dst->df = encode_int8(f, dst->f);
    }
}

float tq_dot(const struct tq_params * params, enum tq_type type, const void * k, const tq_query_block * q, int64_t n) {
    const struct tq_type_info * info = &type_info[type];
    const uint8_t * block = k;

    float sum = 0.0f;
    for (int64_t i = 0; i < n; i += N, block += info->block_size, ++q) {
        const uint8_t * planes = block + sizeof(uint16_t);
        uint8_t codes[N];
        float   c[N];
        look_up(unpack_codes(params, type, planes, codes), codes, c);
        float part[16] = { 0.0f }; // a row of partial sums, so that the loop vectorizes
        for (int j = 0; j < N; j += 16) {
            for (int l = 0; l < 16; ++l) {
                part[l] += c[j + l]*(float) q->b[j + l];
            }
        }
        float s = 0.0f;
        for (int l = 0; l < 16; ++l) {
            s += part[l];
        }
        s *= q->db;
        if (info->kind == TQ_KIND_QJL) {
            unpack(planes + 8*info->code_bits, 1, codes);
            int32_t t = 0;
            for (int j = 0; j < N; ++j) {
                t += q->f[j]*(1 - 2*codes[j]);
            }
            s += params->quantizers[type].kappa*q->df*(float) t;
        }
        sum += block_scale(block)*s;
    }
    return sum;
}
