// Attention on integers: 64 packed rows at a time become bytes, in the rotated basis, and are multiplied with numbers of
// 15 bits. One arithmetic, three implementations: AVX-512 with VBMI and VNNI (bytes by bytes: a number is two), AVX2
// (words by words) and C. Sums of integers are exact, so all give the same bits.

#include "tq-internal.h"
#include "tq-codebooks.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define MAX_NUMBER (127 << 7)

// -DTQ_TILE_PORTABLE: the C of every machine, for tests
#if !defined(TQ_TILE_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define TILE_AVX512
#include <immintrin.h>
#elif !defined(TQ_TILE_PORTABLE) && defined(__AVX2__)
#define TILE_AVX2
#include <immintrin.h>
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
// unpacking
//

ALWAYS_INLINE void prefetch(const uint8_t * p, size_t distance) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch((const void *) ((uintptr_t) p + distance));
#else
    (void) p;
    (void) distance;
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

#if defined(TILE_AVX512)

ALWAYS_INLINE void unpack_block(enum tq_kind kind, int bits, const int8_t * table, const uint8_t * block, int8_t (* levels)[N], int8_t (* signs)[N]) {
    uint64_t w[8];
    const int n = index_planes(kind, bits, block, w);
    __m512i index = _mm512_setzero_si512();
    for (int p = 0; p < n; ++p) {
        index = _mm512_mask_add_epi8(index, w[p], index, _mm512_set1_epi8((char) (1 << p)));
    }
    _mm512_storeu_si512(levels, _mm512_permutexvar_epi8(index, _mm512_loadu_si512(table)));
    if (kind == TQ_KIND_QJL) {
        _mm512_storeu_si512(signs, _mm512_mask_blend_epi8(w[bits - 1], _mm512_set1_epi8(-1), _mm512_set1_epi8(1)));
    }
}

#elif defined(TILE_AVX2)

// bit j of w -> all bits of byte j
ALWAYS_INLINE __m256i expand_bits(uint32_t w) {
    const __m256i bytes = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit   = _mm256_set1_epi64x((long long) 0x8040201008040201ull);
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int) w), bytes), bit), bit);
}

ALWAYS_INLINE void unpack_block(enum tq_kind kind, int bits, const int8_t * table, const uint8_t * block, int8_t (* levels)[N], int8_t (* signs)[N]) {
    uint64_t w[8];
    const int n = index_planes(kind, bits, block, w);
    const __m256i lo = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table));
    const __m256i hi = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (table + 16)));
    for (int h = 0; h < 2; ++h) {
        __m256i index = _mm256_setzero_si256();
        for (int p = (n < 4 ? n : 4) - 1; p >= 0; --p) {
            index = _mm256_sub_epi8(_mm256_add_epi8(index, index), expand_bits((uint32_t) (w[p] >> 32*h)));
        }
        __m256i level = _mm256_shuffle_epi8(lo, index);
        if (n == 5) {
            level = _mm256_blendv_epi8(level, _mm256_shuffle_epi8(hi, index), expand_bits((uint32_t) (w[4] >> 32*h)));
        }
        _mm256_storeu_si256((__m256i *) levels + h, level);
        if (kind == TQ_KIND_QJL) {
            const __m256i set = expand_bits((uint32_t) (w[bits - 1] >> 32*h)); // -1 becomes 1, 0 becomes -1
            _mm256_storeu_si256((__m256i *) signs + h, _mm256_sub_epi8(_mm256_set1_epi8(-1), _mm256_add_epi8(set, set)));
        }
    }
}

#else

ALWAYS_INLINE void unpack_block(enum tq_kind kind, int bits, const int8_t * table, const uint8_t * block, int8_t (* levels)[N], int8_t (* signs)[N]) {
    uint64_t w[8];
    const int n = index_planes(kind, bits, block, w);
    for (int i = 0; i < N; i += 8) {
        uint64_t index = 0; // of 8 coordinates, a byte each
        for (int p = 0; p < n; ++p) {
            index |= tq_spread_bits((uint8_t) (w[p] >> i)) << p;
        }
        const uint64_t set = kind == TQ_KIND_QJL ? tq_spread_bits((uint8_t) (w[bits - 1] >> i)) : 0;
        for (int j = 0; j < 8; ++j) {
            levels[0][i + j] = table[index >> 8*j & 0xff];
            if (kind == TQ_KIND_QJL) {
                signs[0][i + j] = (int8_t) (2*(int) (set >> 8*j & 1) - 1);
            }
        }
    }
}

