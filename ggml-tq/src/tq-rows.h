#pragma once

// Rows: sections 3 to 6 of docs/format.md, block by block. Compiled several times, for processors of several kinds: tq-rows-*.c
// bring, before they include this, for one block of 64 coordinates
//   rht, rht_inverse   the transforms of section 3 with given signs, in place
//   dot                sum(a*b) in section 3's order
//   magnitude          the largest magnitude; above FLT_MAX, or not a number, where a coordinate is not finite
//   nearest            codes of a quantizer as planes, and the numbers that they stand for
//   levels             numbers of planes, the indices into a table of 2^bits
//   negative           a plane of 1 where a coordinate is below 0
//   search_trellis     for up to TQ_TRELLIS_BATCH blocks: planes (section 9)
// The order of operations is that of the format, so all give the same bits.

#include <float.h>
#include <math.h>
#include <string.h>

static void scale(float * v, float s) {
    for (int i = 0; i < N; ++i) {
        v[i] *= s;
    }
}

static void transform(const float * from, float * to, int64_t n, const float * signs, bool inverse) {
    memmove(to, from, (size_t) n*sizeof(float));
    for (int64_t i = 0; i < n; i += N) {
        if (inverse) {
            rht_inverse(to + i, signs);
        } else {
            rht(to + i, signs);
        }
    }
}

static const float plus_minus[16] = { 1.0f, -1.0f }; // of a sign's bit

// q += kappa * unsketch(signs), the sketch's estimate of the residual
static void add_sketch(const struct tq_params * params, float kappa, const uint8_t * plane, float * q) {
    float z[N];
    levels(plus_minus, 1, plane, z);
    rht_inverse(z, params->sketch_signs);
    for (int i = 0; i < N; ++i) {
        q[i] += kappa*z[i];
    }
}

// what codes stand for, without the sketch
static void decode_codes(const struct tq_params * params, enum tq_type type, const uint8_t * planes, float * c) {
    const struct tq_type_info * info = tq_get_type_info(type);
    if (info->kind == TQ_KIND_TCQ) {
        uint8_t index[TQ_TRELLIS_INDEX_BITS*8];
        tq_trellis_index_planes(info->bits, planes, index);
        levels(tq_trellis_table(info->bits), TQ_TRELLIS_INDEX_BITS, index, c);
    } else {
        levels(params->quantizers[type].centroids, info->code_bits, planes, c);
    }
}

//
// section 4
//

