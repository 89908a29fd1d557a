// The C library against docs/format.md: sizes, distortion, bias, scores, special rows, bounds.
// usage: test-tq [seed [tiles]]; without a seed the inputs are fresh at each run, and the seed is printed. tiles: only what there are
// several implementations of (an emulator takes minutes for the rest).

#include "ggml-tq.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DIM      128
#define MAX_ROW  (DIM*4)
#define CANARY   0xa5

static int n_failed = 0;

static const struct tq_params * params; // that the tests run with

#define CHECK(cond, ...) do { \
    if (!(cond)) { \
        printf("FAIL %s:%d, %s rows, %s tiles: %s: ", __FILE__, __LINE__, tq_rows_use(NULL), tq_tile_use(NULL), #cond); printf(__VA_ARGS__); printf("\n"); \
        n_failed++; \
    } } while (0)

static uint64_t rng_state;

static uint64_t rng_u64(void) {
    uint64_t z = (rng_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27))*0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static double rng_uniform(void) {
    return ((double) (rng_u64() >> 11) + 0.5)*0x1p-53;
}

static void rng_normal(float * x, int n, float scale) {
    for (int i = 0; i < n; ++i) {
        x[i] = (float) (sqrt(-2.0*log(rng_uniform()))*cos(6.283185307179586*rng_uniform()))*scale;
    }
}

static double dot(const float * a, const float * b, int n) {
    double s = 0.0;
    for (int i = 0; i < n; ++i) {
        s += (double) a[i]*b[i];
    }
    return s;
}

// encodes into a buffer with canaries on both sides and decodes it again
static void round_trip(enum tq_type type, const float * x, float * y, int n, uint8_t * packed) {
    uint8_t buf[64 + MAX_ROW + 64];
    const size_t size = tq_row_size(type, n);
    memset(buf, CANARY, sizeof(buf));
    tq_encode(params, type, x, buf + 64, n);
    for (size_t i = 0; i < 64; ++i) {
        CHECK(buf[i] == CANARY && buf[64 + size + i] == CANARY, "write out of bounds");
    }
    tq_decode(params, type, buf + 64, y, n);
    if (packed) {
        memcpy(packed, buf + 64, size);
    }
}

static void test_types(void) {
    static const struct { const char * name; int bits; double bpv; } want[TQ_TYPE_COUNT] = {
        { "tq2_mse", 2, 2.25 }, { "tq3_mse", 3, 3.25 }, { "tq4_mse", 4, 4.25 },
        { "tq2_qjl", 2, 2.25 }, { "tq3_qjl", 3, 3.25 }, { "tq4_qjl", 4, 4.25 },
        { "tq2_tcq", 2, 2.25 }, { "tq3_tcq", 3, 3.25 }, { "tq4_tcq", 4, 4.25 },
    };
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const struct tq_type_info * info = tq_get_type_info((enum tq_type) t);
        CHECK(strcmp(info->name, want[t].name) == 0 && info->bits == want[t].bits, "%s", info->name);
        CHECK(tq_bits_per_value((enum tq_type) t) == want[t].bpv, "%s", info->name);
        CHECK(tq_type_from_name(info->name, 'k') == (enum tq_type) t, "%s", info->name);
        CHECK(tq_row_size((enum tq_type) t, 64) == info->block_size, "%s", info->name);
        CHECK(tq_row_size((enum tq_type) t, 576) == 9*info->block_size, "%s", info->name);
        CHECK(tq_row_size((enum tq_type) t, 80) == 0 && tq_row_size((enum tq_type) t, 0) == 0, "%s", info->name);
        CHECK(tq_row_size((enum tq_type) t, -64) == 0, "%s", info->name);
    }
    CHECK(tq_get_type_info(TQ_TYPE_COUNT) == NULL && tq_row_size(TQ_TYPE_COUNT, 64) == 0, "invalid type");
    CHECK(tq_type_from_name("tq3", 'k') == TQ_TYPE_TQ3_QJL && tq_type_from_name("tq3", 'v') == TQ_TYPE_TQ3_MSE, "roles");
    static const char * bad[] = { "", "tq", "tq1", "tq5", "tq9", "tq33", "tq3_", "TQ3", "tq3_mse " };
    for (size_t i = 0; i < sizeof(bad)/sizeof(bad[0]); ++i) {
        CHECK(tq_type_from_name(bad[i], 'k') == TQ_TYPE_COUNT, "'%s'", bad[i]);
    }
}

static void test_rotation(void) {
    float x[DIM], y[DIM], z[DIM];
    rng_normal(x, DIM, 3.0f);
    tq_rotate(params, x, y, DIM);
    CHECK(fabs(dot(y, y, DIM)/dot(x, x, DIM) - 1.0) < 1e-5, "norm changed");
    tq_unrotate(params, y, z, DIM);
    for (int i = 0; i < DIM; ++i) {
        CHECK(fabsf(z[i] - x[i]) < 1e-5f, "unrotate(rotate(x)) != x");
    }
    // a single spike must spread: every rotated coordinate has the same magnitude
    memset(x, 0, sizeof(x));
    x[5] = 8.0f;
    tq_rotate(params, x, x, DIM);
    for (int i = 0; i < 64; ++i) {
        CHECK(fabsf(x[i]) == 1.0f && x[64 + i] == 0.0f, "one-hot row, coordinate %d", i);
    }
}

