// Attention on integers: 64 packed rows at a time become bytes, in the rotated basis, and are multiplied with numbers of
// 15 bits (two signed bytes, since the machine multiplies bytes). x86-64 with AVX-512 VBMI and VNNI; without them nothing
// here is called. Bytes are looked up with one permutation a block: bit planes are masks of AVX-512 registers.

#include "tq-internal.h"
#include "tq-codebooks.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define DIGIT_BITS 7
#define MAX_NUMBER (127 << DIGIT_BITS)
#define ZERO_LEVEL 128 // the byte of level 0

struct tq_tile_type tq_tile_type_init(const struct tq_params * params, enum tq_type type) {
    const struct tq_type_info * info = tq_get_type_info(type);
    const bool    tcq     = info->kind == TQ_KIND_TCQ;
    const float * levels  = tcq ? tq_trellis_table(info->bits) : params->quantizers[type].centroids;
    const int     n       = tcq ? 32 : 1 << info->code_bits;
    struct tq_tile_type tile = { .type = type, .n_parts = info->kind == TQ_KIND_QJL ? 2 : 1, .offset = { ZERO_LEVEL, 1 } };

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
        tile.table[i] = (uint8_t) (ZERO_LEVEL + (int) rintf(levels[i]/tile.unit[0]));
    }
    if (!tcq) {
        tile.unit[1] = -params->quantizers[type].kappa; // the byte of a negative sign is 2, of a positive one 0
    }
    return tile;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

bool tq_tile_available(void) {
    return true;
}

//
// unpacking
//

INLINE uint64_t load_plane(const uint8_t * planes, int p) {
    uint64_t w;
    memcpy(&w, planes + 8*p, sizeof(w));
    return w;
}

// section 9: bit j is the parity of the register at j and the taps
INLINE uint64_t label_plane(uint64_t c, int taps) {
    uint64_t label = 0;
    for (int i = 0; i < 6; ++i) {
        if (taps >> i & 1) {
            label ^= i == 0 ? c : c << i | c >> (N - i);
        }
    }
    return label;
}

INLINE __m512i add_plane(__m512i index, uint64_t plane, int p) {
    return _mm512_mask_add_epi8(index, plane, index, _mm512_set1_epi8((char) (1 << p)));
}

INLINE __m512i block_index(enum tq_kind kind, int bits, const uint8_t * planes) {
    const int n_planes = kind == TQ_KIND_MSE ? bits : bits - 1;
    __m512i index = _mm512_setzero_si512();
    for (int p = 0; p < n_planes; ++p) {
        index = add_plane(index, load_plane(planes, p), p);
    }
    if (kind == TQ_KIND_TCQ) {
        static const int taps[5][4] = { [2] = TQ_TRELLIS_TAPS_2B, [3] = TQ_TRELLIS_TAPS_3B, [4] = TQ_TRELLIS_TAPS_4B };
        const uint64_t c = load_plane(planes, bits - 1);
        for (int k = 0; k < TQ_TRELLIS_INDEX_BITS - n_planes; ++k) {
            index = add_plane(index, label_plane(c, taps[bits][k]), n_planes + k);
        }
    }
    return index;
}

// rows of bytes [n_parts][n_rows][64]
INLINE void unpack_rows(enum tq_kind kind, int bits, const uint8_t * table, const uint8_t * block, size_t stride, int n_rows,
        uint8_t (* bytes)[N][N]) {
    const __m512i t = _mm512_loadu_si512(table);
    for (int r = 0; r < n_rows; ++r, block += stride) {
        const uint8_t * planes = block + sizeof(uint16_t);
        _mm512_storeu_si512(bytes[0][r], _mm512_permutexvar_epi8(block_index(kind, bits, planes), t));
        if (kind == TQ_KIND_QJL) {
            _mm512_storeu_si512(bytes[1][r], _mm512_maskz_set1_epi8(load_plane(planes, bits - 1), 2));
        }
    }
}