// 2^e of a normal number
static float power_of_2(int e) {
    const uint32_t u = (uint32_t) (e + 127) << 23;
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

static uint16_t to_half(float f) { // f >= 0 and finite: to nearest even, saturating
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

// steps 1-4: x as unit-mean-square u; false where the block, zeros so far, is written already (not finite, or zeros)
static bool normalize(const struct tq_params * params, const float * x, uint8_t * block, float * u, float * g, int * e) {
    const float most = magnitude(x);
    if (!(most <= FLT_MAX)) {
        block[1] = 0x7e; // d = NaN
        return false;
    }
    if (most < 0x1p-60f) {
        return false;
    }
    uint32_t bits;
    memcpy(&bits, &most, sizeof(bits));
    *e = (int) (bits >> 23) - 127;
    *e = *e > 126 ? 126 : *e; // so that 2^-e is a normal number

    const float down = power_of_2(-*e);
    for (int i = 0; i < N; ++i) {
        u[i] = x[i]*down;
    }
    rht(u, params->rotation_signs);
    *g = 8.0f/sqrtf(dot(u, u));
    scale(u, *g);
    return true;
}

// steps 5 and 6: codes of u into planes, and what they decode to
static void encode_codes(const struct tq_params * params, enum tq_type type, const float * u, uint8_t * planes, float * q) {
    const struct tq_type_info * info      = tq_get_type_info(type);
    const struct tq_quantizer * quantizer = &params->quantizers[type];
    nearest(quantizer, info->code_bits, u, planes, q);
    if (info->kind == TQ_KIND_QJL) {
        uint8_t * signs = planes + 8*info->code_bits;
        float r[N];
        for (int i = 0; i < N; ++i) {
            r[i] = u[i] - q[i];
        }
        rht(r, params->sketch_signs);
        negative(r, signs);
        add_sketch(params, quantizer->kappa, signs, q);
    }
}

// steps 7 and 8
static void encode_scale(const struct tq_type_info * info, const float * u, const float * q, float g, int e, uint8_t * block) {
    // of least error, or unbiased; not positive only with codebooks that nothing rounds to
    const float uq = dot(u, q);
    const float s  = !(uq > 0.0f) ? 0.0f : info->kind == TQ_KIND_MSE ? uq/dot(q, q) : dot(u, u)/uq;

    const uint16_t d = to_half(s/g*power_of_2(e));
    if (d == 0) {
        memset(block, 0, info->block_size);
        return;
    }
    block[0] = (uint8_t) d;
    block[1] = (uint8_t) (d >> 8);
}

// Blocks go through the trellis several at a time: their searches are independent, and run in parallel lanes.
static void encode_tcq(const struct tq_params * params, enum tq_type type, const float * x, uint8_t * dst, int64_t n) {
    const struct tq_type_info * info = tq_get_type_info(type);
    memset(dst, 0, (size_t) (n/N)*info->block_size);

    struct { uint8_t * block; float g; int e; } at[TQ_TRELLIS_BATCH];
    float   u     [TQ_TRELLIS_BATCH][N];
    float   q     [N];
    uint8_t planes[TQ_TRELLIS_BATCH][4*8];
    int n_batch = 0;
    for (int64_t i = 0; i < n; i += N, dst += info->block_size) {
        at[n_batch].block = dst;
        n_batch += normalize(params, x + i, dst, u[n_batch], &at[n_batch].g, &at[n_batch].e);
        if (n_batch == TQ_TRELLIS_BATCH || (i + N == n && n_batch > 0)) {
            search_trellis(info->bits, n_batch, (const float (*)[N]) u, planes);
            for (int b = 0; b < n_batch; ++b) {
                memcpy(at[b].block + sizeof(uint16_t), planes[b], 8*(size_t) info->bits);
                decode_codes(params, type, planes[b], q);
                encode_scale(info, u[b], q, at[b].g, at[b].e, at[b].block);
            }
            n_batch = 0;
        }
    }
}

static void encode(const struct tq_params * params, enum tq_type type, const float * x, uint8_t * block, int64_t n) {
    const struct tq_type_info * info = tq_get_type_info(type);
    if (info->kind == TQ_KIND_TCQ) {
        encode_tcq(params, type, x, block, n);
        return;
    }
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

//
// section 5
//

static float block_scale(const uint8_t * block) {
    return tq_half_to_float((uint16_t) (block[0] | block[1] << 8));
}

static void decode(const struct tq_params * params, enum tq_type type, bool rotated, const uint8_t * block, float * y, int64_t n) {
    const struct tq_type_info * info = tq_get_type_info(type);
    for (int64_t i = 0; i < n; i += N, block += info->block_size) {
        const uint8_t * planes = block + sizeof(uint16_t);
        float * v = y + i;
        decode_codes(params, type, planes, v);
        if (info->kind == TQ_KIND_QJL) {
            add_sketch(params, params->quantizers[type].kappa, planes + 8*info->code_bits, v);
        }
        scale(v, block_scale(block));
        if (!rotated) {
            rht_inverse(v, params->rotation_signs);
        }
    }
}

//
// section 6
//

// returns the scale
static float encode_int8(const float * v, int8_t * dst) {
    const float most = magnitude(v);
    memset(dst, 0, N);
    if (!(most <= FLT_MAX)) { // of 64 rotated coordinates none is finite where one input was not
        return NAN;
    }
    if (most < 0x1p-100f) {
        return 0.0f;
    }
    const float d  = most/127.0f;
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

static void encode_query(const struct tq_params * params, const float * a, tq_query_block * dst, int64_t n) {
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

// sum(c*b)
static float dot_int8(const float * c, const int8_t * b) {
    float part[16] = { 0.0f }; // a row of partial sums, so that the loop vectorizes
    for (int j = 0; j < N; j += 16) {
        for (int l = 0; l < 16; ++l) {
            part[l] += c[j + l]*(float) b[j + l];
        }
    }
    float s = 0.0f;
    for (int l = 0; l < 16; ++l) {
        s += part[l];
    }
    return s;
}

static float dot_query(const struct tq_params * params, enum tq_type type, const uint8_t * block, const tq_query_block * q, int64_t n) {
    const struct tq_type_info * info = tq_get_type_info(type);
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i += N, block += info->block_size, ++q) {
        const uint8_t * planes = block + sizeof(uint16_t);
        float c[N];
        decode_codes(params, type, planes, c);
        float s = dot_int8(c, q->b)*q->db;
        if (info->kind == TQ_KIND_QJL) {
            levels(plus_minus, 1, planes + 8*info->code_bits, c);
            s += params->quantizers[type].kappa*q->df*dot_int8(c, q->f);
        }
        sum += block_scale(block)*s;
    }
    return sum;
}

#define TQ_ROWS_FUNCTIONS(name) { { name, available }, encode, decode, transform, encode_query, dot_query }