// errors of many N(0,1) rows; bounds are the exact ones of the codebooks plus sampling error
static void test_distortion(void) {
    // D_mse of 2, 3, 4 bits, then (1 - 2/pi) of D_mse of 1, 2, 3 bits with the unbiased scale, then the trained trellis codes'
    static const double max_error[TQ_TYPE_COUNT] = { 0.118, 0.0347, 0.0096, 0.155, 0.0455, 0.0130, 0.0790, 0.0188, 0.0050 };
    const int n_rows = 20000;

    printf("%-8s %10s %12s %12s %12s\n", "type", "error", "component", "d*ip error", "ip slope");
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        double err = 0.0, energy = 0.0, component = 0.0, ip_err = 0.0, ip_xy = 0.0, ip_yy = 0.0;
        for (int r = 0; r < n_rows; ++r) {
            float x[DIM], y[DIM], a[DIM], e[DIM];
            rng_normal(x, DIM, 1.0f);
            rng_normal(a, DIM, 1.0f);
            round_trip(type, x, y, DIM, NULL);
            for (int i = 0; i < DIM; ++i) {
                e[i] = y[i] - x[i];
            }
            const double xx = dot(x, x, DIM);
            err       += dot(e, e, DIM);
            energy    += xx;
            component += dot(x, y, DIM)/xx;
            const double ip = dot(a, x, DIM);
            ip_err += pow(dot(a, e, DIM), 2)/(xx*dot(a, a, DIM));
            ip_xy  += ip*dot(a, y, DIM);
            ip_yy  += ip*ip;
        }
        err       /= energy;
        component /= n_rows;
        ip_err    *= (double) DIM/n_rows;
        const double slope = ip_xy/ip_yy;
        printf("%-8s %10.5f %12.5f %12.5f %12.5f\n", tq_get_type_info(type)->name, err, component, ip_err, slope);
        CHECK(err < max_error[t], "%s: %f", tq_get_type_info(type)->name, err);
        // with an independent query, d times the squared inner-product error is the error itself
        CHECK(fabs(ip_err/err - 1.0) < 0.1, "%s: %f, error %f", tq_get_type_info(type)->name, ip_err, err);
        if (type >= TQ_TYPE_TQ2_QJL) { // unbiased along x, up to the scale's fp16 rounding
            CHECK(fabs(component - 1.0) < 1e-4, "%s: %f", tq_get_type_info(type)->name, component);
            CHECK(fabs(slope - 1.0) < 0.02, "%s: inner products are biased: slope %f", tq_get_type_info(type)->name, slope);
        } else {                       // least squares: shrinks by exactly the error
            CHECK(fabs(slope - (1.0 - err)) < 0.02, "%s: slope %f", tq_get_type_info(type)->name, slope);
            CHECK(fabs(component - (1.0 - err)) < 2e-3, "%s: %f", tq_get_type_info(type)->name, component);
        }
    }
}

static void test_dot(void) {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        double err = 0.0, power = 0.0;
        for (int r = 0; r < 2000; ++r) {
            const int n = 64*(1 + (int) (rng_u64()%8));
            float x[MAX_ROW], y[MAX_ROW], a[MAX_ROW];
            uint8_t packed[MAX_ROW];
            tq_query_block q[MAX_ROW/64];
            rng_normal(x, n, 2.0f);
            rng_normal(a, n, 0.5f);
            x[rng_u64()%n] *= 30.0f; // an outlier channel
            round_trip(type, x, y, n, packed);
            tq_encode_query(params, a, q, n);
            const double want = dot(a, y, n);
            const double got  = tq_dot(params, type, packed, q, n);
            err   += pow(got - want, 2);
            power += dot(a, a, n)*dot(y, y, n)/n;
        }
        // int8 rounding of a Gaussian query: step^2/12 with step about 2.6 sigma/127
        CHECK(sqrt(err/power) < 0.01, "%s: score error %f of the score's rms", tq_get_type_info(type)->name, sqrt(err/power));
    }
}

