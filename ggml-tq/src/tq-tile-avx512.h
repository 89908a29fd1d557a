#pragma once

// Tiles with AVX-512, VBMI and VNNI. Included by tq-tile.c.
//
// Bytes by bytes: a number is two digits, 128*hi + lo. Keys: [16 groups of 4 coordinates][64 rows][4]; values: [16 groups of 4
// rows][64 coordinates in the order of avx512_coordinate()][4].

#ifdef TQ_TILE_X86

#define TARGET_AVX512 TARGET("avx512f,avx512bw,avx512vbmi,avx512vnni")

ALWAYS_INLINE TARGET_AVX512 void avx512_unpack_block(enum tq_kind kind, int bits, const int8_t * table, const uint8_t * block, int8_t (* levels)[N], int8_t (* signs)[N]) {
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

// bytes are not signed on this side: level + 128
ALWAYS_INLINE TARGET_AVX512 void avx512_store(int8_t * dst, __m512i x) {
    _mm512_storeu_si512(dst, _mm512_xor_si512(x, _mm512_set1_epi8((char) 128)));
}

// keys: [16 groups of 4 coordinates][64 rows][4]; 16 rows of them here
ALWAYS_INLINE TARGET_AVX512 void avx512_arrange_keys_16(int8_t (* rows)[N], int8_t * dst) {
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
        avx512_store(dst + (j     )*4*N, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
        avx512_store(dst + (j +  4)*4*N, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
        avx512_store(dst + (j +  8)*4*N, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
        avx512_store(dst + (j + 12)*4*N, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
    }
}

ALWAYS_INLINE TARGET_AVX512 void avx512_arrange_keys(int8_t (* rows)[N], int8_t * dst) {
    for (int r = 0; r < N; r += 16) {
        avx512_arrange_keys_16(rows + r, dst + r*4);
    }
}

// values: [16 groups of 4 rows][64 coordinates in the order of avx512_coordinate()][4]
ALWAYS_INLINE TARGET_AVX512 void avx512_arrange_values(int8_t (* rows)[N], int8_t * dst) {
    for (int r = 0; r < N; r += 4, dst += 4*N) {
        const __m512i a = _mm512_loadu_si512(rows[r]);
        const __m512i b = _mm512_loadu_si512(rows[r + 1]);
        const __m512i c = _mm512_loadu_si512(rows[r + 2]);
        const __m512i d = _mm512_loadu_si512(rows[r + 3]);
        const __m512i ab0 = _mm512_unpacklo_epi8(a, b);
        const __m512i ab1 = _mm512_unpackhi_epi8(a, b);
        const __m512i cd0 = _mm512_unpacklo_epi8(c, d);
        const __m512i cd1 = _mm512_unpackhi_epi8(c, d);
        avx512_store(dst,       _mm512_unpacklo_epi16(ab0, cd0));
        avx512_store(dst +   N, _mm512_unpackhi_epi16(ab0, cd0));
        avx512_store(dst + 2*N, _mm512_unpacklo_epi16(ab1, cd1));
        avx512_store(dst + 3*N, _mm512_unpackhi_epi16(ab1, cd1));
    }
}

ALWAYS_INLINE TARGET_AVX512 void avx512_unpack_rows(enum tq_kind kind, int bits, const int8_t * table, const uint8_t * first, size_t stride, int n_rows, int8_t (* rows)[N][N]) {
    for (int r = 0; r < N; ++r) {
        const uint8_t * block = row_at(first, stride, n_rows, r);
        prefetch(block, N*stride, bits); // the next tile is likely to be wanted
        avx512_unpack_block(kind, bits, table, block, &rows[0][r], &rows[1][r]);
    }
}

TARGET_AVX512 static void avx512_unpack(const struct tq_tile_type * tile, bool values, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    int8_t rows[2][N][N];
    FOR_TYPE(tile->type, avx512_unpack_rows, tile->table, first, stride, n_rows, rows)
    for (int p = 0; p < tile->n_parts; ++p) {
        if (values) {
            avx512_arrange_values(rows[p], dst[p]);
        } else {
            avx512_arrange_keys(rows[p], dst[p]);
        }
    }
}

TARGET_AVX512 static void avx512_scales(const uint16_t * half, float * d) {
    for (int r = 0; r < N; r += 16) {
        _mm512_storeu_ps(d + r, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (half + r))));
    }
}

TARGET_AVX512 static void avx512_split(bool values, const float * x, const float * weights, float scale, struct tq_tile_numbers * dst) {
    (void) values;
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
}

ALWAYS_INLINE TARGET_AVX512 void avx512_multiply(int n, const int8_t * bytes, const struct tq_tile_numbers * numbers, int32_t * sums, size_t step) {
    __m512i hi[2][4];
    __m512i lo[2][4];
    for (int r = 0; r < n; ++r) {
        UNROLL
        for (int l = 0; l < 4; ++l) {
            hi[r][l] = _mm512_setzero_si512();
            lo[r][l] = _mm512_setzero_si512();
        }
    }
    for (int g = 0; g < N/4; ++g, bytes += 4*N) {
        __m512i b[4];
        UNROLL
        for (int l = 0; l < 4; ++l) {
            b[l] = _mm512_loadu_si512(bytes + l*N);
        }
        for (int r = 0; r < n; ++r) {
            int32_t h, w;
            memcpy(&h, numbers[r].digits + 4*g,     sizeof(h));
            memcpy(&w, numbers[r].digits + 4*g + N, sizeof(w));
            const __m512i vh = _mm512_set1_epi32(h);
            const __m512i vw = _mm512_set1_epi32(w);
            UNROLL
            for (int l = 0; l < 4; ++l) {
                hi[r][l] = _mm512_dpbusd_epi32(hi[r][l], b[l], vh);
                lo[r][l] = _mm512_dpbusd_epi32(lo[r][l], b[l], vw);
            }
            UNROLL
            for (int l = 0; l < 4; ++l) {
                IN_REGISTER(hi[r][l]);
                IN_REGISTER(lo[r][l]);
            }
        }
    }
    for (int r = 0; r < n; ++r, sums += step) {
        const __m512i shift = _mm512_set1_epi32(128*numbers[r].sum);
        UNROLL
        for (int l = 0; l < 4; ++l) {
            const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(hi[r][l], 7), lo[r][l]), shift);
            _mm512_storeu_si512(sums + 16*l, _mm512_add_epi32(_mm512_loadu_si512(sums + 16*l), sum));
        }
    }
}

