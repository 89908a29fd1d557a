#pragma once

// Tiles with AVX2. Included by tq-tile.c.
//
// Words by words: pmaddwd takes two at a time, and four that lie beside each other are one number of 64 bits, so that a query's
// four are spread by a load. Keys: [16 steps of 4 coordinates][64 rows][4], values: [16 steps of 4 rows][64 coordinates][4],
// coordinates in the order of avx2_coordinate(), in which unpacking finds them.

#ifdef TQ_TILE_X86

#define TARGET_AVX2 TARGET("avx2,f16c,fma")

static int avx2_coordinate(int i) {
    return i%4*16 + i/4%2*8 + i/8;
}

// bits of b, shift places on, for those of a that are not in the mask, and the other way round
ALWAYS_INLINE TARGET_AVX2 void avx2_exchange(__m256i * a, __m256i * b, int shift, int mask) {
    const __m256i t = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi64(*a, shift), *b), _mm256_set1_epi8((char) mask));
    *b = _mm256_xor_si256(*b, t);
    *a = _mm256_xor_si256(*a, _mm256_slli_epi64(t, shift));
}

// as tq_trellis_label_plane(), of four rows
ALWAYS_INLINE TARGET_AVX2 __m256i avx2_label_plane(__m256i c, int taps) {
    __m256i label = taps & 1 ? c : _mm256_setzero_si256();
    for (int i = 1; i < 6; ++i) {
        if (taps >> i & 1) {
            label = _mm256_xor_si256(label, _mm256_or_si256(_mm256_slli_epi64(c, i), _mm256_srli_epi64(c, N - i)));
        }
    }
    return label;
}

// of four rows' planes, a byte of a row or two bytes of one beside those of the others, byte k: coordinates 8*k to 8*k + 7
ALWAYS_INLINE TARGET_AVX2 __m256i avx2_beside(__m256i plane) {
    const __m256i words  = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i dwords = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(plane, words), dwords);
}

ALWAYS_INLINE TARGET_AVX2 __m256i avx2_load_rows(const uint8_t * lo, const uint8_t * hi) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) lo)), _mm_loadu_si128((const __m128i *) hi), 1);
}

// coordinates 8*k + m of four rows, step bytes from those of m + 1
ALWAYS_INLINE TARGET_AVX2 void avx2_store(int8_t * dst, size_t step, int m, __m256i bytes) {
    dst += 2*m*step;
    _mm256_storeu_si256((__m256i *) dst,          _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
    _mm256_storeu_si256((__m256i *) (dst + step), _mm256_srai_epi16(bytes, 8));
}

ALWAYS_INLINE TARGET_AVX2 void avx2_unpack_type(enum tq_kind kind, int bits, const int8_t * table, bool values, const uint8_t * first, size_t stride, int n_rows,
        int8_t (* dst)[TQ_TILE_SIZE]) {
    const int n_free = kind == TQ_KIND_MSE ? bits : bits - 1;
    const size_t step  = values ? 32 : 8*N;   // bytes between what lies beside each other in the planes
    const size_t group = values ? 8*N : 32;   // between groups of four rows
    const __m256i lo = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table));
    const __m256i hi = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (table + 16)));
    for (int g = 0; g < N/4; ++g) {
        const uint8_t * row[4];
        for (int r = 0; r < 4; ++r) {
            row[r] = row_at(first, stride, n_rows, 4*g + r);
            prefetch(row[r], N*stride, bits); // the next tile is likely to be wanted
            row[r] += sizeof(uint16_t);
        }
        // a plane: a row's 64 bits beside those of the next
        __m256i w[8];
        for (int p = 0; p < bits; p += 2) {
            const int q = p + 1 < bits ? p : p - 1; // 16 bytes: planes q and q + 1
            const __m256i a = avx2_load_rows(row[0] + 8*q, row[2] + 8*q);
            const __m256i b = avx2_load_rows(row[1] + 8*q, row[3] + 8*q);
            if (q == p) {
                w[p] = _mm256_unpacklo_epi64(a, b);
            }
            w[q + 1] = _mm256_unpackhi_epi64(a, b);
        }
        const __m256i last = w[bits - 1];
        int n = n_free;
        if (kind == TQ_KIND_TCQ) {
            static const int taps[5][4] = { [2] = TQ_TRELLIS_TAPS_2B, [3] = TQ_TRELLIS_TAPS_3B, [4] = TQ_TRELLIS_TAPS_4B };
            for (; n < TQ_TRELLIS_INDEX_BITS; ++n) {
                w[n] = avx2_label_plane(last, taps[bits][n - n_free]);
            }
        }
        for (int p = 0; p < n && values; ++p) {
            w[p] = avx2_beside(w[p]);
        }
        for (int p = n; p < 4; ++p) {
            w[p] = _mm256_setzero_si256();
        }
        // planes become indices: of coordinates 8*k + m and 8*k + 4 + m in the halves of a byte
        __m256i e[4] = { w[0], w[1], w[2], w[3] };
        avx2_exchange(&e[0], &e[1], 1, 0x55);
        avx2_exchange(&e[2], &e[3], 1, 0x55);
        avx2_exchange(&e[0], &e[2], 2, 0x33);
        avx2_exchange(&e[1], &e[3], 2, 0x33);
        for (int m = 0; m < 8; ++m) {
            const __m256i index = _mm256_and_si256(m < 4 ? e[m] : _mm256_srli_epi16(e[m - 4], 4), _mm256_set1_epi8(15));
            __m256i level = _mm256_shuffle_epi8(lo, index);
            if (n == 5) {
                level = _mm256_blendv_epi8(level, _mm256_shuffle_epi8(hi, index), _mm256_slli_epi64(w[4], 7 - m));
            }
            avx2_store(dst[0] + g*group, step, m, level);
        }
        if (kind == TQ_KIND_QJL) {
            const __m256i signs = values ? avx2_beside(last) : last;
            for (int m = 0; m < 8; ++m) {
                avx2_store(dst[1] + g*group, step, m, _mm256_blendv_epi8(_mm256_set1_epi8(-1), _mm256_set1_epi8(1), _mm256_slli_epi64(signs, 7 - m)));
            }
        }
    }
}