#endif

ALWAYS_INLINE void unpack_rows(enum tq_kind kind, int bits, const int8_t * table, const uint8_t * block, size_t stride, int n_rows, int8_t (* rows)[N][N]) {
    for (int r = 0; r < n_rows; ++r, block += stride) {
        prefetch(block, N*stride); // the next tile is likely to be wanted
        unpack_block(kind, bits, table, block, &rows[0][r], &rows[1][r]);
    }
}

//
// the order in which a product wants them
//

#if defined(TILE_AVX512)

// bytes are not signed on this side: level + 128
ALWAYS_INLINE void store(int8_t * dst, __m512i x) {
    _mm512_storeu_si512(dst, _mm512_xor_si512(x, _mm512_set1_epi8((char) 128)));
}

// keys: [16 groups of 4 coordinates][64 rows][4]; 16 rows of them here
ALWAYS_INLINE void arrange_keys_16(int8_t (* rows)[N], int8_t * dst) {
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
        store(dst + (j     )*4*N, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
        store(dst + (j +  4)*4*N, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
        store(dst + (j +  8)*4*N, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
        store(dst + (j + 12)*4*N, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
    }
}

ALWAYS_INLINE void arrange_keys(int8_t (* rows)[N], int8_t * dst) {
    for (int r = 0; r < N; r += 16) {
        arrange_keys_16(rows + r, dst + r*4);
    }
}

// values: [16 groups of 4 rows][64 coordinates in the order of tq_tile_coordinate()][4]
ALWAYS_INLINE void arrange_values(int8_t (* rows)[N], int8_t * dst) {
    for (int r = 0; r < N; r += 4, dst += 4*N) {
        const __m512i a = _mm512_loadu_si512(rows[r]);
        const __m512i b = _mm512_loadu_si512(rows[r + 1]);
        const __m512i c = _mm512_loadu_si512(rows[r + 2]);
        const __m512i d = _mm512_loadu_si512(rows[r + 3]);
        const __m512i ab0 = _mm512_unpacklo_epi8(a, b);
        const __m512i ab1 = _mm512_unpackhi_epi8(a, b);
        const __m512i cd0 = _mm512_unpacklo_epi8(c, d);
        const __m512i cd1 = _mm512_unpackhi_epi8(c, d);
        store(dst,       _mm512_unpacklo_epi16(ab0, cd0));
        store(dst +   N, _mm512_unpackhi_epi16(ab0, cd0));
        store(dst + 2*N, _mm512_unpacklo_epi16(ab1, cd1));
        store(dst + 3*N, _mm512_unpackhi_epi16(ab1, cd1));
    }
}

#elif defined(TILE_AVX2)

// keys: [32 pairs of coordinates][64 rows][2]
ALWAYS_INLINE void arrange_keys(int8_t (* rows)[N], int8_t * dst) {
    for (int r = 0; r < N; r += 8) {
        for (int h = 0; h < 2; ++h) { // transposition of words, 8 rows by 8 in each lane
            __m256i a[8], b[8];
            for (int i = 0; i < 8; ++i) {
                a[i] = _mm256_loadu_si256((const __m256i *) rows[r + i] + h);
            }
            for (int i = 0; i < 8; i += 2) {
                b[i]     = _mm256_unpacklo_epi16(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
            }
            for (int i = 0; i < 8; i += 4) {
                a[i]     = _mm256_unpacklo_epi32(b[i],     b[i + 2]);
                a[i + 1] = _mm256_unpackhi_epi32(b[i],     b[i + 2]);
                a[i + 2] = _mm256_unpacklo_epi32(b[i + 1], b[i + 3]);
                a[i + 3] = _mm256_unpackhi_epi32(b[i + 1], b[i + 3]);
            }
            for (int j = 0; j < 4; ++j) {
                const __m256i w[2] = { _mm256_unpacklo_epi64(a[j], a[4 + j]), _mm256_unpackhi_epi64(a[j], a[4 + j]) };
                for (int i = 0; i < 2; ++i) { // pair 2*j + i, and that 8 pairs on
                    int8_t * to = dst + (16*h + 2*j + i)*2*N + 2*r;
                    _mm_storeu_si128((__m128i *) to,           _mm256_castsi256_si128(w[i]));
                    _mm_storeu_si128((__m128i *) (to + 16*N),  _mm256_extracti128_si256(w[i], 1));
                }
            }
        }
    }
}

// values: [32 pairs of rows][64 coordinates][2]
ALWAYS_INLINE void arrange_values(int8_t (* rows)[N], int8_t * dst) {
    for (int r = 0; r < N; r += 2) {
        for (int h = 0; h < 2; ++h, dst += N) {
            const __m256i a  = _mm256_loadu_si256((const __m256i *) rows[r]     + h);
            const __m256i b  = _mm256_loadu_si256((const __m256i *) rows[r + 1] + h);
            const __m256i lo = _mm256_unpacklo_epi8(a, b);
            const __m256i hi = _mm256_unpackhi_epi8(a, b);
            _mm256_storeu_si256((__m256i *) dst,     _mm256_permute2x128_si256(lo, hi, 0x20));
            _mm256_storeu_si256((__m256i *) dst + 1, _mm256_permute2x128_si256(lo, hi, 0x31));
        }
    }
}

#else

ALWAYS_INLINE void arrange_keys(int8_t (* rows)[N], int8_t * dst) {
    for (int i = 0; i < N; ++i) {
        for (int r = 0; r < N; ++r) {
            dst[i*N + r] = rows[r][i];
        }
    }
}

ALWAYS_INLINE void arrange_values(int8_t (* rows)[N], int8_t * dst) {
    memcpy(dst, rows, TQ_TILE_SIZE);
}

#endif

int tq_tile_coordinate(int i) {
#if defined(TILE_AVX512)
    return i%16/4*16 + i/16*4 + i%4;
#else
    return i;
#endif
}

void tq_tile_unpack(const struct tq_tile_type * tile, bool values, const void * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    int8_t rows[2][N][N];
    switch (tile->type) {
#define CASE(TYPE, kind, bits) \
        case TQ_TYPE_##TYPE: unpack_rows(kind, bits, tile->table, first, stride, n_rows, rows); break
        CASE(TQ2_MSE, TQ_KIND_MSE, 2); CASE(TQ3_MSE, TQ_KIND_MSE, 3); CASE(TQ4_MSE, TQ_KIND_MSE, 4);
        CASE(TQ2_QJL, TQ_KIND_QJL, 2); CASE(TQ3_QJL, TQ_KIND_QJL, 3); CASE(TQ4_QJL, TQ_KIND_QJL, 4);
        CASE(TQ2_TCQ, TQ_KIND_TCQ, 2); CASE(TQ3_TCQ, TQ_KIND_TCQ, 3); CASE(TQ4_TCQ, TQ_KIND_TCQ, 4);
#undef CASE
        case TQ_TYPE_COUNT: break;
    }
    for (int p = 0; p < tile->n_parts; ++p) {
        memset(rows[p][n_rows], 0, (size_t) (N - n_rows)*N);
        if (values) {
            arrange_values(rows[p], dst[p]);
        } else {
            arrange_keys(rows[p], dst[p]);
        }
    }
}

void tq_tile_scales(const void * first, size_t stride, int n_rows, float * d) {
    uint16_t half[N] = { 0 };
    for (int r = 0; r < n_rows; ++r) {
        memcpy(&half[r], (const uint8_t *) first + (size_t) r*stride, sizeof(uint16_t));
    }
    for (int r = 0; r < N; ++r) {
#if defined(__F16C__) && (defined(TILE_AVX512) || defined(TILE_AVX2))
        d[r] = _cvtsh_ss(half[r]);
#else
        d[r] = tq_half_to_float(half[r]);
#endif
    }
}

//
// products
//

void tq_tile_split(const float * x, const float * weights, float max, struct tq_tile_numbers * dst) {
    const float scale = max > 0.0f && max <= FLT_MAX ? (float) MAX_NUMBER/max : 0.0f;
    if (!(scale <= FLT_MAX && max <= FLT_MAX)) { // too small, or not a number
        memset(dst, 0, sizeof(*dst));
        return;
    }
#if defined(TILE_AVX512)
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < N; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale));
        if (weights) {
            v = _mm512_mul_ps(v, _mm512_loadu_ps(weights + i));
        }
        const __m512i n = _mm512_cvtps_epi32(v); // 128*hi + lo
        sum = _mm512_add_epi32(sum, n);
        _mm_storeu_si128((__m128i *) (dst->digits + i),     _mm512_cvtepi32_epi8(_mm512_srai_epi32(n, 7)));
        _mm_storeu_si128((__m128i *) (dst->digits + i + N), _mm512_cvtepi32_epi8(_mm512_and_si512(n, _mm512_set1_epi32(127))));
    }
    dst->sum = _mm512_reduce_add_epi32(sum);
#elif defined(TILE_AVX2)
    for (int i = 0; i < N; i += 16) {
        __m256i n[2];
        for (int h = 0; h < 2; ++h) {
            __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8*h), _mm256_set1_ps(scale));
            if (weights) {
                v = _mm256_mul_ps(v, _mm256_loadu_ps(weights + i + 8*h));
            }
            n[h] = _mm256_cvtps_epi32(v);
        }
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(n[0], n[1]), 0xd8);
        _mm256_storeu_si256((__m256i *) (dst->digits + 2*i), words);
    }
    dst->sum = 0;