// tiles of integers against the decoder: queries against 64 keys, and weighted sums of up to 64 values
static void test_tiles(void) {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        const char * name   = tq_get_type_info(type)->name;
        const size_t stride = tq_row_size(type, 128);
        const int    n_rows = 1 + (int) (rng_u64()%64);
        const size_t first  = tq_row_size(type, 64); // the second block of rows of two
        uint8_t packed[64*2*34];
        float   rows[64][64];
        for (int r = 0; r < n_rows; ++r) {
            float x[128];
            rng_normal(x, 128, 3.0f);
            tq_encode(params, type, x, packed + r*stride, 128);
            tq_decode_rotated(params, type, packed + r*stride + first, rows[r], 64);
            float y[64];
            tq_decode(params, type, packed + r*stride + first, x, 64);
            tq_rotate(params, x, y, 64);
            for (int i = 0; i < 64; ++i) {
                CHECK(fabsf(y[i] - rows[r][i]) < 1e-4f, "%s: decoded without turning", name);
            }
        }
        enum { N_QUERIES = 7 }; // the last is zeros
        const struct tq_tile_type tile = tq_tile_type_init(params, type);
        static int8_t bytes[2][TQ_TILE_SIZE];
        float d[64];
        float q       [N_QUERIES][64];
        float sketched[N_QUERIES][64];
        float max[2][N_QUERIES] = { { 0.0f } };
        struct tq_tile_numbers numbers[2][N_QUERIES]; // of parts
        rng_normal(q[0], N_QUERIES*64, 1.0f);
        memset(q[N_QUERIES - 1], 0, sizeof(q[0]));
        for (int k = 0; k < N_QUERIES; ++k) {
            tq_sketch(params, q[k], sketched[k], 64);
            for (int i = 0; i < 64; ++i) {
                max[0][k] = fmaxf(max[0][k], fabsf(q[k][i]));
                max[1][k] = fmaxf(max[1][k], fabsf(sketched[k][i]));
            }
            tq_tile_split(false, q[k],        NULL, max[0][k], &numbers[0][k]);
            tq_tile_split(false, sketched[k], NULL, max[1][k], &numbers[1][k]);
        }
        tq_tile_unpack(&tile, false, packed + first, stride, n_rows, bytes);
        tq_tile_scales(packed + first, stride, n_rows, d);
        float scores[N_QUERIES][64] = { { 0.0f } };
        for (int part = 0; part < tile.n_parts; ++part) {
            int32_t sums[N_QUERIES][64];
            for (int k = 0; k < N_QUERIES; ++k) {
                for (int r = 0; r < 64; ++r) {
                    sums[k][r] = 100*k + r; // is added to
                }
            }
            tq_tile_multiply(bytes[part], numbers[part], N_QUERIES, sums[0], 64);
            for (int k = 0; k < N_QUERIES; ++k) {
                int32_t one[64] = { 0 };
                tq_tile_multiply(bytes[part], &numbers[part][k], 1, one, 64);
                for (int r = 0; r < 64; ++r) {
                    CHECK(sums[k][r] == one[r] + 100*k + r, "%s: sums depend on the number of queries", name);
                    scores[k][r] += tq_tile_number_scale(max[part][k])*tile.unit[part]*d[r]*(float) one[r];
                }
            }
        }
        double err = 0.0, power = 0.0;
        for (int k = 0; k < N_QUERIES; ++k) {
            for (int r = 0; r < 64; ++r) {
                const double want = r < n_rows ? dot(q[k], rows[r], 64) : 0.0;
                err   += (scores[k][r] - want)*(scores[k][r] - want);
                power += r < n_rows ? dot(q[k], q[k], 64)*dot(rows[r], rows[r], 64)/64 : 0.0; // of scores by chance
            }
        }
        // levels are rounded to 8 bits, those of a trellis exactly
        const double max_error = tq_get_type_info(type)->kind == TQ_KIND_TCQ ? 1e-8 : 4e-5;
        CHECK(err/power < max_error, "%s: scores: %g", name, err/power);

        float weights[64];
        float max_weighted = 0.0f;
        for (int r = 0; r < 64; ++r) {
            weights[r] = r < n_rows ? (float) rng_uniform() : 0.0f;
            CHECK(r < n_rows || d[r] == 0.0f, "%s: rows that are not there have no scale", name);
            max_weighted = fmaxf(max_weighted, fabsf(weights[r]*d[r]));
        }
        tq_tile_unpack(&tile, true, packed + first, stride, n_rows, bytes);
        tq_tile_split(true, weights, d, max_weighted, &numbers[0][0]);
        float sum[2][64] = { { 0.0f } };
        for (int part = 0; part < tile.n_parts; ++part) {
            int32_t sums[64] = { 0 };
            tq_tile_multiply(bytes[part], &numbers[0][0], 1, sums, 64);
            for (int i = 0; i < 64; ++i) {
                sum[part][tq_tile_coordinate(i)] = tq_tile_number_scale(max_weighted)*tile.unit[part]*(float) sums[i];
            }
        }
        tq_unsketch(params, sum[1], sum[1], 64);
        err = power = 0.0;
        for (int i = 0; i < 64; ++i) {
            double want = 0.0;
            for (int r = 0; r < n_rows; ++r) {
                want += (double) weights[r]*rows[r][i];
            }
            const double got = (double) sum[0][i] + sum[1][i];
            err   += (got - want)*(got - want);
            power += want*want;
        }
        CHECK(err/power < max_error, "%s: sums: %g", name, err/power);
    }
    struct tq_tile_numbers numbers;
    float   x[64] = { 1.0f };
    int32_t sums[64] = { 0 };
    static int8_t bytes[TQ_TILE_SIZE];
    memset(bytes, 0x55, sizeof(bytes));
    const float not_finite[] = { NAN, INFINITY, 0.0f };
    for (int i = 0; i < 3; ++i) {
        tq_tile_split(true, x, NULL, not_finite[i], &numbers);
        tq_tile_multiply(bytes, &numbers, 1, sums, 64);
        CHECK(sums[0] == 0 && sums[63] == 0, "numbers without a scale are 0");
    }
    CHECK(isnan(tq_tile_number_scale(NAN)), "and their scale is not a number");
}

