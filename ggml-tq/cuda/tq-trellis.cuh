#pragma once

// Section 9 for many blocks: a thread searches a path of a block by itself, all 32 states in its registers, so nothing is
// shuffled. That takes little more than a third of tq_path's instructions, but much longer, and fills a machine only if there are
// thousands.
//
// Lengths are in units of 2^-40, so squares of them and costs in units of 2^-80. Scaling by powers of two changes no other bit
// of a sum or a product. It makes any two costs that differ differ by 1 or more, so that a saturated difference is the outcome
// of a comparison, 0 or 1: levels are at least 2^-5 in size, so distances less than 2^-7 are multiples of 2^-28, and costs of
// 2^-56.

#include "tq-block.cuh"

#define TQ_UNIT 0x1p40f
#define TQ_FAR  0x1p126f // as +infinity: absorbs what is added to it

// A number is in one of 16 cells. The levels of a label that may be the nearest to one in a cell are two: cells are smaller than
// the distance of midpoints of levels.
#define TQ_N_CELLS   16
#define TQ_CELL_SIZE 0.36f

struct tq_two_labels { // l and l + 1: the two levels of each, ascending
    float l0, h0, l1, h1;
};

// Four warps, one for each scheduler, encode 25 blocks: thread t has multiple t % 5 of block t/5, the last three idle (they
// repeat). Their shared memory:
#define TQ_SEARCH_THREADS 128
#define TQ_SEARCH_BLOCKS  25

template <int bits> struct tq_searches {
    static constexpr int n_labels = 64 >> bits;
    tq_two_labels near[n_labels/2][TQ_N_CELLS];
    float    u      [64][TQ_SEARCH_BLOCKS];
    uint32_t from   [64][TQ_SEARCH_THREADS]; // bit 31 - r: whether state reversed(r) was reached through its second register
    uint64_t coded  [TQ_SEARCH_THREADS];
    float    quality[TQ_SEARCH_THREADS];
};

static constexpr __host__ __device__ int tq_reversed(int state) { // order of its five bits
    return (state & 1) << 4 | (state & 2) << 2 | (state & 4) | (state & 8) >> 2 | state >> 4;
}

static constexpr __host__ __device__ float tq_cell_scale() { return 1.0f/((TQ_N_CELLS - 1)*TQ_CELL_SIZE); }

static __device__ __forceinline__ int tq_cell(float v) {
    const float x = tq_saturate(__fmaf_rn(v, tq_cell_scale()/TQ_UNIT, 0.5f));
    return (int) (__float_as_uint(__fmaf_rn(x, TQ_N_CELLS - 1, 0x1p23f)) - 0x4b000000);
}

// entry i of near, of n_labels/2*TQ_N_CELLS
template <int bits>
static __device__ __forceinline__ void tq_fill_near(const float * table, tq_searches<bits> & s, int i) {
    constexpr int n_free = 1 << (bits - 1);
    const float middle = ((float) (i % TQ_N_CELLS) - 0.5f*(TQ_N_CELLS - 1))*TQ_CELL_SIZE;
    float pair[2][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float * level = table + (2*(i/TQ_N_CELLS) + k)*n_free;
        float least = INFINITY; // from a midpoint to the middle of the cell
        for (int w = 0; w < n_free - 1; ++w) {
            const float d = fabsf(0.5f*(level[w] + level[w + 1]) - middle);
            if (d < least) {
                least = d;
                pair[k][0] = level[w]    *TQ_UNIT;
                pair[k][1] = level[w + 1]*TQ_UNIT;
            }
        }
    }
    s.near[i/TQ_N_CELLS][i%TQ_N_CELLS] = { pair[0][0], pair[0][1], pair[1][0], pair[1][1] };
}

// one coordinate of a run, from the costs of the states before it to those after it; the result has from's bits
template <int bits, bool remember>
static __device__ __forceinline__ uint32_t tq_step(const tq_searches<bits> & s, float v, const float * cost, float * next) {
    constexpr int n_labels = tq_searches<bits>::n_labels;
    float dist[n_labels];
    const int cell = tq_cell(v);
#pragma unroll
    for (int l = 0; l < n_labels; l += 2) {
        const tq_two_labels near = s.near[l/2][bits == 2 ? 0 : cell];
        const float d0 = fminf(fabsf(v - near.l0), fabsf(v - near.h0));
        const float d1 = fminf(fabsf(v - near.l1), fabsf(v - near.h1));
        dist[l]     = d0*d0;
        dist[l + 1] = d1*d1;
    }
    float from[2] = { 0x1p23f, 0x1p23f }; // 16 bits each; the sums are exact
#pragma unroll
    for (int r = 0; r < 32; ++r) {
        const int   k = tq_reversed(r);
        const float a = cost[k >> 1]        + dist[tq_label<bits>(k)];
        const float b = cost[(k >> 1) + 16] + dist[tq_label<bits>(k + 32)];
        next[k] = fminf(a, b);
        if (remember) {
            from[r/16] = __fmaf_rn(tq_saturate(a - b), (float) (0x8000 >> r%16), from[r/16]);
        }
    }
    return __byte_perm(__float_as_uint(from[1]), __float_as_uint(from[0]), 0x5410);
}

// From the state after coordinate n - 1 to that before coordinate 0, both reversed: so the bit that left the register enters
// the word from the right, and rotation by the word finds the next one. Bit i of the result is the bit of coordinate i - 5.
template <int n>
static __device__ __forceinline__ uint64_t tq_trace_back(const uint32_t (* from)[TQ_SEARCH_THREADS], uint32_t state, int thread) {
    uint32_t w = state;
    uint32_t high = 0;
#pragma unroll 16
    for (int i = n - 1; i >= 0; --i) {
        const uint32_t f = from[i][thread];
        w = __funnelshift_l(__funnelshift_l(f, f, w), w, 1);
        high = i == 32 ? w : high;
    }
    return (uint64_t) high << 32 | w;
}

