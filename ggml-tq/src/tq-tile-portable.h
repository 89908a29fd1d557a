#pragma once

// Tiles in the C of every machine. Included by tq-tile.c.
//
// Keys: [64 coordinates][64 rows] bytes; values: [64 rows][64 coordinates]. Numbers are words in their own order.

ALWAYS_INLINE void portable_unpack_block(enum tq_kind kind, int bits, const int8_t * table, const uint8_t * block, int8_t * levels, int8_t * signs, size_t step) {
    uint64_t w[8];
    const int n = index_planes(kind, bits, block, w);
    for (int i = 0; i < N; i += 8) {
        uint64_t index = 0; // of 8 coordinates, a byte each
        for (int p = 0; p < n; ++p) {
            index |= tq_spread_bits((uint8_t) (w[p] >> i)) << p;
        }
        const uint64_t set = kind == TQ_KIND_QJL ? tq_spread_bits((uint8_t) (w[bits - 1] >> i)) : 0;
        for (int j = 0; j < 8; ++j) {
            levels[(i + j)*step] = table[index >> 8*j & 0xff];
            if (kind == TQ_KIND_QJL) {
                signs[(i + j)*step] = (int8_t) (2*(int) (set >> 8*j & 1) - 1);
            }
        }
    }
}

static void portable_unpack(const struct tq_tile_type * tile, bool values, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    const size_t next = values ? N : 1;
    const size_t step = values ? 1 : N;
    for (int r = 0; r < N; ++r) {
        const uint8_t * block = row_at(first, stride, n_rows, r);
        FOR_TYPE(tile->type, portable_unpack_block, tile->table, block, dst[0] + r*next, dst[1] + r*next, step)
    }
}

static void portable_scales(const uint16_t * half, float * d) {
    for (int r = 0; r < N; ++r) {
        d[r] = tq_half_to_float(half[r]);
    }
}

static void portable_split(bool values, const float * x, const float * weights, float scale, struct tq_tile_numbers * dst) {
    (void) values;
    int16_t n[N];
    for (int i = 0; i < N; ++i) {
        const float v = weights ? x[i]*scale*weights[i] : x[i]*scale;
        n[i] = (int16_t) (v + 0x1.8p23f - 0x1.8p23f); // to the nearest integer
    }
    memcpy(dst->digits, n, sizeof(n));
    dst->sum = 0;
}

static void portable_multiply(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) {
    for (int r = 0; r < n; ++r) {
        int16_t v[N];
        int32_t s[N];
        memcpy(v, numbers[r].digits, sizeof(v));
        memcpy(s, sums + r*step, sizeof(s));
        for (int k = 0; k < N; ++k) {
            const int8_t * b = bytes + k*N;
            for (int l = 0; l < N; ++l) {
                s[l] += b[l]*v[k];
            }
        }
        memcpy(sums + r*step, s, sizeof(s));
    }
}

static int portable_coordinate(int i) {
    return i;
}

#ifdef FP_FAST_FMAF

ALWAYS_INLINE void portable_step(float w, const float * a, float * s) {
    for (int j = 0; j < TQ_CENTER_HALF; ++j) {
        s[j] = fmaf(w, a[j], s[j]);
    }
}

#else

// a*b + c, rounded once
static float portable_mul_add(float a, float b, float c) {
    const double p = (double) a*b; // exact
    const double s = p + c;
    const double t = s - p;
    const double e = (p - (s - t)) + (c - t); // p + c is s + e
    // s to the odd one of its two neighbours, from which a float rounds as from p + c
    uint64_t u;
    memcpy(&u, &s, sizeof(u));
    u += e == 0.0 || (u & 1) ? 0 : (e > 0.0) == (s > 0.0) ? 1 : UINT64_MAX;
    double odd;
    memcpy(&odd, &u, sizeof(odd));
    return (float) odd;
}

// A sum in double precision rounds like the exact one unless it is half way between floats, or not a normal float.
ALWAYS_INLINE void portable_step(float w, const float * a, float * s) {
    if (w == 0.0f) {
        for (int j = 0; j < TQ_CENTER_HALF; ++j) {
            s[j] += w*a[j];
        }
        return;
    }
    double   sum[TQ_CENTER_HALF];
    uint64_t u  [TQ_CENTER_HALF];
    for (int j = 0; j < TQ_CENTER_HALF; ++j) {
        sum[j] = (double) w*a[j] + s[j];
    }
    memcpy(u, sum, sizeof(u));
    uint64_t careful = 0; // the highest bit
    for (int j = 0; j < TQ_CENTER_HALF; ++j) {
        const uint64_t half = (u[j] & 0x1fffffff) ^ 0x10000000;     // 0: half way
        careful |= half - 1;
        careful |= (u[j] << 1) - (UINT64_C(897) << 53);              // exponents below a normal float's; none is beyond a float's
    }
    if (careful >> 63) {
        for (int j = 0; j < TQ_CENTER_HALF; ++j) {
            s[j] = portable_mul_add(w, a[j], s[j]);
        }
        return;
    }
    for (int j = 0; j < TQ_CENTER_HALF; ++j) {
        s[j] = (float) sum[j];
    }
}

#endif

static void portable_turns(const float * angles, int32_t n, const float * const * w, int n_queries, float * sums, size_t step) {
    for (int r = 0; r < n_queries; ++r) {
        float e[TQ_CENTER_HALF];
        float o[TQ_CENTER_HALF];
        for (int j = 0; j < TQ_CENTER_HALF; ++j) {
            e[j] = w[r][2*n];
            o[j] = 0.0f;
        }
        for (int32_t k = 0; k < n; ++k) {
            portable_step(w[r][k],     angles + k*TQ_CENTER_HALF,       e);
            portable_step(w[r][k + n], angles + (k + n)*TQ_CENTER_HALF, o);
        }
        float * middle = sums + r*step + TQ_CENTER_HALF;
        for (int j = 0; j < TQ_CENTER_HALF; ++j) {
            middle[j]      += e[j] + o[j];
            middle[-1 - j] += e[j] - o[j];
        }
    }
}

static bool portable_available(void) {
    return true;
}

static const struct tq_tile_functions tile_portable = {
    { "portable", portable_available }, portable_unpack, portable_scales, portable_split, portable_multiply, portable_coordinate, portable_turns,
};
