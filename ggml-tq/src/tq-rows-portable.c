// Rows in the C of every machine: the reference of the others.
// Compile without floating-point contraction: encoders must agree to the bit.

#include "tq-internal.h"

#include <float.h>
#include <math.h>
#include <string.h>

//
// section 3
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

static void rht(float * v, const float * signs) {
    for (int i = 0; i < N; ++i) {
        v[i] *= signs[i];
    }
    fwht(v);
    for (int i = 0; i < N; ++i) {
        v[i] *= 0.125f;
    }
}

static void rht_inverse(float * v, const float * signs) {
    fwht(v);
    for (int i = 0; i < N; ++i) {
        v[i] *= 0.125f*signs[i];
    }
}

// the order is part of the format: halves are added until one number is left
static float dot(const float * a, const float * b) {
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

static float magnitude(const float * x) {
    float most   = 0.0f;
    bool  finite = true;
    for (int i = 0; i < N; ++i) {
        const float a = fabsf(x[i]);
        finite = finite && a <= FLT_MAX;
        most   = a > most ? a : most;
    }
    return finite ? most : INFINITY;
}

//
// codes
//

// bit 0 of byte i to bit i, as tq_spread_bits back
static uint8_t gather_bits(uint64_t x) {
    return (uint8_t) (((x & 0x0101010101010101ull)*0x0102040810204080ull) >> 56);
}

// codes[i] to planes: 8 coordinates a byte
static void pack(const uint8_t * codes, int n_planes, uint8_t * planes) {
    for (int j = 0; j < N/8; ++j) {
        const uint64_t w = tq_load_u64(codes + 8*j);
        for (int p = 0; p < n_planes; ++p) {
            planes[8*p + j] = gather_bits(w >> p);
        }
    }
}

static void nearest(const struct tq_quantizer * quantizer, int bits, const float * u, uint8_t * planes, float * q) {
    int32_t n_above[N] = { 0 };
    for (int k = 0; k < (1 << bits) - 1; ++k) {
        for (int i = 0; i < N; ++i) {
            n_above[i] += u[i] > quantizer->thresholds[k];
        }
    }
    uint8_t codes[N];
    for (int i = 0; i < N; ++i) {
        codes[i] = (uint8_t) n_above[i];
        q[i]     = quantizer->centroids[codes[i]];
    }
    pack(codes, bits, planes);
}

static void levels(const float * table, int bits, const uint8_t * planes, float * q) {
    for (int j = 0; j < N/8; ++j) {
        uint64_t w = 0;
        for (int p = 0; p < bits; ++p) {
            w |= tq_spread_bits(planes[8*p + j]) << p;
        }
        for (int i = 0; i < 8; ++i) {
            q[8*j + i] = table[w >> 8*i & 0xff];
        }
    }
}

static void negative(const float * x, uint8_t * plane) {
    uint8_t bits[N];
    for (int i = 0; i < N; ++i) {
        bits[i] = x[i] < 0.0f;
    }
    pack(bits, 1, plane);
}

static void search_trellis(int bits, int n_blocks, const float (* u)[N], uint8_t (* planes)[4*8]) {
    uint8_t codes[TQ_TRELLIS_BATCH][N];
    tq_trellis_encode(bits, n_blocks, u, codes);
    for (int b = 0; b < n_blocks; ++b) {
        pack(codes[b], bits, planes[b]);
    }
}

#include "tq-rows.h"

static bool available(void) {
    return true;
}

const struct tq_rows_functions tq_rows_portable = TQ_ROWS_FUNCTIONS("portable");
