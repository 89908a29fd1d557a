#pragma once

// Tiles with AVX-512, VBMI and VNNI. Included by tq-tile.c.
//
// Bytes by bytes: a number is two digits, 128*hi + lo. Keys: [16 groups of 4 coordinates][64 rows][4]; values: [16 groups of 4
// rows][64 coordinates][4], coordinates in the order of avx512_coordinate(), in which unpacking finds them. The product
// takes bytes that are not signed on one side: a level is stored as level + 128.

#ifdef TQ_TILE_X86

#define TARGET_AVX512 TARGET("avx512f,avx512bw,avx512vbmi,avx512vnni")

static int avx512_coordinate(int i) {
    return i%8*8 + i/8;
}

// mask ? a : b, bit by bit
#define AVX512_SELECT(mask, a, b) _mm512_ternarylogic_epi64(_mm512_set1_epi8((char) (mask)), a, b, 0xca)

// bits of b, shift places on, for those of a that are not in the mask, and the other way round
ALWAYS_INLINE TARGET_AVX512 void avx512_exchange(__m512i * a, __m512i * b, int shift, int mask) {
    const __m512i x = *a;
    *a = AVX512_SELECT(mask, x, _mm512_slli_epi64(*b, shift));
    *b = AVX512_SELECT(mask, _mm512_srli_epi64(x, shift), *b);
}

// bytes of rows 4*l to 4*l + 3 in lane l
ALWAYS_INLINE TARGET_AVX512 __m512i avx512_load_rows(const uint8_t * const * row, size_t offset) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) (row[0] + offset)));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (row[ 4] + offset)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (row[ 8] + offset)), 2);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (row[12] + offset)), 3);
    return x;
}

// Two planes of rows 4*l + r in lane l of x[r]: first[h] becomes 4 bytes, from 4*h on, of the first plane of each row, lane l:
// rows 4*l to 4*l + 3; of values the rows' bytes k beside each other. The same of the second plane.
ALWAYS_INLINE TARGET_AVX512 void avx512_beside(bool values, const __m512i * x, __m512i * first, __m512i * second) {
    if (values) {
        const __m512i ab0 = _mm512_unpacklo_epi8(x[0], x[1]), cd0 = _mm512_unpacklo_epi8(x[2], x[3]);
        const __m512i ab1 = _mm512_unpackhi_epi8(x[0], x[1]), cd1 = _mm512_unpackhi_epi8(x[2], x[3]);
        first [0] = _mm512_unpacklo_epi16(ab0, cd0);
        first [1] = _mm512_unpackhi_epi16(ab0, cd0);
        second[0] = _mm512_unpacklo_epi16(ab1, cd1);
        second[1] = _mm512_unpackhi_epi16(ab1, cd1);
    } else {
        const __m512i ab0 = _mm512_unpacklo_epi32(x[0], x[1]), cd0 = _mm512_unpacklo_epi32(x[2], x[3]);
        const __m512i ab1 = _mm512_unpackhi_epi32(x[0], x[1]), cd1 = _mm512_unpackhi_epi32(x[2], x[3]);
        first [0] = _mm512_unpacklo_epi64(ab0, cd0);
        first [1] = _mm512_unpackhi_epi64(ab0, cd0);
        second[0] = _mm512_unpacklo_epi64(ab1, cd1);
        second[1] = _mm512_unpackhi_epi64(ab1, cd1);
    }
}

// as tq_trellis_label_plane(), of each 64 bits
ALWAYS_INLINE TARGET_AVX512 __m512i avx512_label_plane(__m512i c, int taps) {
    __m512i label = taps & 1 ? c : _mm512_setzero_si512();
#define TAP(i) if (taps >> i & 1) { label = _mm512_xor_si512(label, _mm512_rol_epi64(c, i)); }
    TAP(1) TAP(2) TAP(3) TAP(4) TAP(5)
#undef TAP
    return label;
}

