// Trellis codes: docs/format.md, section 9. Decoding is word operations on bit planes and one table; encoding is Viterbi's
// algorithm. Compile without floating-point contraction.

#include "tq-trellis.h"

#include <math.h>
#include <string.h>

#define STATES    TQ_TRELLIS_STATES
#define MULTIPLES TQ_TRELLIS_MULTIPLES
#define LANES     8 // searches side by side, one a block and multiple: more would idle in short rows

const float * tq_trellis_table(int bits) {
    return tq_trellis_codes[bits].table;
}

void tq_trellis_index_planes(int bits, const uint8_t * planes, uint8_t * index) {
    const struct tq_trellis * code = &tq_trellis_codes[bits];
    memcpy(index, planes, (size_t) (bits - 1)*8);
    index += (bits - 1)*8;

    const uint64_t c = tq_load_u64(planes + (bits - 1)*8);
    for (int k = 0; k < code->n_label_bits; ++k, index += 8) {
        tq_store_u64(index, tq_trellis_label_plane(c, code->taps[k]));
    }
}

//
// encoding
//
// Arrays end in lanes: compilers make vectors of them. Sums and comparisons are those of section 9, in its order.
//

struct search { // of LANES pairs of a block and a multiple
    float    u        [N][LANES];
    float    v        [N][LANES];     // u times the lane's multiple
    float    dist     [16][N][LANES]; // of each label
    uint8_t  index    [16][N][LANES]; // of the level at that distance
    float    costs    [2][STATES][LANES];
    uint32_t from     [N][LANES];     // bit s: through which register, s or s + 32, state s was reached
    uint32_t registers[N][LANES];
    uint8_t  chosen   [N][LANES];     // index of the level
    float    q        [N][LANES];
};

// distances to the nearest of a label's n_free levels, and which that is: index first + w
ALWAYS_INLINE void measure(int n_free, const float * level, int first, const float * restrict v,
        float * restrict dist, uint8_t * restrict index) {
    for (int x = 0; x < N*LANES; ++x) {
        float min = (v[x] - level[0])*(v[x] - level[0]);
        int   w   = first;
        for (int f = 1; f < n_free; ++f) {
            const float d = (v[x] - level[f])*(v[x] - level[f]);
            w   = d < min ? first + f : w;
            min = d < min ? d         : min;
        }
        dist [x] = min;
        index[x] = (uint8_t) w;
    }
}

// Coordinates i and i + 1 of a run: costs of the states before them to costs of the states after them. States k, k + 8,
// k + 16 and k + 24 lead to 2k, 2k + 1, 2k + 16 and 2k + 17, and these to 4k ... 4k + 3.
ALWAYS_INLINE void two_steps(const struct tq_trellis * code, int i, struct search * search,
        float (* restrict cost)[LANES], float (* restrict next)[LANES]) {
    float    (* restrict dist)[N][LANES] = search->dist;
    uint32_t (* restrict from)[LANES]    = search->from;
#define REACH(i, s, to, cost0, cost1) do { \
        const float a = cost0 + dist[TQ_LABEL(code, s)][i][j]; \
        const float b = cost1 + dist[TQ_LABEL(code, (s) + STATES)][i][j]; \
        to = b < a ? b : a; \
        from_ ## i |= (uint32_t) (b < a) << (s); \
    } while (0)
#define REACH_4(k) do { \
        float c0, c1, c16, c17; \
        REACH(i0, 2*k,      c0,  cost[k][j],     cost[k + 16][j]); \
        REACH(i0, 2*k + 1,  c1,  cost[k][j],     cost[k + 16][j]); \
        REACH(i0, 2*k + 16, c16, cost[k + 8][j], cost[k + 24][j]); \
        REACH(i0, 2*k + 17, c17, cost[k + 8][j], cost[k + 24][j]); \
        REACH(i1, 4*k,      next[4*k][j],     c0, c16); \
        REACH(i1, 4*k + 1,  next[4*k + 1][j], c0, c16); \
        REACH(i1, 4*k + 2,  next[4*k + 2][j], c1, c17); \
        REACH(i1, 4*k + 3,  next[4*k + 3][j], c1, c17); \
    } while (0)
    const int i0 = i;
    const int i1 = i + 1;
    for (int j = 0; j < LANES; ++j) {
        uint32_t from_i0 = 0;
        uint32_t from_i1 = 0;
        REACH_4(0); REACH_4(1); REACH_4(2); REACH_4(3); REACH_4(4); REACH_4(5); REACH_4(6); REACH_4(7);
        from[i0][j] = from_i0;
        from[i1][j] = from_i1;
    }
#undef REACH_4
#undef REACH
}

static void measure_labels(int bits, struct search * search) {
    const struct tq_trellis * code = &tq_trellis_codes[bits];
    for (int l = 0; l < 1 << code->n_label_bits; ++l) {
        const int first = l << (bits - 1);
        switch (bits) {
            case 2: measure(2, code->table + first, first, search->v[0], search->dist[l][0], search->index[l][0]); break;
            case 3: measure(4, code->table + first, first, search->v[0], search->dist[l][0], search->index[l][0]); break;
            case 4: measure(8, code->table + first, first, search->v[0], search->dist[l][0], search->index[l][0]); break;
        }
    }
}