TARGET_AVX512 static void avx512_multiply_all(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) {
    for (; n >= 2; n -= 2, numbers += 2, sums += 2*step) {
        avx512_multiply(2, bytes, numbers, sums, step);
    }
    if (n == 1) {
        avx512_multiply(1, bytes, numbers, sums, step);
    }
}


static int avx512_coordinate(int i) {
    return i%16/4*16 + i/16*4 + i%4;
}

// a block's sums of n queries in registers
ALWAYS_INLINE TARGET_AVX512 void avx512_turn(int n, const float * angles, int32_t n_angles, const float * const * w, float * sums, size_t step) {
    __m512 s[4][2];
    for (int r = 0; r < n; ++r) {
        for (int l = 0; l < 2; ++l) {
            s[r][l] = _mm512_loadu_ps(sums + r*step + 16*l);
        }
    }
    for (int32_t k = 0; k < n_angles; ++k, angles += TQ_CENTER_BLOCK) {
        const __m512 a[2] = { _mm512_loadu_ps(angles), _mm512_loadu_ps(angles + 16) };
        for (int r = 0; r < n; ++r) {
            for (int l = 0; l < 2; ++l) {
                s[r][l] = _mm512_add_ps(s[r][l], _mm512_mul_ps(_mm512_set1_ps(w[r][k]), a[l]));
            }
        }
    }
    for (int r = 0; r < n; ++r) {
        for (int l = 0; l < 2; ++l) {
            _mm512_storeu_ps(sums + r*step + 16*l, s[r][l]);
        }
    }
}

TARGET_AVX512 static void avx512_turns(const float * angles, int32_t n, const float * const * w, int n_queries, float * sums, size_t step) {
    for (; n_queries >= 4; n_queries -= 4, w += 4, sums += 4*step) {
        avx512_turn(4, angles, n, w, sums, step);
    }
    switch (n_queries) {
        case 3: avx512_turn(3, angles, n, w, sums, step); break;
        case 2: avx512_turn(2, angles, n, w, sums, step); break;
        case 1: avx512_turn(1, angles, n, w, sums, step); break;
    }
}

static bool avx512_available(void) {
    return CPU_HAS_AVX512;
}

static const struct tq_tile_functions tile_avx512 = {
    "avx512", avx512_available, avx512_unpack, avx512_scales, avx512_split, avx512_multiply_all, avx512_coordinate, avx512_turns,
};

#endif
