// Trellis codes: docs/format.md, section 9. Decoding is word operations on bit planes and one table; encoding is Viterbi's
// algorithm. Compile without floating-point contraction.

#include "tq-internal.h"
#include "tq-codebooks.h"

#include <math.h>
#include <string.h>

#define STATES    32
#define REACH     (N/2) // coordinates on either side of the seam
#define MULTIPLES 5
#define LANES     32    // searches in parallel, one a block and multiple, the last ones idle

_Static_assert(TQ_TRELLIS_BATCH*MULTIPLES <= LANES, "a lane for each block and multiple");

struct code {
    float table[32];
    int   taps[4]; // of bit i of the label; as many as there are bits
    int   n_label_bits;
};

static const struct code codes_by_bits[] = {
    [2] = { TQ_TRELLIS_2B, TQ_TRELLIS_TAPS_2B, 4 },
    [3] = { TQ_TRELLIS_3B, TQ_TRELLIS_TAPS_3B, 3 },
    [4] = { TQ_TRELLIS_4B, TQ_TRELLIS_TAPS_4B, 2 },
};

static const float multiples[MULTIPLES] = { 0.85214379f, 0.92311635f, 1.0f, 1.08328707f, 1.17351087f };

const float * tq_trellis_table(int bits) {
    return codes_by_bits[bits].table;
}

void tq_trellis_index_planes(int bits, const uint8_t * planes, uint8_t * index) {
    const struct code * code = &codes_by_bits[bits];
    memcpy(index, planes, (size_t) (bits - 1)*8);
    index += (bits - 1)*8;

    const uint64_t c = tq_load_u64(planes + (bits - 1)*8);
    for (int k = 0; k < code->n_label_bits; ++k, index += 8) {
        uint64_t label = 0;
        for (int i = 0; i < 6; ++i) {
            if (code->taps[k] >> i & 1) {
                label ^= i == 0 ? c : c << i | c >> (N - i); // bit j is c[j - i]
            }
        }
        tq_store_u64(index, label);
    }
}

//
// encoding
//

static int parity(int x) {
    x ^= x >> 4;
    x ^= x >> 2;
    x ^= x >> 1;
    return x & 1;
}

static void make_labels(const struct code * code, uint8_t * labels) { // of registers
    for (int r = 0; r < 2*STATES; ++r) {
        labels[r] = 0;
        for (int k = 0; k < code->n_label_bits; ++k) {
            labels[r] |= (uint8_t) (parity(code->taps[k] & r) << k);
        }
    }
}

// One coordinate v[LANES] of a run: costs of states before it to costs after it. from[s] is the register, s or s + 32,
// through which state s was reached: 0 or 1.
static void step(const float * table, int n_labels, int n_free, const uint8_t * labels, int n_vectors, const float * v,
        const float (* restrict cost)[LANES], float (* restrict next)[LANES], uint8_t (* restrict from)[LANES]) {
    const int n_lanes = 16*n_vectors; // not a constant: compilers unroll short loops instead of vectorizing them
    float dist[16][LANES];
    for (int l = 0; l < n_labels; ++l) {
        for (int j = 0; j < n_lanes; ++j) {
            const float d = v[j] - table[l*n_free];
            dist[l][j] = d*d;
        }
        for (int w = 1; w < n_free; ++w) {
            for (int j = 0; j < n_lanes; ++j) {
                const float d = v[j] - table[l*n_free + w];
                dist[l][j] = d*d < dist[l][j] ? d*d : dist[l][j];
            }
        }
    }
    for (int s = 0; s < STATES; ++s) {
        const float * cost0 = cost[s/2];
        const float * cost1 = cost[s/2 + STATES/2];
        const float * dist0 = dist[labels[s]];
        const float * dist1 = dist[labels[s + STATES]];
        for (int j = 0; j < n_lanes; ++j) {
            const float a = cost0[j] + dist0[j];
            const float b = cost1[j] + dist1[j];
            next[s][j] = b < a ? b : a;
            from[s][j] = b < a;
        }
    }
}