// rows scaled by powers of two must have the same codes and exactly scaled blocks: no path depends on magnitude
static void test_scaling(void) {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        float x[DIM], y[DIM], xs[DIM], ys[DIM];
        uint8_t p[MAX_ROW], ps[MAX_ROW];
        rng_normal(x, DIM, 1.0f);
        round_trip(type, x, y, DIM, p);
        for (int e = -12; e <= 12; ++e) {
            for (int i = 0; i < DIM; ++i) {
                xs[i] = ldexpf(x[i], e);
            }
            round_trip(type, xs, ys, DIM, ps);
            const size_t bs = tq_get_type_info(type)->block_size;
            CHECK(memcmp(p + 2, ps + 2, bs - 2) == 0 && memcmp(p + bs + 2, ps + bs + 2, bs - 2) == 0, "codes differ at 2^%d", e);
            for (int i = 0; i < DIM; ++i) {
                CHECK(ys[i] == ldexpf(y[i], e), "values differ at 2^%d", e);
            }
        }
    }
}

static bool all_zero(const uint8_t * p, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        if (p[i]) {
            return false;
        }
    }
    return true;
}

static void test_special_rows(void) {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        const char * name = tq_get_type_info(type)->name;
        const size_t size = tq_row_size(type, DIM);
        const size_t bs   = tq_get_type_info(type)->block_size;
        float x[DIM], y[DIM];
        uint8_t p[MAX_ROW];

        memset(x, 0, sizeof(x));
        round_trip(type, x, y, DIM, p);
        CHECK(all_zero(p, size) && dot(y, y, DIM) == 0.0, "%s: zero row", name);
        for (int i = 0; i < DIM; ++i) {
            x[i] = i%2 ? -0.0f : FLT_TRUE_MIN*(float) i;
        }
        round_trip(type, x, y, DIM, p);
        CHECK(all_zero(p, size), "%s: denormal row", name);

        static const float constants[] = { 1.0f, -3.0f, 1e-4f, 1e4f };
        for (size_t c = 0; c < sizeof(constants)/sizeof(constants[0]); ++c) {
            double e = 0.0;
            for (int i = 0; i < DIM; ++i) {
                x[i] = constants[c];
            }
            round_trip(type, x, y, DIM, p);
            for (int i = 0; i < DIM; ++i) {
                e += pow(y[i] - x[i], 2);
            }
            CHECK(e < 0.6*dot(x, x, DIM) && tq_validate(type, p, DIM), "%s: constant row %g: error %g", name, constants[c], e/dot(x, x, DIM));
        }

        // one block too large for fp16: saturates, direction kept, its neighbour untouched
        rng_normal(x, DIM, 1.0f);
        for (int i = 0; i < 64; ++i) {
            x[i] *= FLT_MAX/8.0f;
        }
        round_trip(type, x, y, DIM, p);
        CHECK((p[0] | p[1] << 8) == 0x7bff && tq_validate(type, p, DIM), "%s: huge row", name);
        CHECK(dot(x + 64, y + 64, 64)/dot(x + 64, x + 64, 64) > 0.7, "%s: neighbour of a huge row", name);
        for (int i = 0; i < DIM; ++i) {
            CHECK(isfinite(y[i]), "%s: huge row", name);
        }
        for (int i = 0; i < DIM; ++i) {
            x[i] = FLT_MAX;
        }
        round_trip(type, x, y, DIM, p);
        CHECK(tq_validate(type, p, DIM), "%s: FLT_MAX row", name);

        // NaN and Inf poison their block, and only theirs
        static const float poison[] = { NAN, INFINITY, -INFINITY };
        for (size_t c = 0; c < 3; ++c) {
            rng_normal(x, DIM, 1.0f);
            x[rng_u64()%64] = poison[c];
            round_trip(type, x, y, DIM, p);
            CHECK(!tq_validate(type, p, DIM) && tq_validate(type, p + bs, 64), "%s: %f", name, poison[c]);
            for (int i = 0; i < 64; ++i) {
                CHECK(isnan(y[i]) && isfinite(y[64 + i]), "%s: %f", name, poison[c]);
            }
            tq_query_block q[DIM/64];
            rng_normal(y, DIM, 1.0f);
            tq_encode_query(params, y, q, DIM);
            CHECK(isnan(tq_dot(params, type, p, q, DIM)), "%s: score of a poisoned row", name);
            tq_encode_query(params, x, q, DIM);
            round_trip(type, y, y, DIM, p);
            CHECK(isnan(tq_dot(params, type, p, q, DIM)), "%s: score of a poisoned query", name);
        }
        memset(x, 0, sizeof(x));
        tq_query_block q[DIM/64];
        tq_encode_query(params, x, q, DIM);
        rng_normal(x, DIM, 1.0f);
        round_trip(type, x, y, DIM, p);
        CHECK(tq_dot(params, type, p, q, DIM) == 0.0f, "%s: score of a zero query", name);

        // whatever bytes lie in a cache, decoding and scoring stay in bounds and say NaN only if a scale is not finite
        for (int r = 0; r < 200; ++r) {
            for (size_t i = 0; i < size; ++i) {
                p[i] = (uint8_t) rng_u64();
            }
            tq_decode(params, type, p, y, DIM);
            tq_encode_query(params, x, q, DIM);
            const bool  valid = tq_validate(type, p, DIM);
            const float s     = tq_dot(params, type, p, q, DIM);
            CHECK(!valid || (isfinite(s) && isfinite(y[0]) && isfinite(y[DIM - 1])), "%s: random bytes", name);
        }
    }
}

