#pragma once

// Tiles with NEON, and with the dot products of bytes that newer processors have. Included by tq-tile.c.
//
// Bytes by bytes: a number is two digits, 128*hi + lo. Keys: [16 groups of 4 coordinates][64 rows][4], values: [16 groups of 4
// rows][64 coordinates][4], coordinates in the order of neon_coordinate(), in which unpacking finds them.

#ifdef TQ_TILE_NEON

#if defined(__ARM_FEATURE_DOTPROD)
#define TQ_TILE_DOTPROD
#define TARGET_DOTPROD
#define CPU_HAS_DOTPROD true
#elif defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <sys/auxv.h>
#define TQ_TILE_DOTPROD
#define TARGET_DOTPROD TARGET("arch=armv8.2-a+dotprod")
#define CPU_HAS_DOTPROD ((getauxval(AT_HWCAP) >> 20 & 1) != 0) // HWCAP_ASIMDDP
#endif

static int neon_coordinate(int i) {
    return i%8*8 + i/8;
}

// bits of b, shift places on, for those of a that are not in the mask, and the other way round
#define NEON_EXCHANGE(a, b, shift, mask) { \
    const uint8x16_t t = vandq_u8(veorq_u8(vshrq_n_u8(a, shift), b), vdupq_n_u8(mask)); \
    b = veorq_u8(b, t); \
    a = veorq_u8(a, vshlq_n_u8(t, shift)); \
}

// of planes of four rows, in x two and in y two: the rows' bytes k beside each other, k from 0 to 3 in x, from 4 to 7 in y
ALWAYS_INLINE void neon_beside(uint8x16_t * x, uint8x16_t * y) {
    static const uint8_t pairs[16] = { 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15 };
    const uint16x8_t ab = vreinterpretq_u16_u8(vqtbl1q_u8(*x, vld1q_u8(pairs)));
    const uint16x8_t cd = vreinterpretq_u16_u8(vqtbl1q_u8(*y, vld1q_u8(pairs)));
    *x = vreinterpretq_u8_u16(vzip1q_u16(ab, cd));
    *y = vreinterpretq_u8_u16(vzip2q_u16(ab, cd));
}

// coordinates 8*k + m of the four rows of group g
ALWAYS_INLINE void neon_store(bool values, int8_t * dst, int g, int m, int8x16_t x, int8x16_t y) {
    if (values) {
        vst1q_s8(dst + 4*N*g + 32*m,      x);
        vst1q_s8(dst + 4*N*g + 32*m + 16, y);
    } else {
        const int32x4_t a = vreinterpretq_s32_s8(x);
        const int32x4_t b = vreinterpretq_s32_s8(y);
        vst1q_s8(dst + 4*N*(2*m)     + 16*g, vreinterpretq_s8_s32(vuzp1q_s32(a, b)));
        vst1q_s8(dst + 4*N*(2*m + 1) + 16*g, vreinterpretq_s8_s32(vuzp2q_s32(a, b)));
    }
}