// the state before the last n coordinates, from the one after them; their registers if wanted
static int trace_back(const uint8_t (* from)[STATES][LANES], int n, int lane, int state, uint8_t * registers) {
    for (int i = n - 1; i >= 0; --i) {
        const int r = state + from[i][state][lane]*STATES;
        if (registers) {
            registers[i] = (uint8_t) r;
        }
        state = r/2;
    }
    return state;
}

void tq_trellis_encode(int bits, int n_blocks, const float (* u)[N], uint8_t (* codes)[N], float (* q)[N]) {
    const struct code * code = &codes_by_bits[bits];
    const int n_free   = 1 << (bits - 1);
    const int n_labels = 1 << code->n_label_bits;
    const int n_lanes  = n_blocks*MULTIPLES;
    uint8_t labels[2*STATES];
    make_labels(code, labels);

    float v[N][LANES] = { 0 };
    for (int lane = 0; lane < n_lanes; ++lane) {
        for (int i = 0; i < N; ++i) {
            v[i][lane] = u[lane/MULTIPLES][i]*multiples[lane%MULTIPLES];
        }
    }

    float   costs[2][STATES][LANES];
    uint8_t from[N][STATES][LANES];
    float (* cost)[LANES] = costs[0];
    float (* next)[LANES] = costs[1];
#define STEP(i, from) do { \
        step(code->table, n_labels, n_free, labels, (n_lanes + 15)/16, v[i], (const float (*)[LANES]) cost, next, from); \
        float (* t)[LANES] = cost; cost = next; next = t; \
    } while (0)

    // the seam
    memset(costs[0], 0, sizeof(costs[0]));
    for (int i = 0; i < REACH; ++i) {
        STEP(N - REACH + i, from[0]);
    }
    for (int i = 0; i < REACH; ++i) {
        STEP(i, from[i]);
    }
    int seam[LANES];
    for (int lane = 0; lane < n_lanes; ++lane) {
        int end = 0;
        for (int s = 1; s < STATES; ++s) {
            end = cost[s][lane] < cost[end][lane] ? s : end;
        }
        seam[lane] = trace_back((const uint8_t (*)[STATES][LANES]) from, REACH, lane, end, NULL);
    }

    // the block
    for (int s = 0; s < STATES; ++s) {
        for (int lane = 0; lane < LANES; ++lane) {
            cost[s][lane] = lane < n_lanes && s != seam[lane] ? INFINITY : 0.0f;
        }
    }
    for (int i = 0; i < N; ++i) {
        STEP(i, from[i]);
    }
#undef STEP

    for (int b = 0; b < n_blocks; ++b) {
        float best = -INFINITY;
        for (int k = 0; k < MULTIPLES; ++k) {
            const int lane = b*MULTIPLES + k;
            uint8_t registers[N];
            trace_back((const uint8_t (*)[STATES][LANES]) from, N, lane, seam[lane], registers);
            uint8_t path[N];
            float   levels[N];
            for (int i = 0; i < N; ++i) {
                const float * level = code->table + labels[registers[i]]*n_free;
                int   w   = 0;
                float min = (v[i][lane] - level[0])*(v[i][lane] - level[0]);
                for (int f = 1; f < n_free; ++f) {
                    const float d = v[i][lane] - level[f];
                    w   = d*d < min ? f   : w;
                    min = d*d < min ? d*d : min;
                }
                path  [i] = (uint8_t) ((registers[i] & 1) | w << 1);
                levels[i] = level[w];
            }
            const float quality = tq_block_dot(u[b], levels)/sqrtf(tq_block_dot(levels, levels));
            if (quality > best) {
                best = quality;
                memcpy(codes[b], path,   sizeof(path));
                memcpy(q[b],     levels, sizeof(levels));
            }
        }
    }
}