// x[2*i + h]: coordinates 8*k + m + i, k from 4*h to 4*h + 3, of rows 16*g to 16*g + 15
ALWAYS_INLINE TARGET_AVX512 void avx512_store(bool values, int8_t * dst, int g, int m, const __m512i * x) {
    if (!values) {
        for (int i = 0; i < 4; ++i) {
            _mm512_storeu_si512(dst + 4*N*(2*m + i) + N*g, x[i]);
        }
        return;
    }
    // lanes are groups of four rows, and become coordinates
    const __m512i lo01 = _mm512_shuffle_i32x4(x[0], x[1], 0x44);
    const __m512i hi01 = _mm512_shuffle_i32x4(x[0], x[1], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
    const __m512i hi23 = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
    dst += 16*N*g + 32*m;
    _mm512_storeu_si512(dst,          _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_storeu_si512(dst +  4*N,   _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
    _mm512_storeu_si512(dst +  8*N,   _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_storeu_si512(dst + 12*N,   _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
}

ALWAYS_INLINE TARGET_AVX512 void avx512_unpack_type(enum tq_kind kind, int bits, const int8_t * table, bool values, const uint8_t * first, size_t stride, int n_rows,
        int8_t (* dst)[TQ_TILE_SIZE]) {
    const int n = kind == TQ_KIND_MSE ? bits : kind == TQ_KIND_QJL ? bits - 1 : TQ_TRELLIS_INDEX_BITS; // bits of an index
    // whatever the bits of 64 that are not the index's
    __m512i levels = n == 5 ? _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) table)) : _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table));
    levels = _mm512_xor_si512(levels, _mm512_set1_epi8((char) 128));
    for (int g = 0; g < N/16; ++g) {
        const uint8_t * row[16];
        for (int r = 0; r < 16; ++r) {
            row[r] = row_at(first, stride, n_rows, 16*g + r);
            prefetch(row[r], N*stride, bits); // the next tile is likely to be wanted
            row[r] += sizeof(uint16_t);
        }
        __m512i w[8][2]; // planes
        for (int p = 0; p < 8; ++p) {
            w[p][0] = w[p][1] = _mm512_setzero_si512();
        }
        __m512i x[4];
        for (int p = 0; p < bits; p += 2) {
            const int q = p + 1 < bits ? p : p - 1; // 16 bytes: planes q and q + 1
            for (int r = 0; r < 4; ++r) {
                x[r] = avx512_load_rows(row + r, 8*q);
            }
            avx512_beside(values, x, w[q], w[q + 1]);
        }
        __m512i signs[2] = { w[bits - 1][0], w[bits - 1][1] };
        if (kind == TQ_KIND_QJL) {
            w[bits - 1][0] = w[bits - 1][1] = _mm512_setzero_si512();
        }
        if (kind == TQ_KIND_TCQ) { // x: the last plane is the upper half of lanes
            static const int taps[5][4] = { [2] = TQ_TRELLIS_TAPS_2B, [3] = TQ_TRELLIS_TAPS_3B, [4] = TQ_TRELLIS_TAPS_4B };
            for (int p = bits - 1; p < n; p += 2) {
                const int a = taps[bits][p - (bits - 1)];
                const int b = p + 1 < n ? taps[bits][p + 1 - (bits - 1)] : 0;
                __m512i y[4];
                for (int r = 0; r < 4; ++r) {
                    y[r] = _mm512_unpackhi_epi64(avx512_label_plane(x[r], a), avx512_label_plane(x[r], b));
                }
                avx512_beside(values, y, w[p], w[p + 1]);
            }
        }
        // planes become indices: of coordinates 8*k + m and 8*k + 4 + m in the halves of a byte
        for (int h = 0; h < 2; ++h) {
            avx512_exchange(&w[0][h], &w[1][h], 1, 0x55);
            avx512_exchange(&w[2][h], &w[3][h], 1, 0x55);
            avx512_exchange(&w[0][h], &w[2][h], 2, 0x33);
            avx512_exchange(&w[1][h], &w[3][h], 2, 0x33);
        }
        for (int m = 0; m < 8; m += 2) {
            __m512i level[4];
            __m512i sign [4];
            for (int i = 0; i < 4; ++i) {
                const int h = i%2;
                const int c = m + i/2;
                __m512i index = c < 4 ? w[c][h] : _mm512_srli_epi64(w[c - 4][h], 4);
                if (n == 5) {
                    index = AVX512_SELECT(16, c < 4 ? _mm512_slli_epi64(w[4][h], 4 - c) : _mm512_srli_epi64(w[4][h], c - 4), index);
                }
                level[i] = _mm512_permutexvar_epi8(index, levels);
                if (kind == TQ_KIND_QJL) {
                    const __mmask64 set = _mm512_test_epi8_mask(signs[h], _mm512_set1_epi8((char) (1 << c)));
                    sign[i] = _mm512_mask_blend_epi8(set, _mm512_set1_epi8((char) (128 - 1)), _mm512_set1_epi8((char) (128 + 1)));
                }
            }
            avx512_store(values, dst[0], g, m, level);
            if (kind == TQ_KIND_QJL) {
                avx512_store(values, dst[1], g, m, sign);
            }
        }
    }
}

TARGET_AVX512 static void avx512_unpack_keys(const struct tq_tile_type * tile, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    FOR_TYPE(tile->type, avx512_unpack_type, tile->table, false, first, stride, n_rows, dst)
}

