// Rows with AVX-512 (and VBMI2): the operations of tq-rows-lanes.h.
// Compile without floating-point contraction, with -O3.

#include "tq-internal.h"

#ifdef TQ_X86

#include <immintrin.h>
#include <string.h>

TQ_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2")

#define LANES 16

typedef __m512    vec;
typedef __m512i   ints;
typedef __mmask16 mask;

ALWAYS_INLINE vec  load  (const float * p)        { return _mm512_loadu_ps(p); }
ALWAYS_INLINE void store (float * p, vec a)       { _mm512_storeu_ps(p, a); }
ALWAYS_INLINE vec  set   (float a)                { return _mm512_set1_ps(a); }
ALWAYS_INLINE vec  add   (vec a, vec b)           { return _mm512_add_ps(a, b); }
ALWAYS_INLINE vec  sub   (vec a, vec b)           { return _mm512_sub_ps(a, b); }
ALWAYS_INLINE vec  mul   (vec a, vec b)           { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE vec  square(vec a)                  { return mul(a, a); }
ALWAYS_INLINE vec  divide(vec a, vec b)           { return _mm512_div_ps(a, b); }
ALWAYS_INLINE vec  root  (vec a)                  { return _mm512_sqrt_ps(a); }
ALWAYS_INLINE vec  choose(mask m, vec a, vec b)   { return _mm512_mask_blend_ps(m, b, a); } // m ? a : b
ALWAYS_INLINE mask less  (vec a, vec b)           { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }

// of numbers that are not negative, as integers: of these a processor may compare more at a time
ALWAYS_INLINE vec  lesser(vec a, vec b) {
    return _mm512_castsi512_ps(_mm512_min_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
ALWAYS_INLINE mask is_lesser(vec a, vec b) { return _mm512_cmplt_epi32_mask(_mm512_castps_si512(a), _mm512_castps_si512(b)); }

// of two distances with a sign the one of lesser magnitude
ALWAYS_INLINE vec  nearer(vec a, vec b)           { return _mm512_range_ps(a, b, 2); }

ALWAYS_INLINE ints load_ints (const uint32_t * p)   { return _mm512_loadu_si512(p); }
ALWAYS_INLINE void store_ints(uint32_t * p, ints a) { _mm512_storeu_si512(p, a); }
ALWAYS_INLINE ints set_ints  (uint32_t a)           { return _mm512_set1_epi32((int) a); }
ALWAYS_INLINE ints bits_of   (vec a)                { return _mm512_castps_si512(a); }
ALWAYS_INLINE ints and_ints  (ints a, ints b)       { return _mm512_and_si512(a, b); }
ALWAYS_INLINE ints or_ints   (ints a, ints b)       { return _mm512_or_si512(a, b); }
ALWAYS_INLINE ints xor_ints  (ints a, ints b)       { return _mm512_xor_si512(a, b); }
ALWAYS_INLINE ints max_ints  (ints a, ints b)       { return _mm512_max_epi32(a, b); }
ALWAYS_INLINE ints shift_right(ints a, int n)       { return _mm512_srli_epi32(a, n); }
ALWAYS_INLINE ints shift_left (ints a, int n)       { return _mm512_slli_epi32(a, n); }
ALWAYS_INLINE ints or_where   (ints a, mask m, uint32_t bit) { return _mm512_mask_or_epi32(a, m, a, set_ints(bit)); }
ALWAYS_INLINE ints choose_ints(mask m, ints a, ints b) { return _mm512_mask_blend_epi32(m, b, a); }
ALWAYS_INLINE mask equal     (ints a, ints b)       { return _mm512_cmpeq_epi32_mask(a, b); }

// lanes' bits in memory
ALWAYS_INLINE mask load_bits (const uint8_t * p)    { mask m; memcpy(&m, p, sizeof(m)); return m; }
ALWAYS_INLINE void store_bits(uint8_t * p, mask m)  { memcpy(p, &m, sizeof(m)); }

// For each lane and state of a trellis a bit: whether the state s was reached through register s + 32, not s. A word a lane, the
// lowest state's bit highest.
typedef struct { ints words[2]; } ways; // of each half of the states

ALWAYS_INLINE void begin(ways * w, uint8_t * dst) {
    (void) dst;
    w->words[0] = w->words[1] = set_ints(0);
}

// of state s, in ascending order within its half: if b < a (not negative)
ALWAYS_INLINE void note(ways * w, int s, vec a, vec b) {
    const ints sign = _mm512_sub_epi32(bits_of(b), bits_of(a));
    w->words[s/16] = _mm512_shldi_epi32(w->words[s/16], sign, 1);
}

ALWAYS_INLINE void keep(const ways * w, uint8_t * dst) {
    store_ints((uint32_t *) dst, or_ints(shift_left(w->words[0], 16), w->words[1]));
}

// states -> registers
ALWAYS_INLINE ints came_from(const uint8_t * src, ints state) {
    const ints way = _mm512_sllv_epi32(load_ints((const uint32_t *) src), state);
    return or_ints(state, and_ints(shift_right(way, 26), set_ints(32)));
}

// table[index] of 2^bits numbers
ALWAYS_INLINE vec look_up(const float * table, int bits, ints index) {
    return bits < 5 ? _mm512_permutexvar_ps(index, load(table)) : _mm512_permutex2var_ps(load(table), index, load(table + 16));
}


// table[index] of 32 integers
ALWAYS_INLINE ints look_up_ints(const uint32_t * table, ints index) {
    return _mm512_permutex2var_epi32(load_ints(table), index, load_ints(table + 16));
}

// bit `lane` of the masks of 32 coordinates
ALWAYS_INLINE uint32_t bits_of_lane(const uint8_t * p, int lane) {
    return _mm512_test_epi16_mask(_mm512_loadu_si512(p), _mm512_set1_epi16((short) (1 << lane)));
}

// stages of the transform within a vector: a sum where the bit of the lane is 0, a difference where it is 1
#define STAGE(x, swapped, upper) _mm512_mask_sub_ps(_mm512_add_ps(swapped, x), upper, swapped, x)
ALWAYS_INLINE vec fwht_lanes(vec x) {
    vec y;
    y = _mm512_permute_ps(x, 0xb1);          x = STAGE(x, y, 0xaaaa);
    y = _mm512_permute_ps(x, 0x4e);          x = STAGE(x, y, 0xcccc);
    y = _mm512_shuffle_f32x4(x, x, 0xb1);    x = STAGE(x, y, 0xf0f0);
    y = _mm512_shuffle_f32x4(x, x, 0x4e);    x = STAGE(x, y, 0xff00);
    return x;
}

// halves are added until one number is left
ALWAYS_INLINE float sum_lanes(vec x) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

ALWAYS_INLINE float max_lanes(ints x) {
    const uint32_t most = (uint32_t) _mm512_reduce_max_epi32(x);
    float f;
    memcpy(&f, &most, sizeof(f));
    return f;
}

#include "tq-rows-lanes.h"
#include "tq-rows.h"

static bool available(void) {
    return TQ_CPU_HAS("avx512f") && TQ_CPU_HAS("avx512bw") && TQ_CPU_HAS("avx512dq") && TQ_CPU_HAS("avx512vl") && TQ_CPU_HAS("avx512vbmi2");
}

const struct tq_rows_functions tq_rows_avx512 = TQ_ROWS_FUNCTIONS("avx512");

TQ_END_TARGET

#endif