ALWAYS_INLINE void neon_unpack_type(enum tq_kind kind, int bits, const int8_t * table, bool values, const uint8_t * first, size_t stride, int n_rows,
        int8_t (* dst)[TQ_TILE_SIZE]) {
    const int8x16x2_t levels = { { vld1q_s8(table), vld1q_s8(table + 16) } };
    for (int g = 0; g < N/4; ++g) {
        uint64_t planes[8][4]; // of four rows
        int n = 0;
        for (int r = 0; r < 4; ++r) {
            const uint8_t * block = row_at(first, stride, n_rows, 4*g + r);
            prefetch(block, N*stride, bits); // the next tile is likely to be wanted
            uint64_t w[8];
            n = index_planes(kind, bits, block, w);
            for (int p = 0; p < n; ++p) {
                planes[p][r] = w[p];
            }
            planes[7][r] = w[bits - 1];
        }
        uint8x16_t e[2][5]; // of two rows
        uint8x16_t signs[2];
        for (int h = 0; h < 2; ++h) {
            for (int p = 0; p < 5; ++p) {
                e[h][p] = p < n ? vreinterpretq_u8_u64(vld1q_u64(planes[p] + 2*h)) : vdupq_n_u8(0);
            }
            signs[h] = vreinterpretq_u8_u64(vld1q_u64(planes[7] + 2*h));
        }
        if (values) {
            for (int p = 0; p < n; ++p) {
                neon_beside(&e[0][p], &e[1][p]);
            }
            neon_beside(&signs[0], &signs[1]);
        }
        // planes become indices: of coordinates 8*k + m and 8*k + 4 + m in the halves of a byte
        for (int h = 0; h < 2; ++h) {
            NEON_EXCHANGE(e[h][0], e[h][1], 1, 0x55)
            NEON_EXCHANGE(e[h][2], e[h][3], 1, 0x55)
            NEON_EXCHANGE(e[h][0], e[h][2], 2, 0x33)
            NEON_EXCHANGE(e[h][1], e[h][3], 2, 0x33)
        }
        for (int m = 0; m < 8; ++m) {
            int8x16_t x[2];
            for (int h = 0; h < 2; ++h) {
                const uint8x16_t index = m < 4 ? vandq_u8(e[h][m], vdupq_n_u8(15)) : vshrq_n_u8(e[h][m - 4], 4);
                if (n == 5) {
                    const uint8x16_t fifth = vandq_u8(vshlq_u8(e[h][4], vdupq_n_s8((int8_t) (4 - m))), vdupq_n_u8(16));
                    x[h] = vqtbl2q_s8(levels, vorrq_u8(index, fifth));
                } else {
                    x[h] = vqtbl1q_s8(levels.val[0], index);
                }
            }
            neon_store(values, dst[0], g, m, x[0], x[1]);
            if (kind == TQ_KIND_QJL) {
                for (int h = 0; h < 2; ++h) { // 0 or 2, less 1
                    const uint8x16_t set = vandq_u8(vshlq_u8(signs[h], vdupq_n_s8((int8_t) (1 - m))), vdupq_n_u8(2));
                    x[h] = vsubq_s8(vreinterpretq_s8_u8(set), vdupq_n_s8(1));
                }
                neon_store(values, dst[1], g, m, x[0], x[1]);
            }
        }
    }
}

static void neon_unpack_keys(const struct tq_tile_type * tile, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    FOR_TYPE(tile->type, neon_unpack_type, tile->table, false, first, stride, n_rows, dst)
}

static void neon_unpack_values(const struct tq_tile_type * tile, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    FOR_TYPE(tile->type, neon_unpack_type, tile->table, true, first, stride, n_rows, dst)
}

static void neon_unpack(const struct tq_tile_type * tile, bool values, const uint8_t * first, size_t stride, int n_rows, int8_t (* dst)[TQ_TILE_SIZE]) {
    (values ? neon_unpack_values : neon_unpack_keys)(tile, first, stride, n_rows, dst);
}

static void neon_scales(const uint16_t * half, float * d) {
    for (int r = 0; r < N; r += 4) {
        vst1q_f32(d + r, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + r))));
    }
}

static void neon_split(bool values, const float * x, const float * weights, float scale, struct tq_tile_numbers * dst) {
    int8_t hi[N];
    int8_t lo[N];
    for (int i = 0; i < N; i += 8) {
        int16x4_t n[2];
        for (int h = 0; h < 2; ++h) {
            float32x4_t v = vmulq_n_f32(vld1q_f32(x + i + 4*h), scale);
            if (weights) {
                v = vmulq_f32(v, vld1q_f32(weights + i + 4*h));
            }
            n[h] = vmovn_s32(vcvtnq_s32_f32(v)); // 128*hi + lo
        }
        const int16x8_t words = vcombine_s16(n[0], n[1]);
        vst1_s8(hi + i, vshrn_n_s16(words, 7));
        vst1_s8(lo + i, vmovn_s16(vandq_s16(words, vdupq_n_s16(127))));
    }
    for (int i = 0; i < N && !values; ++i) {
        dst->digits[i]     = (uint8_t) hi[neon_coordinate(i)];
        dst->digits[i + N] = (uint8_t) lo[neon_coordinate(i)];
    }
    if (values) {
        memcpy(dst->digits,     hi, N);
        memcpy(dst->digits + N, lo, N);
    }
    dst->sum = 0;
}

// sum + the dot products of four bytes each; a pair of them fits 16 bits
ALWAYS_INLINE int32x4_t neon_dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
}