TARGET_AVX512 static void avx512_unpack_values(const struct tq_tile_type * tile, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    FOR_TYPE(tile->type, avx512_unpack_type, tile->table, true, first, stride, n_rows, dst)
}

static void avx512_unpack(const struct tq_tile_type * tile, bool values, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    (values ? avx512_unpack_values : avx512_unpack_keys)(tile, first, stride, n_rows, dst);
}

TARGET_AVX512 static void avx512_scales(const uint16_t * half, float * d) {
    for (int r = 0; r < N; r += 16) {
        _mm512_storeu_ps(d + r, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (half + r))));
    }
}

TARGET_AVX512 static void avx512_split(bool values, const float * x, const float * weights, float scale, struct tq_tile_numbers * dst) {
    int8_t hi[N];
    int8_t lo[N];
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < N; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale));
        if (weights) {
            v = _mm512_mul_ps(v, _mm512_loadu_ps(weights + i));
        }
        const __m512i n = _mm512_cvtps_epi32(v); // 128*hi + lo
        sum = _mm512_add_epi32(sum, n);
        _mm_storeu_si128((__m128i *) (values ? (int8_t *) dst->digits + i     : hi + i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(n, 7)));
        _mm_storeu_si128((__m128i *) (values ? (int8_t *) dst->digits + i + N : lo + i), _mm512_cvtepi32_epi8(_mm512_and_si512(n, _mm512_set1_epi32(127))));
    }
    for (int i = 0; i < N && !values; ++i) {
        dst->digits[i]     = (uint8_t) hi[avx512_coordinate(i)];
        dst->digits[i + N] = (uint8_t) lo[avx512_coordinate(i)];
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

// all distances of n queries
ALWAYS_INLINE TARGET_AVX512 void avx512_turn(int n, const float * angles, int32_t n_pairs, const float * const * w, float * sums, size_t step) {
    __m512 e[6][2];
    __m512 o[6][2];
    for (int r = 0; r < n; ++r) {
        for (int l = 0; l < 2; ++l) {
            e[r][l] = _mm512_set1_ps(w[r][2*n_pairs]);
            o[r][l] = _mm512_setzero_ps();
        }
    }
    const float * sines = angles + n_pairs*TQ_CENTER_HALF;
    for (int32_t k = 0; k < n_pairs; ++k, angles += TQ_CENTER_HALF, sines += TQ_CENTER_HALF) {
        for (int l = 0; l < 2; ++l) {
            const __m512 c = _mm512_loadu_ps(angles + 16*l);
            const __m512 s = _mm512_loadu_ps(sines  + 16*l);
            for (int r = 0; r < n; ++r) {
                e[r][l] = _mm512_fmadd_ps(_mm512_set1_ps(w[r][k]),           c, e[r][l]);
                o[r][l] = _mm512_fmadd_ps(_mm512_set1_ps(w[r][k + n_pairs]), s, o[r][l]);
            }
        }
    }
    const __m512i reverse = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int r = 0; r < n; ++r) {
        float * middle = sums + r*step + TQ_CENTER_HALF;
        for (int l = 0; l < 2; ++l) {
            float * up   = middle + 16*l;
            float * down = middle - 16*l - 16;
            const __m512 less = _mm512_permutexvar_ps(reverse, _mm512_sub_ps(e[r][l], o[r][l]));
            _mm512_storeu_ps(up,   _mm512_add_ps(_mm512_loadu_ps(up),   _mm512_add_ps(e[r][l], o[r][l])));
            _mm512_storeu_ps(down, _mm512_add_ps(_mm512_loadu_ps(down), less));
        }
    }
}

TARGET_AVX512 static void avx512_turns(const float * angles, int32_t n, const float * const * w, int n_queries, float * sums, size_t step) {
    for (; n_queries >= 6; n_queries -= 6, w += 6, sums += 6*step) {
        avx512_turn(6, angles, n, w, sums, step);
    }
    switch (n_queries) {
        case 5: avx512_turn(5, angles, n, w, sums, step); break;
        case 4: avx512_turn(4, angles, n, w, sums, step); break;
        case 3: avx512_turn(3, angles, n, w, sums, step); break;
        case 2: avx512_turn(2, angles, n, w, sums, step); break;
        case 1: avx512_turn(1, angles, n, w, sums, step); break;
    }
}

static bool avx512_available(void) {
    return CPU_HAS_AVX512;
}

static const struct tq_tile_functions tile_avx512 = {
    { "avx512", avx512_available }, avx512_unpack, avx512_scales, avx512_split, avx512_multiply_all, avx512_coordinate, avx512_turns,
};

#endif
