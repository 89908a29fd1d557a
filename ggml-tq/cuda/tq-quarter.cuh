#pragma once

// Four lanes decode a block: lane j of them has halfword j of each bit plane, coordinates 16*j ... 16*j + 15, of two blocks
// that tq_unpack takes at a time. Most of the transform stays within a lane. Sums are those of docs/format.md, to the bit:
// compile as tq-block.cuh.

#include "tq-fragment.cuh"

// halfword lane%4 of every plane of two blocks, which are 2-byte aligned
template <tq_kind kind, int bits>
static __device__ __forceinline__ tq_words tq_load_quarters(const uint16_t * x, const uint16_t * y, int lane) {
    const int j = lane % 4;
    uint32_t px[bits], py[bits];
#pragma unroll
    for (int p = 0; p < bits; ++p) {
        px[p] = x[1 + 4*p + j];
        py[p] = y[1 + 4*p + j];
    }
    uint32_t cx = 0;
    uint32_t cy = 0;
    if constexpr (kind == TQ_KIND_TCQ) {
        const int before = 1 + 4*(bits - 1) + (j + 3)%4;
        cx = tq_both_low(x[before], px[bits - 1]);
        cy = tq_both_low(y[before], py[bits - 1]);
    }
    return tq_unpack<kind, bits>(px, py, cx, cy);
}

// levels of the lane's coordinates of block h
template <tq_kind kind>
static __device__ __forceinline__ void tq_look_up_quarter(const float * table, const tq_words & w, int h, float * v) {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        v[c] = table[w.codes[c%4] >> (16*h + c/4*4) & 15];
        if (kind == TQ_KIND_TCQ) {
            v[c] = __uint_as_float(__float_as_uint(v[c]) ^ (w.signs << (31 - 16*h - c) & 0x80000000));
        }
    }
}

// each coordinate with that of the lane across
static __device__ __forceinline__ void tq_butterfly(float * v, int across, int lane) {
    const float sign = lane & across ? -1.0f : 1.0f;
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        v[c] = __fmaf_rn(v[c], sign, __shfl_xor_sync(TQ_WARP, v[c], across)); // a sum or a difference, rounded once
    }
}

// strides 1 to 16 of the transform
static __device__ __forceinline__ void tq_fwht_quarter(float * v, int lane) {
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
#pragma unroll
        for (int c = 0; c < 16; ++c) {
            if ((c & h) == 0) {
                const float a = v[c];
                const float b = v[c + h];
                v[c]     = a + b;
                v[c + h] = a - b;
            }
        }
    }
    tq_butterfly(v, 1, lane);
}

// Stride 32, after which a lane has other coordinates, two runs of eight: those from tq_first_of_quarter on, and 32 further. So
// half as many are exchanged, and lanes that are neighbors write what is adjacent.
static __device__ __forceinline__ int tq_first_of_quarter(int lane) {
    return 16*(lane & 1) + 4*(lane & 2);
}

static __device__ __forceinline__ void tq_end_fwht_quarter(float * v, int lane) {
    const bool upper = lane & 2;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const float kept = upper ? v[c + 8] : v[c];
        const float got  = __shfl_xor_sync(TQ_WARP, upper ? v[c] : v[c + 8], 2);
        v[c]     = upper ? got + kept : kept + got;
        v[c + 8] = upper ? got - kept : kept - got;
    }
}

// 1/8 or -1/8 for each of the lane's coordinates
static __device__ __forceinline__ void tq_factors_of_quarter(uint64_t signs, int lane, float * f) {
    signs >>= tq_first_of_quarter(lane);
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        f[c] = signs >> (c < 8 ? c : c + 24) & 1 ? -0.125f : 0.125f;
    }
}

// adds kappa*unsketch(+-1)
static __device__ __forceinline__ void tq_add_sketch_quarter(const tq_codec & codec, const tq_words & w, int h, int lane, float * v) {
    float z[16];
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        z[c] = w.signs >> (16*h + c) & 1 ? -1.0f : 1.0f;
    }
    tq_fwht_quarter(z, lane);
    tq_butterfly(z, 2, lane);
    const uint32_t signs = (uint32_t) (codec.sketch >> 16*(lane % 4));
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        v[c] += codec.kappa*(z[c]*(signs >> c & 1 ? -0.125f : 0.125f));
    }
}

// Block h: what tq_decode gives, coordinates as of tq_first_of_quarter. factors are those of codec.rotation.
template <tq_kind kind>
static __device__ __forceinline__ void tq_decode_quarter(const tq_codec & codec, const float * table, const float * factors,
        const tq_words & w, int h, uint16_t scale, int lane, float * v) {
    tq_look_up_quarter<kind>(table, w, h, v);
    if (kind == TQ_KIND_QJL) {
        tq_add_sketch_quarter(codec, w, h, lane, v);
    }
    const float d = tq_half_to_float(scale);
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        v[c] *= d;
    }
    tq_fwht_quarter(v, lane);
    tq_end_fwht_quarter(v, lane);
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        v[c] *= factors[c];
    }
}