// 16 lanes of n queries at a time, n up to 2; what makes the dot products is the one difference
#define NEON_MULTIPLY(name, target, dot) \
ALWAYS_INLINE target void name##_n(int n, const int8_t * bytes, const struct tq_tile_numbers * numbers, int32_t * sums, size_t step) { \
    for (int lane = 0; lane < N; lane += 16) { \
        int32x4_t hi[2][4]; \
        int32x4_t lo[2][4]; \
        for (int r = 0; r < n; ++r) { \
            for (int l = 0; l < 4; ++l) { \
                hi[r][l] = vdupq_n_s32(0); \
                lo[r][l] = vdupq_n_s32(0); \
            } \
        } \
        for (int g = 0; g < N/4; ++g) { \
            const int8_t * b = bytes + 4*N*g + 4*lane; \
            for (int r = 0; r < n; ++r) { \
                int32_t h, w; \
                memcpy(&h, numbers[r].digits + 4*g,     sizeof(h)); \
                memcpy(&w, numbers[r].digits + 4*g + N, sizeof(w)); \
                for (int l = 0; l < 4; ++l) { \
                    hi[r][l] = dot(hi[r][l], vld1q_s8(b + 16*l), vreinterpretq_s8_s32(vdupq_n_s32(h))); \
                    lo[r][l] = dot(lo[r][l], vld1q_s8(b + 16*l), vreinterpretq_s8_s32(vdupq_n_s32(w))); \
                } \
            } \
        } \
        for (int r = 0; r < n; ++r) { \
            for (int l = 0; l < 4; ++l) { \
                int32_t * to = sums + r*step + lane + 4*l; \
                vst1q_s32(to, vaddq_s32(vld1q_s32(to), vaddq_s32(vshlq_n_s32(hi[r][l], 7), lo[r][l]))); \
            } \
        } \
    } \
} \
target static void name(const int8_t * bytes, const struct tq_tile_numbers * numbers, int n, int32_t * sums, size_t step) { \
    for (; n >= 2; n -= 2, numbers += 2, sums += 2*step) { \
        name##_n(2, bytes, numbers, sums, step); \
    } \
    if (n == 1) { \
        name##_n(1, bytes, numbers, sums, step); \
    } \
}

NEON_MULTIPLY(neon_multiply, , neon_dot)

// half of a span's distances, from i on, of n queries
ALWAYS_INLINE void neon_turn(int n, int i, const float * angles, int32_t n_pairs, const float * const * w, float * sums, size_t step) {
    float32x4_t e[2][4];
    float32x4_t o[2][4];
    for (int r = 0; r < n; ++r) {
        for (int l = 0; l < 4; ++l) {
            e[r][l] = vdupq_n_f32(w[r][2*n_pairs]);
            o[r][l] = vdupq_n_f32(0.0f);
        }
    }
    angles += i;
    const float * sines = angles + n_pairs*TQ_CENTER_HALF;
    for (int32_t k = 0; k < n_pairs; ++k, angles += TQ_CENTER_HALF, sines += TQ_CENTER_HALF) {
        for (int r = 0; r < n; ++r) {
            for (int l = 0; l < 4; ++l) {
                e[r][l] = vfmaq_n_f32(e[r][l], vld1q_f32(angles + 4*l), w[r][k]);
                o[r][l] = vfmaq_n_f32(o[r][l], vld1q_f32(sines  + 4*l), w[r][k + n_pairs]);
            }
        }
    }
    for (int r = 0; r < n; ++r) {
        float * middle = sums + r*step + TQ_CENTER_HALF;
        for (int l = 0; l < 4; ++l) {
            const float32x4_t less = vrev64q_f32(vsubq_f32(e[r][l], o[r][l]));
            float * up   = middle + i + 4*l;
            float * down = middle - i - 4*l - 4;
            vst1q_f32(up,   vaddq_f32(vld1q_f32(up),   vaddq_f32(e[r][l], o[r][l])));
            vst1q_f32(down, vaddq_f32(vld1q_f32(down), vextq_f32(less, less, 2)));
        }
    }
}

static void neon_turns(const float * angles, int32_t n, const float * const * w, int n_queries, float * sums, size_t step) {
    for (; n_queries > 0; n_queries -= 2, w += 2, sums += 2*step) {
        for (int i = 0; i < TQ_CENTER_HALF; i += 16) {
            if (n_queries > 1) {
                neon_turn(2, i, angles, n, w, sums, step);
            } else {
                neon_turn(1, i, angles, n, w, sums, step);
            }
        }
    }
}

static bool neon_available(void) {
    return true;
}

static const struct tq_tile_functions tile_neon = {
    { "neon", neon_available }, neon_unpack, neon_scales, neon_split, neon_multiply, neon_coordinate, neon_turns,
};

#ifdef TQ_TILE_DOTPROD

NEON_MULTIPLY(dotprod_multiply, TARGET_DOTPROD, vdotq_s32)

static bool dotprod_available(void) {
    return CPU_HAS_DOTPROD;
}

static const struct tq_tile_functions tile_dotprod = {
    { "dotprod", dotprod_available }, neon_unpack, neon_scales, neon_split, dotprod_multiply, neon_coordinate, neon_turns,
};

#endif
#endif