// 16 rows of 16 groups of 4 bytes -> groups of 16 rows
INLINE void transpose(uint8_t (* rows)[N], uint8_t * dst) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = _mm512_loadu_si512(rows[i]);
    }
    for (int i = 0; i < 16; i += 2) {
        b[i]     = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i]     = _mm512_unpacklo_epi64(b[i],     b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i],     b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4*r + j]: lane l has group 4*l + j of rows 4*r ...
    for (int j = 0; j < 4; ++j) {
        const __m512i lo01 = _mm512_shuffle_i32x4(a[j],     a[4 + j],  0x44);
        const __m512i hi01 = _mm512_shuffle_i32x4(a[j],     a[4 + j],  0xee);
        const __m512i lo23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i hi23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        _mm512_storeu_si512(dst + (size_t) (j     )*4*N, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
        _mm512_storeu_si512(dst + (size_t) (j +  4)*4*N, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
        _mm512_storeu_si512(dst + (size_t) (j +  8)*4*N, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
        _mm512_storeu_si512(dst + (size_t) (j + 12)*4*N, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
    }
}

// 4 rows -> coordinates of 4 rows, in the order of tq_tile_coordinate()
INLINE void interleave(uint8_t (* rows)[N], uint8_t * dst) {
    const __m512i a = _mm512_loadu_si512(rows[0]);
    const __m512i b = _mm512_loadu_si512(rows[1]);
    const __m512i c = _mm512_loadu_si512(rows[2]);
    const __m512i d = _mm512_loadu_si512(rows[3]);
    const __m512i ab0 = _mm512_unpacklo_epi8(a, b);
    const __m512i ab1 = _mm512_unpackhi_epi8(a, b);
    const __m512i cd0 = _mm512_unpacklo_epi8(c, d);
    const __m512i cd1 = _mm512_unpackhi_epi8(c, d);
    _mm512_storeu_si512(dst,       _mm512_unpacklo_epi16(ab0, cd0));
    _mm512_storeu_si512(dst +   N, _mm512_unpackhi_epi16(ab0, cd0));
    _mm512_storeu_si512(dst + 2*N, _mm512_unpacklo_epi16(ab1, cd1));
    _mm512_storeu_si512(dst + 3*N, _mm512_unpackhi_epi16(ab1, cd1));
}

void tq_tile_unpack(const struct tq_tile_type * tile, bool values, const void * first, size_t stride, int n_rows,
        uint8_t (* dst)[N*N], float * d) {
    uint8_t  bytes[2][N][N];
    uint16_t half[N] = { 0 };
    const uint8_t * block = first;
    for (int r = 0; r < n_rows; ++r) {
        memcpy(&half[r], block + (size_t) r*stride, sizeof(uint16_t));
    }
    for (int i = 0; i < N; i += 16) {
        _mm512_storeu_ps(d + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (half + i))));
    }
    switch (tile->type) {
#define CASE(TYPE, kind, bits) \
        case TQ_TYPE_##TYPE: unpack_rows(kind, bits, tile->table, block, stride, n_rows, bytes); break
        CASE(TQ2_MSE, TQ_KIND_MSE, 2); CASE(TQ3_MSE, TQ_KIND_MSE, 3); CASE(TQ4_MSE, TQ_KIND_MSE, 4);
        CASE(TQ2_QJL, TQ_KIND_QJL, 2); CASE(TQ3_QJL, TQ_KIND_QJL, 3); CASE(TQ4_QJL, TQ_KIND_QJL, 4);
        CASE(TQ2_TCQ, TQ_KIND_TCQ, 2); CASE(TQ3_TCQ, TQ_KIND_TCQ, 3); CASE(TQ4_TCQ, TQ_KIND_TCQ, 4);
#undef CASE
        case TQ_TYPE_COUNT: break;
    }
    for (int p = 0; p < tile->n_parts; ++p) {
        memset(bytes[p][n_rows], 0, (size_t) (N - n_rows)*N);
        if (values) {
            for (int r = 0; r < N; r += 4) {
                interleave(bytes[p] + r, dst[p] + (size_t) r*N);
            }
        } else {
            for (int r = 0; r < N; r += 16) {
                transpose(bytes[p] + r, dst[p] + (size_t) r*4);
            }
        }
    }
}

int tq_tile_coordinate(int i) {
    return i%16/4*16 + i/16*4 + i%4;
}

//
// products
//

void tq_tile_split(const float * x, const float * weights, float max, struct tq_tile_numbers * dst) {
    if (!(max > 0.0f && max <= FLT_MAX)) {
        memset(dst, 0, sizeof(*dst));
        dst->scale = max == 0.0f ? 0.0f : NAN;
        return;
    }
    const __m512 scale = _mm512_set1_ps((float) MAX_NUMBER/max);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < N; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        if (weights) {
            v = _mm512_mul_ps(v, _mm512_loadu_ps(weights + i));
        }
        const __m512i n = _mm512_cvtps_epi32(v);
        sum = _mm512_add_epi32(sum, n);
        _mm_storeu_si128((__m128i *) (dst->hi + i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(n, DIGIT_BITS)));
        _mm_storeu_si128((__m128i *) (dst->lo + i), _mm512_cvtepi32_epi8(
            _mm512_and_si512(n, _mm512_set1_epi32((1 << DIGIT_BITS) - 1))));
    }
    dst->scale = max/(float) MAX_NUMBER;
    dst->sum   = _mm512_reduce_add_epi32(sum);
}