static void test_params(void) {
    static const float c[16] = { -3.0f, -2.0f, -1.0f, -0.5f, 0.25f, 1.0f, 2.0f, 4.0f, 4.5f, 5.0f, 5.5f, 6.0f, 6.5f, 7.0f, 7.5f, 8.0f };
    struct tq_params p = *tq_params_default();
    tq_params_set_seeds(&p, p.rotation_seed, p.sketch_seed);
    CHECK(memcmp(&p, tq_params_default(), sizeof(p)) == 0, "the built-in set is what its own seeds and hash say");

    for (int t = 0; t < TQ_QUANTIZER_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        const size_t n = (size_t) 1 << tq_get_type_info(type)->code_bits;
        const struct tq_params before = p;
        float bad[16];
        CHECK(tq_params_set_codebook(&p, type, c, n - 1), "length");
        CHECK(tq_params_set_codebook(&p, type, c, n + 1), "length");
        static const float values[] = { NAN, INFINITY, -INFINITY, 8.5f, -9.0f };
        for (size_t i = 0; i < sizeof(values)/sizeof(values[0]); ++i) {
            memcpy(bad, c, sizeof(bad));
            bad[rng_u64()%n] = values[i];
            CHECK(tq_params_set_codebook(&p, type, bad, n), "%f", values[i]);
        }
        memcpy(bad, c, sizeof(bad));
        bad[1] = bad[0];
        CHECK(tq_params_set_codebook(&p, type, bad, n), "equal centroids");
        const bool qjl = tq_get_type_info(type)->kind == TQ_KIND_QJL;
        CHECK(tq_params_set_kappa(&p, type, NAN) && tq_params_set_kappa(&p, type, -0.1f) && tq_params_set_kappa(&p, type, 2.1f), "kappa");
        CHECK(qjl || tq_params_set_kappa(&p, type, 0.5f), "kappa without a sketch");
        CHECK(memcmp(&p, &before, sizeof(p)) == 0, "refused values change nothing");

        CHECK(!tq_params_set_codebook(&p, type, c, n) && p.hash != before.hash, "a valid codebook");
        CHECK(!qjl || (!tq_params_set_kappa(&p, type, 0.5f) && p.quantizers[t].kappa == 0.5f), "a valid kappa");
    }
    CHECK(tq_params_set_codebook(&p, TQ_TYPE_TQ4_TCQ, c, 16) && tq_params_set_kappa(&p, TQ_TYPE_TQ4_TCQ, 0.5f), "no codebook");
    CHECK(tq_params_set_codebook(&p, TQ_TYPE_COUNT, c, 4) && tq_params_set_kappa(&p, TQ_TYPE_COUNT, 0.5f), "no such type");

    // codebooks that nothing rounds to: blocks stay valid, and zero where no positive scale exists
    struct tq_params odd = *tq_params_default();
    for (int t = 0; t < TQ_QUANTIZER_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        const size_t n = (size_t) 1 << tq_get_type_info(type)->code_bits;
        float far[16], x[DIM], y[DIM];
        uint8_t packed[MAX_ROW];
        for (size_t k = 0; k < n; ++k) {
            far[k] = 7.0f + (float) k/16.0f;
        }
        CHECK(!tq_params_set_codebook(&odd, type, far, n), "far codebook");
        params = &odd;
        for (int r = 0; r < 100; ++r) {
            rng_normal(x, DIM, 1.0f);
            round_trip(type, x, y, DIM, packed);
            CHECK(tq_validate(type, packed, DIM) && (packed[1] & 0x80) == 0, "a far codebook's scale");
        }
        params = tq_params_default();
    }
}

// blocks that are encoded together do not know of each other, skipped ones (zeros, NaN) among them included
static void test_batches(void) {
    float x[19*64];
    uint8_t all[sizeof(x)/4], one[64];
    rng_normal(x, 19*64, 1.0f);
    memset(x + 64*4, 0, 64*sizeof(float));
    x[64*9] = NAN;
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const size_t bs = tq_get_type_info((enum tq_type) t)->block_size;
        for (int n = 1; n <= 19; ++n) {
            tq_encode(params, (enum tq_type) t, x, all, n*64);
            for (int i = 0; i < n; ++i) {
                tq_encode(params, (enum tq_type) t, x + 64*i, one, 64);
                CHECK(memcmp(all + (size_t) i*bs, one, bs) == 0, "block %d of %d", i, n);
            }
        }
    }
}

// a block of one of many kinds
static void make_block(float * x) {
    static const float scales[] = { 1.0f, 1e-3f, 1e4f, 0x1p-60f, 0x1p-59f, 0x1p-84f, 1e-40f, FLT_MIN, FLT_MAX/8.0f };
    const float scale = scales[rng_u64()%(sizeof(scales)/sizeof(scales[0]))];
    const int   kind  = (int) (rng_u64()%8);
    rng_normal(x, 64, 1.0f);
    for (int i = 0; i < 64; ++i) {
        switch (kind) {
            case 0: x[i] = (float) ((int) (rng_u64()%5) - 2); break;              // ties
            case 1: x[i] = i == 5 ? -1.0f : rng_u64()%2 ? 0.0f : -0.0f; break;    // one coordinate
            case 2: x[i] = 1.0f; break;
            case 3: x[i] *= rng_u64()%8 == 0 ? 30.0f : 1.0f; break;               // outliers
            case 4: x[i] = ldexpf(x[i], -(int) (rng_u64()%140)); break;           // of every size
            default: break;
        }
        x[i] *= scale;
    }
    static const float values[] = { 0.0f, -0.0f, NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN };
    const float value = values[rng_u64()%(sizeof(values)/sizeof(values[0]))];
    switch (rng_u64()%8) {
        case 0: x[rng_u64()%64] = value; break;
        case 1: for (int i = 0; i < 64; ++i) { x[i] = value; } break;
        default: break;
    }
}