TARGET_AVX2 static void avx2_unpack_keys(const struct tq_tile_type * tile, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    FOR_TYPE(tile->type, avx2_unpack_type, tile->table, false, first, stride, n_rows, dst)
}

TARGET_AVX2 static void avx2_unpack_values(const struct tq_tile_type * tile, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    FOR_TYPE(tile->type, avx2_unpack_type, tile->table, true, first, stride, n_rows, dst)
}

static void avx2_unpack(const struct tq_tile_type * tile, bool values, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    (values ? avx2_unpack_values : avx2_unpack_keys)(tile, first, stride, n_rows, dst);
}

TARGET_AVX2 static void avx2_scales(const uint16_t * half, float * d) {
    for (int r = 0; r < N; r += 8) {
        _mm256_storeu_ps(d + r, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (half + r))));
    }
}

TARGET_AVX2 static void avx2_split(bool values, const float * x, const float * weights, float scale, struct tq_tile_numbers * dst) {
    int16_t n[N];
    for (int i = 0; i < N; i += 16) {
        __m256i w[2];
        for (int h = 0; h < 2; ++h) {
            __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8*h), _mm256_set1_ps(scale));
            if (weights) {
                v = _mm256_mul_ps(v, _mm256_loadu_ps(weights + i + 8*h));
            }
            w[h] = _mm256_cvtps_epi32(v);
        }
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(w[0], w[1]), 0xd8);
        _mm256_storeu_si256((__m256i *) (values ? dst->digits + 2*i : (uint8_t *) (n + i)), words);
    }
    for (int i = 0; i < N && !values; ++i) {
        memcpy(dst->digits + 2*i, &n[avx2_coordinate(i)], sizeof(n[0]));
    }
    dst->sum = 0;
}

#define AVX2_DOT(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))

// n queries, n_vec registers of sums a query at a time; what makes the dot products, and how many queries share what is loaded, is the difference
#define AVX2_MULTIPLY(name, target, many, dot) \
ALWAYS_INLINE target void name##_n(int n, int n_vec, const int8_t * bytes, const struct tq_tile_numbers * numbers, int32_t * sums, size_t step) { \
    for (int v = 0; v < 16; v += n_vec) { \
        __m256i s[6][8]; \
        for (int r = 0; r < n; ++r) { \
            for (int l = 0; l < n_vec; ++l) { \
                s[r][l] = _mm256_setzero_si256(); \
            } \
        } \
        const int8_t * b = bytes + 32*v; \
        for (int k = 0; k < N/4; ++k, b += 8*N) { \
            __m256i x[8]; \
            for (int l = 0; l < n_vec; ++l) { \
                x[l] = _mm256_loadu_si256((const __m256i *) b + l); \
            } \
            for (int r = 0; r < n; ++r) { \
                long long four; \
                memcpy(&four, numbers[r].digits + 8*k, sizeof(four)); \
                for (int l = 0; l < n_vec; ++l) { \
                    s[r][l] = dot(s[r][l], x[l], _mm256_set1_epi64x(four)); \
                    IN_REGISTER(s[r][l]); \
                } \
            } \
        } \
        for (int r = 0; r < n; ++r) { \
            for (int l = 0; l < n_vec; l += 2) { \
                const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(s[r][l], s[r][l + 1]), 0xd8); \
                __m256i * to = (__m256i *) (sums + r*step + 4*(v + l)); \
                _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sum)); \
            } \
        } \
    } \
} \
target static void name(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) { \
    for (; n >= many; n -= many, numbers += many, sums += many*step) { \
        name##_n(many, 2, bytes, numbers, sums, step); \
    } \
    switch (n) { \
        case 5: name##_n(5, 2, bytes, numbers, sums, step); break; \
        case 4: name##_n(4, 2, bytes, numbers, sums, step); break; \
        case 3: name##_n(3, 2, bytes, numbers, sums, step); break; \
        case 2: name##_n(2, 4, bytes, numbers, sums, step); break; \
        case 1: name##_n(1, 8, bytes, numbers, sums, step); break; \
    } \
}

