#pragma once

// What tq-rows.h needs, in vectors of LANES coordinates, or of LANES searches of a trellis. Included by tq-rows-avx2.c and
// tq-rows-avx512.c, whose operations these are. The same roundings in the same order as in tq-rows-portable.c and tq-trellis.c.

#include "tq-trellis.h"

#include <math.h>
#include <string.h>

#define VECS (N/LANES)

//
// section 3
//

ALWAYS_INLINE void fwht(vec * v) {
    for (int r = 0; r < VECS; ++r) {
        v[r] = fwht_lanes(v[r]);
    }
    for (int h = 1; h < VECS; h *= 2) {
        for (int r = 0; r < VECS; ++r) {
            if ((r & h) == 0) {
                const vec a = v[r];
                const vec b = v[r + h];
                v[r]     = add(a, b);
                v[r + h] = sub(a, b);
            }
        }
    }
}

static void rht(float * x, const float * signs) {
    vec v[VECS];
    for (int r = 0; r < VECS; ++r) {
        v[r] = mul(load(x + r*LANES), load(signs + r*LANES));
    }
    fwht(v);
    for (int r = 0; r < VECS; ++r) {
        store(x + r*LANES, mul(v[r], set(0.125f)));
    }
}

static void rht_inverse(float * x, const float * signs) {
    vec v[VECS];
    for (int r = 0; r < VECS; ++r) {
        v[r] = load(x + r*LANES);
    }
    fwht(v);
    for (int r = 0; r < VECS; ++r) {
        store(x + r*LANES, mul(v[r], mul(set(0.125f), load(signs + r*LANES))));
    }
}

static float dot(const float * a, const float * b) {
    vec t[VECS];
    for (int r = 0; r < VECS; ++r) {
        t[r] = mul(load(a + r*LANES), load(b + r*LANES));
    }
    for (int h = VECS/2; h > 0; h /= 2) {
        for (int r = 0; r < h; ++r) {
            t[r] = add(t[r], t[r + h]);
        }
    }
    return sum_lanes(t[0]);
}

// the largest magnitude; as integers numbers are in order, and what is not finite is above them
static float magnitude(const float * x) {
    ints most = set_ints(0);
    for (int r = 0; r < VECS; ++r) {
        most = max_ints(most, and_ints(bits_of(load(x + r*LANES)), set_ints(0x7fffffff)));
    }
    return max_lanes(most);
}

//
// codes
//

// the number of thresholds below a coordinate, bit by bit from the highest
ALWAYS_INLINE void nearest_bits(int bits, const float * thresholds, const float * centroids, const float * u, uint8_t * planes, float * q) {
    for (int i = 0; i < N; i += LANES) {
        const vec x = load(u + i);
        ints index = set_ints(0);
        for (int b = bits - 1; b >= 0; --b) {
            const mask above = less(look_up(thresholds, bits, or_ints(index, set_ints((1u << b) - 1))), x);
            index = or_where(index, above, 1u << b);
            store_bits(planes + 8*b + i/8, above);
        }
        store(q + i, look_up(centroids, bits, index));
    }
}

static void nearest(const struct tq_quantizer * quantizer, int bits, const float * u, uint8_t * planes, float * q) {
    float thresholds[16] = { 0.0f };
    memcpy(thresholds, quantizer->thresholds, sizeof(quantizer->thresholds));
    switch (bits) {
        case 1: nearest_bits(1, thresholds, quantizer->centroids, u, planes, q); break;
        case 2: nearest_bits(2, thresholds, quantizer->centroids, u, planes, q); break;
        case 3: nearest_bits(3, thresholds, quantizer->centroids, u, planes, q); break;
        case 4: nearest_bits(4, thresholds, quantizer->centroids, u, planes, q); break;
    }
}