// the same bits, or no number both
static bool same(const float * a, const float * b, int n) {
    for (int i = 0; i < n; ++i) {
        if (memcmp(a + i, b + i, sizeof(float)) != 0 && !(isnan(a[i]) && isnan(b[i]))) {
            return false;
        }
    }
    return true;
}

// every implementation of rows: the same bits as the last one, which is portable C
static void test_row_implementations(int n_rows) {
    enum { MAX = 19*64 };
    CHECK(!tq_rows_use("none"), "no such implementation");
    struct tq_params odd = *params; // codebooks that are not symmetric, and far apart
    for (int t = 0; t < TQ_QUANTIZER_COUNT; ++t) {
        float c[16];
        for (int k = 0; k < 16; ++k) {
            c[k] = -2.0f + 0.5f*(float) k + 0.4f*(float) rng_uniform();
        }
        CHECK(!tq_params_set_codebook(&odd, (enum tq_type) t, c, (size_t) 1 << tq_get_type_info((enum tq_type) t)->code_bits), "a codebook");
    }
    struct result {
        uint8_t packed[MAX];
        float   decoded[MAX], rotated[MAX], decoded_any[MAX], turned[4][MAX];
        tq_query_block query[MAX/64];
        float   dot, dot_any;
    };
    static struct result want, got;
    int n_names = 0;
    while (tq_rows_name(n_names)) {
        n_names++;
    }
    CHECK(strcmp(tq_rows_name(n_names - 1), "portable") == 0, "portable C is everywhere, and the slowest");
    for (int r = 0; r < n_rows; ++r) {
        const struct tq_params * set = r%4 ? params : &odd;
        static float   x[MAX], a[MAX];
        static uint8_t any[MAX]; // whatever lies in memory
        static tq_query_block query[MAX/64];
        const int n = 64*(1 + (int) (rng_u64()%19));
        for (int i = 0; i < n; i += 64) {
            make_block(x + i);
        }
        for (int i = 0; i < n; ++i) {
            any[i] = (uint8_t) rng_u64();
        }
        rng_normal(a, n, 1.0f);
        tq_encode_query(set, a, query, n);
        for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
            const enum tq_type type = (enum tq_type) t;
            const char * name = tq_get_type_info(type)->name;
            for (int k = n_names - 1; k >= 0; --k) {
                struct result * result = k == n_names - 1 ? &want : &got;
                CHECK(tq_rows_use(tq_rows_name(k)) && strcmp(tq_rows_use(NULL), tq_rows_name(k)) == 0, "an implementation that is there");
                memset(result, CANARY, sizeof(*result));
                tq_encode(set, type, x, result->packed, n);
                tq_decode(set, type, result->packed, result->decoded, n);
                tq_decode_rotated(set, type, result->packed, result->rotated, n);
                tq_decode(set, type, any, result->decoded_any, n);
                tq_rotate  (set, x, result->turned[0], n);
                tq_unrotate(set, x, result->turned[1], n);
                tq_sketch  (set, x, result->turned[2], n);
                tq_unsketch(set, x, result->turned[3], n);
                tq_encode_query(set, x, result->query, n);
                result->dot     = tq_dot(set, type, want.packed, query, n);
                result->dot_any = tq_dot(set, type, any,         query, n);
                CHECK(result->packed[tq_row_size(type, n)] == CANARY, "%s: write out of bounds", name);
                if (result == &want) {
                    continue;
                }
                CHECK(memcmp(want.packed, got.packed, tq_row_size(type, n)) == 0, "%s: bytes of %d", name, n);
                CHECK(same(want.decoded,     got.decoded,     n), "%s: decoded", name);
                CHECK(same(want.rotated,     got.rotated,     n), "%s: decoded without turning", name);
                CHECK(same(want.decoded_any, got.decoded_any, n), "%s: decoded, any bytes", name);
                for (int i = 0; i < 4; ++i) {
                    CHECK(same(want.turned[i], got.turned[i], n), "transform %d", i);
                }
                for (int i = 0; i < n/64; ++i) {
                    CHECK(same(&want.query[i].db, &got.query[i].db, 2) && memcmp(want.query[i].b, got.query[i].b, 128) == 0, "a query");
                }
                // the order of a score's additions is free
                const double bound = sqrt(dot(want.decoded, want.decoded, n)*dot(a, a, n));
                CHECK(same(&want.dot, &got.dot, 1) || fabs((double) want.dot - got.dot) <= 1e-5*bound, "%s: score %g, %g", name, want.dot, got.dot);
                CHECK(isfinite(want.dot_any) == isfinite(got.dot_any), "%s: score of any bytes", name);
            }
        }
    }
    tq_rows_use(tq_rows_name(0));
}

