// Attention on integers: 64 packed rows at a time become bytes, in the rotated basis, and are multiplied with numbers of
// 15 bits. One arithmetic, several implementations, of which a machine's fastest is taken when it runs. Sums of integers are
// exact, so all give the same bits. Compile without floating-point contraction.

#include "tq-internal.h"
#include "tq-codebooks.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#define TQ_TILE_X86
#include <immintrin.h>
#if defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11
#define TQ_TILE_AVXVNNI
#include <cpuid.h>
#endif
#endif
#if defined(__aarch64__)
#define TQ_TILE_NEON
#include <arm_neon.h>
#endif

#define MAX_NUMBER (127 << 7)

// functions for more than this file is compiled for
#if defined(__GNUC__) || defined(__clang__)
#define TARGET(features) __attribute__((target(features)))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define IN_REGISTER(x) __asm__("" : "+v"(x)) // of a sum in a loop; gcc copies each to another register and back otherwise
#define IN_MEMORY(x)   __asm__("" : "+m"(x)) // of sums that are complete, while registers are needed for others
#define CPU_HAS_AVX2   (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) // and F16C, which came before
#define CPU_HAS_AVX512 (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
    __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
#else
#define TARGET(features)
#define UNROLL
#define IN_REGISTER(x)
#define IN_MEMORY(x)
#ifdef __AVX2__
#define CPU_HAS_AVX2 true
#else
#define CPU_HAS_AVX2 false
#endif
#define CPU_HAS_AVX512 false
#endif

struct tq_tile_type tq_tile_type_init(const struct tq_params * params, enum tq_type type) {
    const struct tq_type_info * info = tq_get_type_info(type);
    const bool    tcq     = info->kind == TQ_KIND_TCQ;
    const float * levels  = tcq ? tq_trellis_table(info->bits) : params->quantizers[type].centroids;
    const int     n       = tcq ? 32 : 1 << info->code_bits;
    struct tq_tile_type tile = { .type = type, .n_parts = info->kind == TQ_KIND_QJL ? 2 : 1 };

    float max = 0.0f;
    for (int i = 0; i < n; ++i) {
        max = fabsf(levels[i]) > max ? fabsf(levels[i]) : max;
    }
    // the unit in which the levels are nearest to integers; those of a trellis are integers
    float best = INFINITY;
    for (float m = 127.0f; m >= 64.0f; m -= 0.125f) {
        const float unit = max/m;
        float error = 0.0f;
        for (int i = 0; i < n; ++i) {
            const float e = levels[i] - unit*rintf(levels[i]/unit);
            error += e*e;
        }
        if (error < best) {
            best = error;
            tile.unit[0] = unit;
        }
    }
    for (int i = 0; i < n; ++i) {
        tile.table[i] = (int8_t) rintf(levels[i]/tile.unit[0]);
    }
    if (info->kind == TQ_KIND_QJL) {
        tile.unit[1] = -params->quantizers[type].kappa; // the byte of a negative sign is 1
    }
    return tile;
}

//
// what implementations share
//

// a block of bits a coordinate that lies distance bytes on, perhaps in two lines
ALWAYS_INLINE void prefetch(const uint8_t * block, size_t distance, int bits) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch((const void *) ((uintptr_t) block + distance));
    __builtin_prefetch((const void *) ((uintptr_t) block + distance + 8*bits + 1));
#else
    (void) block;
    (void) distance;
    (void) bits;
#endif
}

// the planes of a block's indices into the table, from bit 0, and of signs where there are any; returns their number
ALWAYS_INLINE int index_planes(enum tq_kind kind, int bits, const uint8_t * block, uint64_t * w) {
    const uint8_t * planes = block + sizeof(uint16_t);
    const int n = kind == TQ_KIND_MSE ? bits : bits - 1;
    for (int p = 0; p < bits; ++p) {
        w[p] = tq_load_u64(planes + 8*p);
    }
    if (kind == TQ_KIND_TCQ) {
        static const int taps[5][4] = { [2] = TQ_TRELLIS_TAPS_2B, [3] = TQ_TRELLIS_TAPS_3B, [4] = TQ_TRELLIS_TAPS_4B };
        const uint64_t c = w[n];
        for (int k = 0; k < TQ_TRELLIS_INDEX_BITS - n; ++k) {
            w[n + k] = tq_trellis_label_plane(c, taps[bits][k]);
        }
        return TQ_TRELLIS_INDEX_BITS;
    }
    return n;
}