ALWAYS_INLINE void levels_bits(const float * table, int bits, const uint8_t * planes, float * q) {
    for (int i = 0; i < N; i += LANES) {
        ints index = set_ints(0);
        for (int b = 0; b < bits; ++b) {
            index = or_where(index, load_bits(planes + 8*b + i/8), 1u << b);
        }
        store(q + i, look_up(table, bits, index));
    }
}

static void levels(const float * table, int bits, const uint8_t * planes, float * q) {
    switch (bits) {
        case 1: levels_bits(table, 1, planes, q); break;
        case 2: levels_bits(table, 2, planes, q); break;
        case 3: levels_bits(table, 3, planes, q); break;
        case 4: levels_bits(table, 4, planes, q); break;
        case 5: levels_bits(table, 5, planes, q); break;
    }
}

static void negative(const float * x, uint8_t * plane) {
    for (int i = 0; i < N; i += LANES) {
        store_bits(plane + i/8, less(load(x + i), set(0.0f)));
    }
}

//
// section 9: searches side by side, one a block and multiple
//

#define STATES TQ_TRELLIS_STATES

struct search {
    _Alignas(64) float u[N][TQ_TRELLIS_BATCH + LANES]; // of each block; what lies behind them is read but not used
    float   v    [N][LANES];          // of the lane's block, times its multiple
    float   dist [N*16][LANES];       // of a coordinate to each label's nearest level
    float   costs[2][STATES][LANES];
    uint8_t from [N][STATES*LANES/8]; // through which register, s or s + 32, each state was reached
    float   q    [N][LANES];
    uint8_t bits [4][N][LANES/8];     // of codes: the lanes' free bits, then the coded one
};

// distances of a coordinate to each label's nearest level
ALWAYS_INLINE void measure(const struct tq_trellis * code, int n_labels, int i, struct search * search) {
    const int n_free = 32/n_labels;
    const vec v = load(search->v[i]);
    for (int l = 0; l < n_labels; ++l) {
        const float * level = code->table + l*n_free;
        vec d = sub(v, set(level[0]));
        for (int w = 1; w < n_free; ++w) {
            d = nearer(d, sub(v, set(level[w])));
        }
        store(search->dist[i*n_labels + l], mul(d, d)); // of the nearest: rounding keeps squares in order
    }
}