#else
    int16_t n[N];
    for (int i = 0; i < N; ++i) {
        const float v = x[i]*scale;
        n[i] = (int16_t) rintf(weights ? v*weights[i] : v);
    }
    memcpy(dst->digits, n, sizeof(n));
    dst->sum = 0;
#endif
}

float tq_tile_number_scale(float max) {
    return max/(float) MAX_NUMBER;
}

#if defined(TILE_AVX512)

ALWAYS_INLINE void multiply(int n, const int8_t * bytes, const struct tq_tile_numbers * numbers, int32_t * sums, size_t step) {
    __m512i hi[4][4];
    __m512i lo[4][4];
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
            memcpy(&h, numbers[r].digits + 4*g,     sizeof(h));
            memcpy(&w, numbers[r].digits + 4*g + N, sizeof(w));
            const __m512i vh = _mm512_set1_epi32(h);
            const __m512i vw = _mm512_set1_epi32(w);
            for (int l = 0; l < 4; ++l) {
                hi[r][l] = _mm512_dpbusd_epi32(hi[r][l], b[l], vh);
                lo[r][l] = _mm512_dpbusd_epi32(lo[r][l], b[l], vw);
            }
        }
    }
    for (int r = 0; r < n; ++r, sums += step) {
        const __m512i shift = _mm512_set1_epi32(128*numbers[r].sum);
        for (int l = 0; l < 4; ++l) {
            const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(hi[r][l], 7), lo[r][l]), shift);
            _mm512_storeu_si512(sums + 16*l, _mm512_add_epi32(_mm512_loadu_si512(sums + 16*l), sum));
        }
    }
}