// of rows that are not there, the last one: their scales and weights are 0
ALWAYS_INLINE const uint8_t * row_at(const uint8_t * first, size_t stride, int n_rows, int r) {
    return first + (size_t) (r < n_rows ? r : n_rows - 1)*stride;
}

// f(kind, bits, ...) with constants
#define FOR_TYPE(type, f, ...) \
    switch (type) { \
        case TQ_TYPE_TQ2_MSE: f(TQ_KIND_MSE, 2, __VA_ARGS__); break; \
        case TQ_TYPE_TQ3_MSE: f(TQ_KIND_MSE, 3, __VA_ARGS__); break; \
        case TQ_TYPE_TQ4_MSE: f(TQ_KIND_MSE, 4, __VA_ARGS__); break; \
        case TQ_TYPE_TQ2_QJL: f(TQ_KIND_QJL, 2, __VA_ARGS__); break; \
        case TQ_TYPE_TQ3_QJL: f(TQ_KIND_QJL, 3, __VA_ARGS__); break; \
        case TQ_TYPE_TQ4_QJL: f(TQ_KIND_QJL, 4, __VA_ARGS__); break; \
        case TQ_TYPE_TQ2_TCQ: f(TQ_KIND_TCQ, 2, __VA_ARGS__); break; \
        case TQ_TYPE_TQ3_TCQ: f(TQ_KIND_TCQ, 3, __VA_ARGS__); break; \
        case TQ_TYPE_TQ4_TCQ: f(TQ_KIND_TCQ, 4, __VA_ARGS__); break; \
        case TQ_TYPE_COUNT: break; \
    }

#include "tq-tile-portable.h"
#include "tq-tile-avx2.h"
#include "tq-tile-avx512.h"
#include "tq-tile-neon.h"

//
// the choice
//

static const struct tq_implementation * const all_tiles[] = {
#ifdef TQ_TILE_X86
    &tile_avx512.base,
#ifdef TQ_TILE_AVXVNNI
    &tile_avxvnni.base,
#endif
    &tile_avx2.base,
#endif
#ifdef TQ_TILE_DOTPROD
    &tile_dotprod.base,
#endif
#ifdef TQ_TILE_NEON
    &tile_neon.base,
#endif
    &tile_portable.base,
    NULL,
};

static struct tq_choice tiles = { all_tiles, NULL };

const char * tq_tile_name(int i) {
    return tq_choice_name(&tiles, i);
}

const char * tq_tile_use(const char * name) {
    return tq_choice_use(&tiles, name);
}

const struct tq_tile_functions * tq_tile(void) {
    return (const struct tq_tile_functions *) tq_choice_current(&tiles);
}

void tq_tile_unpack(const struct tq_tile_type * tile, bool values, const void * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    tq_tile()->unpack(tile, values, first, stride, n_rows, dst);
}

void tq_tile_prefetch(const void * first, size_t stride, int n_rows, size_t size) {
#if defined(__GNUC__) || defined(__clang__)
    const char * row = first;
    for (int r = 0; r < n_rows; ++r, row += stride) {
        for (size_t i = 0; i < size; i += 64) {
            __builtin_prefetch(row + i, 0, 2);
        }
        __builtin_prefetch(row + size - 1, 0, 2);
    }
#else
    (void) first, (void) stride, (void) n_rows, (void) size;
#endif
}

void tq_tile_scales(const void * first, size_t stride, int n_rows, float * d) {
    uint16_t half[N] = { 0 };
    for (int r = 0; r < n_rows; ++r) {
        memcpy(&half[r], (const uint8_t *) first + (size_t) r*stride, sizeof(uint16_t));
    }
    tq_tile()->scales(half, d);
}

void tq_tile_split(bool values, const float * x, const float * weights, float max, struct tq_tile_numbers * dst) {
    const float scale = max > 0.0f && max <= FLT_MAX ? (float) MAX_NUMBER/max : 0.0f;
    if (!(scale <= FLT_MAX && max <= FLT_MAX)) { // too small, or not a number
        memset(dst, 0, sizeof(*dst));
        return;
    }
    tq_tile()->split(values, x, weights, scale, dst);
}

float tq_tile_number_scale(float max) {
    return max/(float) MAX_NUMBER;
}

void tq_tile_multiply(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) {
    tq_tile()->multiply(bytes, numbers, n, sums, step);
}

int tq_tile_coordinate(int i) {
    return tq_tile()->coordinate(i);
}