AVX2_MULTIPLY(avx2_multiply, TARGET_AVX2, 4, AVX2_DOT)

// n_vec registers of distances of n queries: the cosines' sums, or the sines'
ALWAYS_INLINE TARGET_AVX2 void avx2_turn_half(int n, int n_vec, const float * angles, int32_t n_pairs, const float * const * w, bool sines, float (* dst)[32]) {
    __m256 s[6][4];
    for (int r = 0; r < n; ++r) {
        UNROLL
        for (int l = 0; l < n_vec; ++l) {
            s[r][l] = sines ? _mm256_setzero_ps() : _mm256_set1_ps(w[r][2*n_pairs]);
        }
    }
    angles += sines ? n_pairs*TQ_CENTER_HALF : 0;
    const int32_t first = sines ? n_pairs : 0;
    for (int32_t k = first; k < first + n_pairs; ++k, angles += TQ_CENTER_HALF) {
        __m256 x[4];
        UNROLL
        for (int l = 0; l < n_vec; ++l) {
            x[l] = _mm256_loadu_ps(angles + 8*l);
        }
        for (int r = 0; r < n; ++r) {
            const __m256 wk = _mm256_set1_ps(w[r][k]);
            UNROLL
            for (int l = 0; l < n_vec; ++l) {
                s[r][l] = _mm256_fmadd_ps(wk, x[l], s[r][l]);
                IN_REGISTER(s[r][l]);
            }
        }
    }
    for (int r = 0; r < n; ++r) {
        UNROLL
        for (int l = 0; l < n_vec; ++l) {
            _mm256_storeu_ps(dst[r] + 8*l, s[r][l]);
        }
    }
}

ALWAYS_INLINE TARGET_AVX2 void avx2_turn(int n, int n_vec, const float * angles, int32_t n_pairs, const float * const * w, float * sums, size_t step) {
    for (int i = 0; i < TQ_CENTER_HALF; i += 8*n_vec) {
        float e[6][32];
        float o[6][32];
        avx2_turn_half(n, n_vec, angles + i, n_pairs, w, false, e);
        IN_MEMORY(e);
        avx2_turn_half(n, n_vec, angles + i, n_pairs, w, true,  o);
        for (int r = 0; r < n; ++r) {
            float * middle = sums + r*step + TQ_CENTER_HALF;
            for (int j = 0; j < 8*n_vec; j += 8) {
                const __m256 x = _mm256_loadu_ps(e[r] + j);
                const __m256 y = _mm256_loadu_ps(o[r] + j);
                const __m256 less = _mm256_permutevar8x32_ps(_mm256_sub_ps(x, y), _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
                float * up   = middle + i + j;
                float * down = middle - i - j - 8;
                _mm256_storeu_ps(up,   _mm256_add_ps(_mm256_loadu_ps(up),   _mm256_add_ps(x, y)));
                _mm256_storeu_ps(down, _mm256_add_ps(_mm256_loadu_ps(down), less));
            }
        }
    }
}

TARGET_AVX2 static void avx2_turns(const float * angles, int32_t n, const float * const * w, int n_queries, float * sums, size_t step) {
    for (; n_queries >= 6; n_queries -= 6, w += 6, sums += 6*step) {
        avx2_turn(6, 2, angles, n, w, sums, step);
    }
    switch (n_queries) {
        case 5: avx2_turn(5, 2, angles, n, w, sums, step); break;
        case 4: avx2_turn(4, 2, angles, n, w, sums, step); break;
        case 3: avx2_turn(3, 4, angles, n, w, sums, step); break;
        case 2: avx2_turn(2, 4, angles, n, w, sums, step); break;
        case 1: avx2_turn(1, 4, angles, n, w, sums, step); break;
    }
}

static bool avx2_available(void) {
    return CPU_HAS_AVX2;
}

static const struct tq_tile_functions tile_avx2 = {
    { "avx2", avx2_available }, avx2_unpack, avx2_scales, avx2_split, avx2_multiply, avx2_coordinate, avx2_turns,
};

#ifdef TQ_TILE_AVXVNNI

// AVX-VNNI: as AVX2, with the sum of products in one instruction

#define TARGET_AVXVNNI TARGET("avx2,f16c,fma,avxvnni")

AVX2_MULTIPLY(avxvnni_multiply, TARGET_AVXVNNI, 6, _mm256_dpwssd_avx_epi32)

static bool avxvnni_available(void) { // compilers differ in which names of features they know
    unsigned a, b, c, d;
    return CPU_HAS_AVX2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static const struct tq_tile_functions tile_avxvnni = {
    { "avxvnni", avxvnni_available }, avx2_unpack, avx2_scales, avx2_split, avxvnni_multiply, avx2_coordinate, avx2_turns,
};

#endif

#endif