void tq_tile_multiply(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) {
    for (; n >= 2; n -= 2, numbers += 2, sums += 2*step) {
        multiply(2, bytes, numbers, sums, step);
    }
    if (n == 1) {
        multiply(1, bytes, numbers, sums, step);
    }
}

#elif defined(TILE_AVX2)

// n rows, n_vec registers of sums a row at a time
ALWAYS_INLINE void multiply(int n, int n_vec, const int8_t * bytes, const struct tq_tile_numbers * numbers, int32_t * sums, size_t step) {
    for (int lane = 0; lane < N; lane += 8*n_vec) {
        __m256i s[8][8];
        for (int r = 0; r < n; ++r) {
            for (int l = 0; l < n_vec; ++l) {
                s[r][l] = _mm256_loadu_si256((const __m256i *) (sums + r*step + lane) + l);
            }
        }
        const int8_t * b = bytes + 2*lane;
        for (int g = 0; g < N/2; ++g, b += 2*N) {
            __m256i w[8];
            for (int l = 0; l < n_vec; ++l) {
                w[l] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) b + l));
            }
            for (int r = 0; r < n; ++r) {
                int32_t pair;
                memcpy(&pair, numbers[r].digits + 4*g, sizeof(pair));
                for (int l = 0; l < n_vec; ++l) {
                    s[r][l] = _mm256_add_epi32(s[r][l], _mm256_madd_epi16(w[l], _mm256_set1_epi32(pair)));
                }
            }
        }
        for (int r = 0; r < n; ++r) {
            for (int l = 0; l < n_vec; ++l) {
                _mm256_storeu_si256((__m256i *) (sums + r*step + lane) + l, s[r][l]);
            }
        }
    }
}

void tq_tile_multiply(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) {
    for (; n >= 4; n -= 4, numbers += 4, sums += 4*step) {
        multiply(4, 2, bytes, numbers, sums, step);
    }
    switch (n) {
        case 3: multiply(3, 2, bytes, numbers, sums, step); break;
        case 2: multiply(2, 4, bytes, numbers, sums, step); break;
        case 1: multiply(1, 8, bytes, numbers, sums, step); break;
    }
}

#else

void tq_tile_multiply(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) {
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

#endif