// every implementation of tiles: the same sums of the same rows, and scores of centers to the bit
static void test_tile_implementations(void) {
    enum { N_QUERIES = 11 };
    static float table[TQ_CENTER_ROWS*128];
    double freqs[64];
    for (int i = 0; i < 64; ++i) {
        freqs[i] = pow(1e4, -i/64.0);
    }
    tq_center_make_table(freqs, 128, table);
    const struct tq_center center = { 128, 128, 1, table };
    CHECK(!tq_tile_use("none"), "no such implementation");
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const enum tq_type type = (enum tq_type) t;
        const struct tq_tile_type tile = tq_tile_type_init(params, type);
        const size_t size   = tq_row_size(type, 64);
        const int    n_rows = t%2 ? 64 : 1 + (int) (rng_u64()%64);
        uint8_t * packed = malloc(n_rows*size); // bounds are those of the rows
        for (size_t i = 0; i < n_rows*size; ++i) {
            packed[i] = (uint8_t) rng_u64();
        }
        float x[N_QUERIES][128], weights[64], m[128];
        rng_normal(x[0], N_QUERIES*128, 1.0f);
        rng_normal(m, 128, 5.0f);
        float max = 0.0f;
        for (int i = 0; i < 128; ++i) { // of some types: products that are powers of two, whose sums lie half way between floats
            m[i] = t%2 == 0 ? m[i] : i < 64 ? 1.0f : 0.0f;
            for (int k = 0; k < N_QUERIES && t%2; ++k) {
                x[k][i] = ldexpf(1.0f, (int) (rng_u64()%24) - 12);
            }
        }
        for (int k = 0; k < N_QUERIES; ++k) {
            for (int i = 0; i < 128; ++i) {
                max = fmaxf(max, fabsf(x[k][i]));
            }
        }
        for (int i = 0; i < 64; ++i) {
            weights[i] = i < n_rows ? (float) rng_uniform() : 0.0f;
        }
        int32_t pos [64];
        bool    used[64];
        for (int j = 0; j < 64; ++j) {
            pos [j] = 240 + j + (int) (rng_u64()%3 == 0 ? rng_u64()%1000 : 0);
            used[j] = rng_u64()%8 != 0;
        }
        struct tq_center_cells cells;
        tq_center_cells_init(&cells, pos, used);

        struct { int32_t keys[2][N_QUERIES][64], values[2][N_QUERIES][64]; float d[64], scores[N_QUERIES][64]; } first, other;
        for (int i = 0; tq_tile_name(i); ++i) {
            CHECK(tq_tile_use(tq_tile_name(i)) && strcmp(tq_tile_use(NULL), tq_tile_name(i)) == 0, "an implementation that is there");
            static int8_t bytes[2][TQ_TILE_SIZE];
            struct tq_tile_numbers numbers[N_QUERIES];
            memset(&other, 0, sizeof(other));
            for (int values = 0; values < 2; ++values) {
                for (int k = 0; k < N_QUERIES; ++k) {
                    tq_tile_split(values, x[k], values ? weights : NULL, max, &numbers[k]);
                }
                tq_tile_unpack(&tile, values, packed, size, n_rows, bytes);
                for (int part = 0; part < tile.n_parts; ++part) {
                    int32_t sums[N_QUERIES][64] = { { 0 } };
                    tq_tile_multiply(bytes[part], numbers, N_QUERIES, sums[0], 64);
                    for (int k = 0; k < N_QUERIES; ++k) {
                        for (int l = 0; l < 64; ++l) {
                            if (values) {
                                other.values[part][k][tq_tile_coordinate(l)] = sums[k][l];
                            } else if (l < n_rows) {
                                other.keys[part][k][l] = sums[k][l];
                            }
                        }
                    }
                }
            }
            tq_tile_scales(packed, size, n_rows, other.d);
            for (int j = 0; j < 64; ++j) {
                other.d[j] = isnan(other.d[j]) ? NAN : other.d[j];
            }
            float w[N_QUERIES][TQ_CENTER_QUERY_SIZE(128)];
            struct tq_center_query queries[N_QUERIES];
            for (int k = 0; k < N_QUERIES; ++k) {
                queries[k] = tq_center_query_init(&center, m, m, x[k], w[k]);
            }
            tq_center_scores(&center, queries, N_QUERIES, &cells, other.scores[0], 64);
            if (i == 0) {
                first = other;
            }
            CHECK(memcmp(first.keys,   other.keys,   sizeof(first.keys))   == 0, "%s: scores of %d rows", tq_get_type_info(type)->name, n_rows);
            CHECK(memcmp(first.values, other.values, sizeof(first.values)) == 0, "%s: sums of %d rows",   tq_get_type_info(type)->name, n_rows);
            CHECK(memcmp(first.d,      other.d,      sizeof(first.d))      == 0, "%s: scales",            tq_get_type_info(type)->name);
            CHECK(memcmp(first.scores, other.scores, sizeof(first.scores)) == 0, "%s: scores of centers", tq_get_type_info(type)->name);
        }
        free(packed);
        tq_tile_use(tq_tile_name(0));
    }
}