// the bits of coordinates' labels
static __device__ __forceinline__ uint64_t tq_label_plane(uint64_t coded, int tap) {
    uint64_t plane = 0;
#pragma unroll
    for (int k = 0; k < 6; ++k) {
        plane ^= tap >> k & 1 ? (k ? coded << k | coded >> (64 - k) : coded) : 0;
    }
    return plane;
}

// that of section 9
template <int bits>
static __device__ __forceinline__ float tq_quality(const tq_searches<bits> & s, uint64_t coded, float multiple, int block) {
    constexpr int taps[3][4] = { TQ_TRELLIS_TAPS_2B, TQ_TRELLIS_TAPS_3B, TQ_TRELLIS_TAPS_4B };
    constexpr int n_bits = 6 - bits; // of a label
    uint64_t plane[n_bits];
#pragma unroll
    for (int k = 0; k < n_bits; ++k) {
        plane[k] = tq_label_plane(coded, taps[bits - 2][k]);
    }
    // Products are added in the tree of the format: coordinates i, i + 4, i + 8, ... first, then i = 0, 2 and 1, 3.
    float2 sum[3] = {};
#pragma unroll 1
    for (int n = 0; n < 4; ++n) {
        const int i = (n >> 1) | (n & 1) << 1;
        uint32_t labels[n_bits][2];
#pragma unroll
        for (int k = 0; k < n_bits; ++k) {
            labels[k][0] = (uint32_t) plane[k] >> i;
            labels[k][1] = (uint32_t) (plane[k] >> 32) >> i;
        }
        float2 t[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const float u = s.u[i + 4*j][block];
            const float v = u*multiple;
            uint32_t offset = bits == 2 ? 0 : tq_cell(v)*sizeof(tq_two_labels);
#pragma unroll
            for (int k = 0; k < n_bits; ++k) {
                constexpr int entry = sizeof(float2);
                const uint32_t size = k ? (TQ_N_CELLS*entry) << k : entry; // of what bit k chooses
                const uint32_t bit  = labels[k][j/8] >> 4*(j%8) & 1;
                offset += bit*size;
            }
            const float2 near = *(const float2 *) ((const char *) s.near + offset);
            const float  l = v - near.x;
            const float  h = v - near.y;
            const float  q = h*h < l*l ? near.y : near.x;
            t[j] = make_float2(u*q, q*q);
        }
#pragma unroll
        for (int h = 8; h > 0; h /= 2) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (j < h) {
                    t[j] = make_float2(t[j].x + t[j + h].x, t[j].y + t[j + h].y);
                }
            }
        }
        sum[2] = make_float2(sum[1].x + t[0].x, sum[1].y + t[0].y); // of n - 1 and n
        sum[1] = t[0];
        sum[0] = n == 1 ? sum[2] : sum[0];
    }
    return (sum[0].x + sum[2].x)/sqrtf(sum[0].y + sum[2].y);
}

// A thread's path: its coded bits and quality.
template <int bits>
static __device__ __forceinline__ void tq_search_alone(tq_searches<bits> & s, int thread) {
    const int   block    = min(thread/TQ_N_MULTIPLES, TQ_SEARCH_BLOCKS - 1);
    const float multiple = tq_multiple(thread % TQ_N_MULTIPLES)*TQ_UNIT;
    float cost[32], next[32];
    // the seam
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        cost[j] = 0.0f;
    }
#pragma unroll 1
    for (int i = 32; i < 64; i += 2) {
        tq_step<bits, false>(s, s.u[i]    [block]*multiple, cost, next);
        tq_step<bits, false>(s, s.u[i + 1][block]*multiple, next, cost);
    }
    uint32_t seam = 0; // reversed
#pragma unroll 1
    for (int n = 32; n <= 64; n += 32) {
#pragma unroll 1
        for (int i = 0; i < n; i += 2) {
            s.from[i]    [thread] = tq_step<bits, true>(s, s.u[i]    [block]*multiple, cost, next);
            s.from[i + 1][thread] = tq_step<bits, true>(s, s.u[i + 1][block]*multiple, next, cost);
        }
        if (n == 64) {
            break;
        }
        float least = cost[0];
#pragma unroll
        for (int j = 1; j < 32; ++j) {
            seam  = cost[j] < least ? tq_reversed(j) : seam;
            least = fminf(cost[j], least);
        }
        seam = tq_trace_back<32>(s.from, seam, thread) & 31;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            cost[j] = (uint32_t) tq_reversed(j) == seam ? 0.0f : TQ_FAR;
        }
    }
    uint64_t coded = tq_trace_back<64>(s.from, seam, thread);
    coded = coded >> 5 | coded << 59;
    s.coded  [thread] = coded;
    s.quality[thread] = tq_quality(s, coded, multiple, block);
}

// The block's bytes, as tq_halfword, from the first of the best paths of block b. Here a lane has coordinates again.
template <int bits>
static __device__ __forceinline__ uint16_t tq_best_halfword(const float * table, const tq_searches<bits> & s, const tq_unit & n, int b, int lane) {
    const int      best  = tq_best(s.quality + TQ_N_MULTIPLES*b);
    const tq_codes codes = tq_codes_of_path<bits>(table, tq_scale(n.u, tq_multiple(best)), __brevll(s.coded[TQ_N_MULTIPLES*b + best]), lane);
    float quality;
    return tq_halfword<TQ_KIND_TCQ, bits>(n, codes, quality, lane);
}
