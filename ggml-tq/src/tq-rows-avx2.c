// Rows with AVX2: the operations of tq-rows-lanes.h.
// Compile without floating-point contraction, with -O3.

#include "tq-internal.h"

#ifdef TQ_X86

#include <immintrin.h>
#include <string.h>

TQ_BEGIN_TARGET("avx2")

#define LANES 8

typedef __m256  vec;
typedef __m256i ints;
typedef __m256  mask; // a lane's bits are all 1 or all 0

ALWAYS_INLINE vec  load  (const float * p)        { return _mm256_loadu_ps(p); }
ALWAYS_INLINE void store (float * p, vec a)       { _mm256_storeu_ps(p, a); }
ALWAYS_INLINE vec  set   (float a)                { return _mm256_set1_ps(a); }
ALWAYS_INLINE vec  add   (vec a, vec b)           { return _mm256_add_ps(a, b); }
ALWAYS_INLINE vec  sub   (vec a, vec b)           { return _mm256_sub_ps(a, b); }
ALWAYS_INLINE vec  mul   (vec a, vec b)           { return _mm256_mul_ps(a, b); }
ALWAYS_INLINE vec  square(vec a)                  { return mul(a, a); }
ALWAYS_INLINE vec  divide(vec a, vec b)           { return _mm256_div_ps(a, b); }
ALWAYS_INLINE vec  root  (vec a)                  { return _mm256_sqrt_ps(a); }
ALWAYS_INLINE vec  choose(mask m, vec a, vec b)   { return _mm256_blendv_ps(b, a, m); } // m ? a : b
ALWAYS_INLINE mask less  (vec a, vec b)           { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }

// of numbers that are not negative, as integers: of these a processor may compare more at a time
ALWAYS_INLINE vec  lesser(vec a, vec b) {
    return _mm256_castsi256_ps(_mm256_min_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
ALWAYS_INLINE mask is_lesser(vec a, vec b) {
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_castps_si256(b), _mm256_castps_si256(a)));
}

// of two distances with a sign the one of lesser magnitude, without its sign
ALWAYS_INLINE vec nearer(vec a, vec b) {
    const vec sign = _mm256_set1_ps(-0.0f);
    return lesser(_mm256_andnot_ps(sign, a), _mm256_andnot_ps(sign, b));
}

ALWAYS_INLINE ints load_ints (const uint32_t * p)   { return _mm256_loadu_si256((const __m256i *) p); }
ALWAYS_INLINE ints set_ints  (uint32_t a)           { return _mm256_set1_epi32((int) a); }
ALWAYS_INLINE ints bits_of   (vec a)                { return _mm256_castps_si256(a); }
ALWAYS_INLINE ints and_ints  (ints a, ints b)       { return _mm256_and_si256(a, b); }
ALWAYS_INLINE ints or_ints   (ints a, ints b)       { return _mm256_or_si256(a, b); }
ALWAYS_INLINE ints xor_ints  (ints a, ints b)       { return _mm256_xor_si256(a, b); }
ALWAYS_INLINE ints max_ints  (ints a, ints b)       { return _mm256_max_epi32(a, b); }
ALWAYS_INLINE ints shift_right(ints a, int n)       { return _mm256_srli_epi32(a, n); }
ALWAYS_INLINE ints shift_left (ints a, int n)       { return _mm256_slli_epi32(a, n); }
ALWAYS_INLINE ints or_where   (ints a, mask m, uint32_t bit) { return or_ints(a, and_ints(bits_of(m), set_ints(bit))); }
ALWAYS_INLINE ints choose_ints(mask m, ints a, ints b) { return _mm256_blendv_epi8(b, a, bits_of(m)); }
ALWAYS_INLINE mask equal     (ints a, ints b)       { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }

// lanes' bits in memory
ALWAYS_INLINE mask load_bits(const uint8_t * p) {
    const ints bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return equal(and_ints(set_ints(*p), bit), bit);
}
ALWAYS_INLINE void store_bits(uint8_t * p, mask m) { *p = (uint8_t) _mm256_movemask_ps(m); }

// For each lane and state of a trellis a bit: whether the state s was reached through register s + 32, not s. A byte a state.
typedef struct { uint8_t * bytes; } ways;

ALWAYS_INLINE void begin(ways * w, uint8_t * dst) { w->bytes = dst; }

// of state s: if b < a (not negative)
ALWAYS_INLINE void note(ways * w, int s, vec a, vec b) { store_bits(w->bytes + s, is_lesser(b, a)); }

ALWAYS_INLINE void keep(const ways * w, uint8_t * dst) { (void) w; (void) dst; }

// states -> registers
ALWAYS_INLINE ints came_from(const uint8_t * src, ints state) {
    const ints bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128); // of each lane in a byte
    const ints lo  = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) src)),        state);
    const ints hi  = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (src + 16))), state);
    const vec  way = choose(_mm256_castsi256_ps(shift_left(state, 27)), _mm256_castsi256_ps(hi), _mm256_castsi256_ps(lo)); // by its sign
    return or_where(state, equal(and_ints(bits_of(way), bit), bit), 32);
}

// table[index] of 2^bits numbers
ALWAYS_INLINE vec look_up(const float * table, int bits, ints index) {
    vec x = _mm256_permutevar8x32_ps(load(table), index);
    if (bits > 3) {
        const mask upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); // of a mask, blends read the sign
        x = choose(upper, _mm256_permutevar8x32_ps(load(table + 8), index), x);
        if (bits > 4) {
            const vec y = choose(upper, _mm256_permutevar8x32_ps(load(table + 24), index), _mm256_permutevar8x32_ps(load(table + 16), index));
            x = choose(_mm256_castsi256_ps(_mm256_slli_epi32(index, 27)), y, x);
        }
    }
    return x;
}

// table[index] of 32 integers
ALWAYS_INLINE ints look_up_ints(const uint32_t * table, ints index) { return bits_of(look_up((const float *) table, 5, index)); }

// bit `lane` of the masks of 32 coordinates
ALWAYS_INLINE uint32_t bits_of_lane(const uint8_t * p, int lane) {
    const ints bit = _mm256_set1_epi8((char) (1 << lane));
    return (uint32_t) _mm256_movemask_epi8(_mm256_cmpeq_epi8(and_ints(load_ints((const uint32_t *) p), bit), bit));
}

// stages of the transform within a vector: a sum where the bit of the lane is 0, a difference where it is 1
ALWAYS_INLINE vec fwht_lanes(vec x) {
    const float o = 0.0f, m = -0.0f;
    x = add(_mm256_permute_ps(x, 0xb1),         _mm256_xor_ps(x, _mm256_setr_ps(o, m, o, m, o, m, o, m)));
    x = add(_mm256_permute_ps(x, 0x4e),         _mm256_xor_ps(x, _mm256_setr_ps(o, o, m, m, o, o, m, m)));
    x = add(_mm256_permute2f128_ps(x, x, 0x01), _mm256_xor_ps(x, _mm256_setr_ps(o, o, o, o, m, m, m, m)));
    return x;
}

// halves are added until one number is left
ALWAYS_INLINE float sum_lanes(vec x) {
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

ALWAYS_INLINE float max_lanes(ints x) {
    __m128i a = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    a = _mm_max_epi32(a, _mm_unpackhi_epi64(a, a));
    a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 1));
    return _mm_cvtss_f32(_mm_castsi128_ps(a));
}

#include "tq-rows-lanes.h"
#include "tq-rows.h"

static bool available(void) {
    return TQ_CPU_HAS("avx2");
}

const struct tq_rows_functions tq_rows_avx2 = TQ_ROWS_FUNCTIONS("avx2");

TQ_END_TARGET

#endif