// Coordinates i and i + 1 of a run: costs of the states before them to costs of the states after them. States k, k + 8,
// k + 16 and k + 24 lead to 2k, 2k + 1, 2k + 16 and 2k + 17, and these to 4k ... 4k + 3. Where it is the first run, distances are
// measured on the way: a step waits for the one before.
ALWAYS_INLINE void two_steps(const struct tq_trellis * code, int n_labels, bool first, bool remember, int i, struct search * search,
        float (* restrict cost)[LANES], float (* restrict next)[LANES]) {
    if (first) {
        measure(code, n_labels, i,     search);
        measure(code, n_labels, i + 1, search);
    }
    vec dist[LANES];
    const bool in_registers = n_labels <= LANES/2; // all of two coordinates; there are 2*LANES registers
    for (int l = 0; in_registers && l < 2*n_labels; ++l) {
        dist[l] = load(search->dist[i*n_labels + l]);
        __asm__("" : "+v"(dist[l])); // the compiler would read it again and again
    }
#define DIST(l) (in_registers ? dist[(l)%LANES] : load(search->dist[i*n_labels + (l)]))
    ways ways_0, ways_1;
    if (remember) {
        begin(&ways_0, search->from[i]);
        begin(&ways_1, search->from[i + 1]);
    }
#define REACH(step, s, cost0, cost1, to) \
        const vec a##to = add(cost0, DIST(step*n_labels + TQ_LABEL(code, s))); \
        const vec b##to = add(cost1, DIST(step*n_labels + TQ_LABEL(code, (s) + STATES))); \
        const vec to    = lesser(b##to, a##to); \
        if (remember) { note(&ways_##step, s, a##to, b##to); }
#define REACH_4(k) do { \
        const vec p0 = load(cost[k]), p8 = load(cost[k + 8]), p16 = load(cost[k + 16]), p24 = load(cost[k + 24]); \
        REACH(0, 2*k,      p0, p16, c0); \
        REACH(0, 2*k + 1,  p0, p16, c1); \
        REACH(0, 2*k + 16, p8, p24, c16); \
        REACH(0, 2*k + 17, p8, p24, c17); \
        REACH(1, 4*k,      c0, c16, t0); store(next[4*k],     t0); \
        REACH(1, 4*k + 1,  c0, c16, t1); store(next[4*k + 1], t1); \
        REACH(1, 4*k + 2,  c1, c17, t2); store(next[4*k + 2], t2); \
        REACH(1, 4*k + 3,  c1, c17, t3); store(next[4*k + 3], t3); \
    } while (0)
    REACH_4(0); REACH_4(1); REACH_4(2); REACH_4(3); REACH_4(4); REACH_4(5); REACH_4(6); REACH_4(7);
    if (remember) {
        keep(&ways_0, search->from[i]);
        keep(&ways_1, search->from[i + 1]);
    }
#undef REACH_4
#undef REACH
#undef DIST
}

// coordinates start ... start + n - 1; the costs before and after are in costs[0]
ALWAYS_INLINE void run(const struct tq_trellis * code, int n_labels, bool first, bool remember, int start, int n, struct search * search) {
    for (int i = start; i < start + n; i += 4) {
        two_steps(code, n_labels, first, remember, i,     search, search->costs[0], search->costs[1]);
        two_steps(code, n_labels, first, remember, i + 2, search, search->costs[1], search->costs[0]);
    }
}

// each lane's state of least cost, the lowest of equals
static ints find_ends(const struct search * search) {
    vec  least = load(search->costs[0][0]);
    ints state = set_ints(0);
    for (uint32_t s = 1; s < STATES; ++s) {
        const vec cost = load(search->costs[0][s]);
        state = choose_ints(is_lesser(cost, least), set_ints(s), state);
        least = lesser(cost, least);
    }
    return state;
}

ALWAYS_INLINE void find_paths(const struct tq_trellis * code, int bits, struct search * search) {
    const int n_labels = 32 >> (bits - 1);
    uint32_t labels[STATES];
    for (int s = 0; s < STATES; ++s) {
        labels[s] = (uint32_t) TQ_LABEL(code, s);
    }
    // a label's levels ascend: those on both sides of the middle of each 2*2^b
    float last_below [3][16];
    float first_above[3][16];
    for (int b = 0; b < bits - 1; ++b) {
        for (int k = 0; k < 16 >> b; ++k) {
            last_below [b][k] = code->table[(2*k + 1)*(1 << b) - 1];
            first_above[b][k] = code->table[(2*k + 1)*(1 << b)];
        }
    }

    // the seam
    for (int s = 0; s < STATES; ++s) {
        store(search->costs[0][s], set(0.0f));
    }
    run(code, n_labels, true, false, N/2, N/2, search);
    run(code, n_labels, true, true,  0,   N/2, search);
    ints state = find_ends(search);
    for (int i = N/2 - 1; i >= 0; --i) {
        state = shift_right(came_from(search->from[i], state), 1);
    }

    // the block
    for (uint32_t s = 0; s < STATES; ++s) {
        store(search->costs[0][s], choose(equal(state, set_ints(s)), set(0.0f), set(INFINITY)));
    }
    run(code, n_labels, false, true, 0, N, search);
    for (int i = N - 1; i >= 0; --i) {
        const ints r = came_from(search->from[i], state);
        state = shift_right(r, 1);
        store_bits(search->bits[bits - 1][i], equal(and_ints(r, set_ints(1)), set_ints(1)));

        // the nearest of the register's levels, by halves of them: the first of equals
        const vec v = load(search->v[i]);
        const mask upper = equal(shift_right(r, 5), set_ints(1));
        ints index = look_up_ints(labels, and_ints(r, set_ints(STATES - 1)));
        index = choose_ints(upper, xor_ints(index, set_ints((uint32_t) TQ_LABEL(code, STATES))), index); // labels are linear
        for (int b = bits - 2; b >= 0; --b) {
            const vec  below  = look_up(last_below [b], 4 - b, index);
            const vec  above  = look_up(first_above[b], 4 - b, index);
            const mask better = less(square(sub(v, above)), square(sub(v, below)));
            store_bits(search->bits[b][i], better);
            index = or_where(shift_left(index, 1), better, 1);
        }
        store(search->q[i], look_up(code->table, 5, index));
    }
}

// u of the lanes' blocks, the first of which is `first`
ALWAYS_INLINE vec blocks_at(const struct search * search, int i, int first, ints block) {
    return look_up(search->u[i] + first, LANES == 16 ? 4 : 3, block);
}

// as dot(), of each lane: u*q, q*q
static void dots(const struct search * search, int first, ints block, vec * uq, vec * qq) {
    vec a[N/2];
    vec b[N/2];
    for (int i = 0; i < N/2; ++i) {
        const vec q0 = load(search->q[i]);
        const vec q1 = load(search->q[i + N/2]);
        a[i] = add(mul(blocks_at(search, i, first, block), q0), mul(blocks_at(search, i + N/2, first, block), q1));
        b[i] = add(mul(q0, q0), mul(q1, q1));
    }
    for (int h = N/4; h > 0; h /= 2) {
        for (int i = 0; i < h; ++i) {
            a[i] = add(a[i], a[i + h]);
            b[i] = add(b[i], b[i + h]);
        }
    }
    *uq = a[0];
    *qq = b[0];
}

// see tq-rows.h
static void search_trellis(int bits, int n_blocks, const float (* u)[N], uint8_t (* planes)[4*8]) {
    struct search search;
    float best[TQ_TRELLIS_BATCH];
    for (int b = 0; b < n_blocks; ++b) {
        best[b] = -INFINITY;
        for (int i = 0; i < N; ++i) {
            search.u[i][b] = u[b][i];
        }
    }
    const int n_lanes = n_blocks*TQ_TRELLIS_MULTIPLES;
    for (int lane = 0; lane < n_lanes; lane += LANES) {
        const int first = lane/TQ_TRELLIS_MULTIPLES;
        uint32_t block    [LANES];
        float    multiples[LANES];
        for (int j = 0; j < LANES; ++j) { // idle lanes repeat the last
            const int l = lane + j < n_lanes ? lane + j : n_lanes - 1;
            block    [j] = (uint32_t) (l/TQ_TRELLIS_MULTIPLES - first);
            multiples[j] = tq_trellis_multiples[l%TQ_TRELLIS_MULTIPLES];
        }
        for (int i = 0; i < N; ++i) {
            store(search.v[i], mul(blocks_at(&search, i, first, load_ints(block)), load(multiples)));
        }
        switch (bits) {
            case 2: find_paths(&tq_trellis_codes[2], 2, &search); break;
            case 3: find_paths(&tq_trellis_codes[3], 3, &search); break;
            case 4: find_paths(&tq_trellis_codes[4], 4, &search); break;
        }
        vec   uq, qq;
        float quality[LANES];
        dots(&search, first, load_ints(block), &uq, &qq);
        store(quality, divide(uq, root(qq)));
        for (int j = 0; j < LANES && lane + j < n_lanes; ) {
            const int b = first + (int) block[j];
            int better = -1;
            for (; j < LANES && lane + j < n_lanes && first + (int) block[j] == b; ++j) {
                if (quality[j] > best[b]) {
                    best[b] = quality[j];
                    better  = j;
                }
            }
            if (better >= 0) {
                for (int p = 0; p < bits; ++p) {
                    for (int i = 0; i < N; i += 32) {
                        const uint32_t piece = bits_of_lane(search.bits[p][i], better);
                        memcpy(planes[b] + 8*p + i/8, &piece, sizeof(piece));
                    }
                }
            }
        }
    }
}
