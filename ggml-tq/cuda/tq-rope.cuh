#pragma once

// RoPE of f32 heads, to the bit as upstream's rope.cu computes it (with -use_fast_math, and fused multiply-adds where its
// compiler puts them; denormals aside), so that a layer can have it in the kernel that stores keys.

#include <cstdint>

struct tq_rope {
    const int32_t * pos;     // of tokens; nullptr: no RoPE
    const float   * factors; // of pairs, or nullptr
    int64_t head_nb;         // bytes from head to head, before RoPE
    int     head_dim;
    int     n_dims, n_offs;  // what turns: coordinates n_offs ... n_offs + n_dims - 1 of a head
    bool    neox;            // pairs are n_dims/2 apart, not adjacent
    float   theta_scale, freq_scale, attn_factor;
    float   ext_factor, low, high; // YaRN, if ext_factor is not 0
};

// cosine and sine of a pair's angle at position p
static __device__ __forceinline__ float2 tq_rope_turn(const tq_rope & r, int pair, int p) {
    float theta = p*__powf(r.theta_scale, pair);
    float scale = r.attn_factor;
    if (r.factors) {
        theta = __fdividef(theta, r.factors[pair]);
    }
    float turned = r.freq_scale*theta;
    if (r.ext_factor != 0.0f) {
        const float ramp = 1.0f - __saturatef(__fdividef(pair - r.low, fmaxf(0.001f, r.high - r.low)));
        const float mix  = ramp*r.ext_factor;
        turned = __fmaf_rn(theta, mix, turned*(1.0f - mix));
        scale *= __fmaf_rn(__logf(__fdividef(1.0f, r.freq_scale)), 0.1f, 1.0f);
    }
    return make_float2(__cosf(turned)*scale, __sinf(turned)*scale);
}

static __device__ __forceinline__ float tq_rope_first (float2 turn, float x0, float x1) { return __fmaf_rn(turn.x, x0, -(turn.y*x1)); }
static __device__ __forceinline__ float tq_rope_second(float2 turn, float x0, float x1) { return __fmaf_rn(turn.y, x0,   turn.x*x1 ); }

// what becomes of one coordinate
struct tq_rope_place {
    int    other;  // from it to the other one of its pair; 0: it does not turn
    bool   second; // of its pair
    float2 turn;
};

// coordinate i of a head at position p
static __device__ __forceinline__ tq_rope_place tq_rope_find(const tq_rope & r, int i, int p) {
    const int w    = i - r.n_offs;
    const int half = r.n_dims/2;
    if (w < 0 || w >= r.n_dims) {
        return { 0, false, make_float2(1.0f, 0.0f) };
    }
    const bool second = r.neox ? w >= half : w & 1;
    const int  pair   = r.neox ? second ? w - half : w : w/2;
    const int  step   = r.neox ? half : 1;
    return { second ? -step : step, second, tq_rope_turn(r, pair, p) };
}

static __device__ __forceinline__ float tq_rope_apply(const tq_rope_place & place, const float * x) {
    if (place.other == 0) {
        return *x;
    }
    return place.second ? tq_rope_second(place.turn, x[place.other], *x) : tq_rope_first(place.turn, *x, x[place.other]);
}