// X_p(m) against RoPE in double precision; scores against additions
static void test_center(void) {
    for (int r = 0; r < 200; ++r) {
        const int head_dim = 64*(1 + (int) (rng_u64()%4));
        const int n_rot    = r%5 == 0 ? 0 : r%5 == 1 ? head_dim/2 : head_dim;
        double freqs[MAX_ROW/2];
        for (int i = 0; i < n_rot/2; ++i) {
            freqs[i] = pow(1e4, -2.0*i/n_rot);
        }
        static float table[TQ_CENTER_ROWS*MAX_ROW];
        tq_center_make_table(freqs, n_rot, table);
        const struct tq_center center = { head_dim, n_rot, r%2, table };

        float m[MAX_ROW], first[MAX_ROW], q[MAX_ROW], w[TQ_CENTER_QUERY_SIZE(MAX_ROW)];
        rng_normal(m, head_dim, 3.0f);
        rng_normal(first, head_dim, 5.0f);
        rng_normal(q, head_dim, 1.0f);
        struct tq_center_query query = tq_center_query_init(&center, m, first, q, w);
        static const int32_t some[] = { 0, 1, 255, 256, 257, 511, 65535, 65536, 65793, 1 << 23 };
        for (int k = 0; k < 20; ++k) {
            const int32_t pos = k < 10 ? some[k] : (int32_t) (rng_u64()%(k < 15 ? 4096 : 1 << 20));
            float  x[MAX_ROW] = { 0.0f };
            double want[MAX_ROW];
            for (int i = 0; i < head_dim; ++i) {
                want[i] = m[i];
            }
            for (int i = 0; i < n_rot/2; ++i) {
                const int a = center.neox ? i : 2*i;
                const int b = center.neox ? i + n_rot/2 : 2*i + 1;
                want[a] = m[a]*cos(pos*freqs[i]) - m[b]*sin(pos*freqs[i]);
                want[b] = m[a]*sin(pos*freqs[i]) + m[b]*cos(pos*freqs[i]);
            }
            tq_center_add(&center, m, pos, 1.0f, x);
            double s = 0.0;
            for (int i = 0; i < head_dim; ++i) {
                CHECK(fabs(x[i] - want[i]) < 1e-5, "position %d, coordinate %d of %d: %g, want %g", pos, i, head_dim, x[i], want[i]);
                s += q[i]*(pos == 0 ? first[i] : want[i]);
            }
            float first = 0.0f;
            for (int variant = 0; variant < 4; ++variant) { // beside cells in order, half of them, any, none
                const int j0 = variant == 3 ? 5 : (int) (rng_u64()%64);
                int32_t others[64];
                bool    used  [64];
                float   scores[64] = { 0.0f };
                for (int j = 0; j < 64; ++j) {
                    others[j] = variant < 2 ? pos + j - j0 : (int32_t) (rng_u64()%(1 << 20));
                    used  [j] = variant == 0 || (variant < 3 && rng_u64()%2 == 0);
                    used  [j] = used[j] && others[j] >= 0;
                }
                others[j0] = pos;
                used  [j0] = true;
                struct tq_center_cells cells;
                tq_center_cells_init(&cells, others, used);
                tq_center_scores(&center, &query, 1, &cells, scores, 64);
                CHECK(fabs(scores[j0] - s) < 1e-4*head_dim, "position %d: score", pos);
                first = variant == 0 ? scores[j0] : first;
                CHECK(scores[j0] == first, "position %d: the score depends on other cells", pos);
                for (int j = 0; j < 64; ++j) {
                    CHECK(used[j] || scores[j] == 0.0f, "cells that are not used");
                }
            }
            tq_center_add(&center, m, pos, -1.0f, x);
            for (int i = 0; i < head_dim; ++i) {
                CHECK(x[i] == 0.0f, "what is added can be taken away");
            }
        }
        float x[MAX_ROW] = { 0.0f }, y[MAX_ROW] = { 0.0f };
        tq_center_add(&center, m, -1, 1.0f, x); // an empty cell
        tq_center_add(&center, m,  0, 1.0f, y);
        CHECK(memcmp(x, y, sizeof(x)) == 0, "a negative position");
    }
}

int main(int argc, char ** argv) {
    const uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t) time(NULL);
    rng_state = seed;
    printf("seed %" PRIu64 "\n", seed);

    const bool tiles_only = argc > 2 && strcmp(argv[2], "tiles") == 0;

    params = tq_params_default();
    test_types();
    test_params();

    struct tq_params seeded = *tq_params_default();
    tq_params_set_seeds(&seeded, rng_u64(), rng_u64());
    const struct tq_params * sets[] = { tq_params_default(), &seeded };
    for (int i = 0; i < 2; ++i) {
        params = sets[i];
        for (int k = 0; tq_tile_name(k); ++k) {
            tq_tile_use(tq_tile_name(k));
            test_tiles();
        }
        test_tile_implementations();
        test_row_implementations(tiles_only ? 20 : 300);
        if (!tiles_only) {
            test_rotation();
            test_distortion();
            test_dot();
            for (int k = 0; tq_rows_name(k); ++k) {
                tq_rows_use(tq_rows_name(k));
                printf("%s rows\n", tq_rows_name(k));
                test_scaling();
                test_special_rows();
                test_batches();
            }
            tq_rows_use(tq_rows_name(0));
        }
    }
    for (int k = 0; tq_tile_name(k); ++k) {
        tq_tile_use(tq_tile_name(k));
        printf("%s tiles\n", tq_tile_name(k));
        test_center();
    }

    printf(n_failed ? "%d checks failed (seed %" PRIu64 ")\n" : "all checks passed\n", n_failed, seed);
    return n_failed ? 1 : 0;
}