ALWAYS_INLINE void four_steps(const struct tq_trellis * code, int i, struct search * search) {
    two_steps(code, i,     search, search->costs[0], search->costs[1]);
    two_steps(code, i + 2, search, search->costs[1], search->costs[0]);
}

// coordinates first ... first + n - 1; the costs before and after are in costs[0]
static void run(int bits, int first, int n, struct search * search) {
    for (int i = first; i < first + n; i += 4) {
        switch (bits) {
            case 2: four_steps(&tq_trellis_codes[2], i, search); break;
            case 3: four_steps(&tq_trellis_codes[3], i, search); break;
            case 4: four_steps(&tq_trellis_codes[4], i, search); break;
        }
    }
}

// each lane's state of least cost, the lowest of equals
static void find_ends(const struct search * search, uint32_t * state) {
    float least[LANES];
    for (int j = 0; j < LANES; ++j) {
        least[j] = search->costs[0][0][j];
        state[j] = 0;
    }
    for (int s = 1; s < STATES; ++s) {
        for (int j = 0; j < LANES; ++j) {
            const float cost = search->costs[0][s][j];
            state[j] = cost < least[j] ? (uint32_t) s : state[j];
            least[j] = cost < least[j] ? cost         : least[j];
        }
    }
}

// from each lane's state after coordinate n - 1 to the one before coordinate 0, and the registers between
static void trace_back(int n, struct search * search, uint32_t * states) {
    uint32_t state[LANES];
    memcpy(state, states, sizeof(state));
    for (int i = n - 1; i >= 0; --i) {
        for (int j = 0; j < LANES; ++j) {
            const uint32_t r = state[j] | (search->from[i][j] >> state[j] & 1)*STATES;
            search->registers[i][j] = r;
            state[j] = r/2;
        }
    }
    memcpy(states, state, sizeof(state));
}

static void find_paths(int bits, struct search * search) {
    const struct tq_trellis * code = &tq_trellis_codes[bits];
    measure_labels(bits, search);

    // the seam
    uint32_t seam[LANES];
    memset(search->costs[0], 0, sizeof(search->costs[0]));
    run(bits, N/2, N/2, search);
    run(bits, 0,   N/2, search);
    find_ends(search, seam);
    trace_back(N/2, search, seam);

    // the block
    for (int s = 0; s < STATES; ++s) {
        for (int j = 0; j < LANES; ++j) {
            search->costs[0][s][j] = (uint32_t) s == seam[j] ? 0.0f : INFINITY;
        }
    }
    run(bits, 0, N, search);
    trace_back(N, search, seam);

    uint8_t labels[2*STATES];
    for (int r = 0; r < 2*STATES; ++r) {
        labels[r] = (uint8_t) TQ_LABEL(code, r);
    }
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < LANES; ++j) {
            search->chosen[i][j] = search->index[labels[search->registers[i][j]]][i][j];
            search->q[i][j]      = code->table[search->chosen[i][j]];
        }
    }
}

// the sum of section 3 for each lane
static void dot_lanes(const float (* a)[LANES], const float (* b)[LANES], float * sum) {
    float t[N][LANES];
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < LANES; ++j) {
            t[i][j] = a[i][j]*b[i][j];
        }
    }
    for (int h = N/2; h > 0; h /= 2) {
        for (int i = 0; i < h; ++i) {
            for (int j = 0; j < LANES; ++j) {
                t[i][j] += t[i + h][j];
            }
        }
    }
    memcpy(sum, t[0], sizeof(t[0]));
}

void tq_trellis_encode(int bits, int n_blocks, const float (* u)[N], uint8_t (* codes)[N]) {
    struct search search;
    float best[TQ_TRELLIS_BATCH];
    for (int b = 0; b < n_blocks; ++b) {
        best[b] = -INFINITY;
    }
    for (int first = 0; first < n_blocks*MULTIPLES; first += LANES) {
        const int n_lanes = n_blocks*MULTIPLES - first < LANES ? n_blocks*MULTIPLES - first : LANES;
        for (int j = 0; j < LANES; ++j) { // idle lanes repeat the last
            const int     lane  = first + (j < n_lanes ? j : n_lanes - 1);
            const float * block = u[lane/MULTIPLES];
            const float   m     = tq_trellis_multiples[lane%MULTIPLES];
            for (int i = 0; i < N; ++i) {
                search.u[i][j] = block[i];
                search.v[i][j] = block[i]*m;
            }
        }
        find_paths(bits, &search);
        float uq[LANES];
        float qq[LANES];
        dot_lanes((const float (*)[LANES]) search.u, (const float (*)[LANES]) search.q, uq);
        dot_lanes((const float (*)[LANES]) search.q, (const float (*)[LANES]) search.q, qq);
        for (int j = 0; j < n_lanes; ++j) {
            const int   b       = (first + j)/MULTIPLES;
            const float quality = uq[j]/sqrtf(qq[j]);
            if (quality > best[b]) {
                best[b] = quality;
                for (int i = 0; i < N; ++i) {
                    const int w = search.chosen[i][j] & ((1 << (bits - 1)) - 1);
                    codes[b][i] = (uint8_t) (w | (int) (search.registers[i][j] & 1) << (bits - 1));
                }
            }
        }
    }
}