INLINE void multiply(int n, const struct tq_tile_type * tile, int part, const uint8_t * bytes,
        const struct tq_tile_numbers * numbers, size_t step, const float * weights, float * dst, size_t dst_step) {
    __m512i hi[2][4];
    __m512i lo[2][4];
    for (int r = 0; r < n; ++r) {
        for (int l = 0; l < 4; ++l) {
            hi[r][l] = lo[r][l] = _mm512_setzero_si512();
        }
    }
    for (int g = 0; g < N/4; ++g, bytes += 4*N) {
        __m512i b[4];
        for (int l = 0; l < 4; ++l) {
            b[l] = _mm512_loadu_si512(bytes + l*N);
        }
        for (int r = 0; r < n; ++r) {
            int32_t h, w;
            memcpy(&h, numbers[r*step].hi + 4*g, sizeof(h));
            memcpy(&w, numbers[r*step].lo + 4*g, sizeof(w));
            const __m512i vh = _mm512_set1_epi32(h);
            const __m512i vw = _mm512_set1_epi32(w);
            for (int l = 0; l < 4; ++l) {
                hi[r][l] = _mm512_dpbusd_epi32(hi[r][l], b[l], vh);
                lo[r][l] = _mm512_dpbusd_epi32(lo[r][l], b[l], vw);
            }
        }
    }
    for (int r = 0; r < n; ++r, dst += dst_step) {
        const __m512i shift = _mm512_set1_epi32(tile->offset[part]*numbers[r*step].sum);
        const __m512  scale = _mm512_set1_ps   (tile->unit[part]*numbers[r*step].scale);
        for (int l = 0; l < 4; ++l) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[r][l], DIGIT_BITS), lo[r][l]);
            const __m512  w   = weights ? _mm512_mul_ps(scale, _mm512_loadu_ps(weights + 16*l)) : scale;
            const __m512  v   = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift));
            _mm512_storeu_ps(dst + 16*l, _mm512_fmadd_ps(v, w, _mm512_loadu_ps(dst + 16*l)));
        }
    }
}

void tq_tile_multiply(const struct tq_tile_type * tile, int part, const uint8_t * bytes, const struct tq_tile_numbers * numbers,
        size_t step, int n, const float * weights, float * dst, size_t dst_step) {
    int r = 0;
    for (; r + 2 <= n; r += 2) {
        multiply(2, tile, part, bytes, numbers + r*step, step, weights, dst + r*dst_step, dst_step);
    }
    if (r < n) {
        multiply(1, tile, part, bytes, numbers + r*step, step, weights, dst + r*dst_step, dst_step);
    }
}

#else

bool tq_tile_available(void) {
    return false;
}

void tq_tile_unpack(const struct tq_tile_type * tile, bool values, const void * first, size_t stride, int n_rows,
        uint8_t (* dst)[N*N], float * d) {
    (void) tile; (void) values; (void) first; (void) stride; (void) n_rows; (void) dst; (void) d;
}

int tq_tile_coordinate(int i) {
    return i;
}

void tq_tile_split(const float * x, const float * weights, float max, struct tq_tile_numbers * dst) {
    (void) x; (void) weights; (void) max; (void) dst;
}

void tq_tile_multiply(const struct tq_tile_type * tile, int part, const uint8_t * bytes, const struct tq_tile_numbers * numbers,
        size_t step, int n, const float * weights, float * dst, size_t dst_step) {
    (void) tile; (void) part; (void) bytes; (void) numbers; (void) step; (void) n; (void) weights; (void) dst; (void) dst_step;
}

#endif
