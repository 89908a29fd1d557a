// Scores of centers: docs/format.md, section 10. Compile without floating-point contraction.

#include "tq-internal.h"

// Within a span a position is a distance from its middle, and cos(x) = cos(-x), sin(x) = -sin(-x): sums over the pairs of the cosines' terms
// and of the sines' give the scores of two positions.

#define PAGE TQ_CENTER_PAGE
#define SPAN TQ_CENTER_SPAN
#define QUERIES 12 // together

// w: [n_rot] the factors of cosines and sines at position 0, [n_rot] in the middle of the span, then what does not turn
struct tq_center_query tq_center_query_init(const struct tq_center * center, const float * m, const float * first, const float * q,
        float * w) {
    const int32_t n_rot   = center->n_rot;
    const int32_t n_pairs = n_rot/2;
    for (int32_t i = 0; i < n_pairs; ++i) {
        int32_t a, b;
        tq_center_pair(center, i, &a, &b);
        w[i]           = q[a]*m[a] + q[b]*m[b];
        w[i + n_pairs] = q[b]*m[a] - q[a]*m[b];
    }
    float rest = 0.0f;
    for (int32_t i = n_rot; i < center->head_dim; ++i) {
        rest += q[i]*m[i];
    }
    w[2*n_rot] = rest;
    float score = 0.0f;
    for (int32_t i = 0; i < center->head_dim; ++i) {
        score += q[i]*first[i];
    }
    return (struct tq_center_query) { w, -1, score };
}

// the second half of w in the middle of a span, for those queries that have another's
static void turn_queries(const struct tq_center * center, struct tq_center_query * queries, int n, int32_t span) {
    const int32_t n_rot   = center->n_rot;
    const int32_t n_pairs = n_rot/2;
    const int32_t page    = span/(PAGE/SPAN);
    const float * middle  = center->table + (int64_t) (3*PAGE + TQ_CENTER_HALF + span%(PAGE/SPAN))*n_rot;
    bool turned = true;
    for (int r = 0; r < n; ++r) {
        turned = turned && queries[r].span == span;
    }
    if (turned) {
        return;
    }
    for (int32_t i0 = 0; i0 < n_pairs; i0 += 16) {
        const int n_i = n_pairs - i0 < 16 ? n_pairs - i0 : 16;
        float c[16];
        float s[16];
        for (int i = 0; i < n_i; ++i) {
            c[i] = middle[i0 + i];
            s[i] = middle[i0 + i + n_pairs];
        }
        for (int part = 1; part < 3; ++part) {
            const int digit = page >> 8*(part - 1) & 0xff;
            const float * row = center->table + (int64_t) (part*PAGE + digit)*n_rot + i0;
            for (int i = 0; i < n_i && digit != 0; ++i) {
                const float c1 = c[i]*row[i]           - s[i]*row[i + n_pairs];
                const float s1 = c[i]*row[i + n_pairs] + s[i]*row[i];
                c[i] = c1;
                s[i] = s1;
            }
        }
        for (int r = 0; r < n; ++r) {
            if (queries[r].span != span) {
                const float * w  = queries[r].w + i0;
                float *       wp = queries[r].w + n_rot + i0;
                for (int i = 0; i < n_i; ++i) {
                    wp[i]           = w[i]*c[i]           + w[i + n_pairs]*s[i];
                    wp[i + n_pairs] = w[i + n_pairs]*c[i] - w[i]*s[i];
                }
            }
        }
    }
    for (int r = 0; r < n; ++r) {
        queries[r].span = span;
    }
}

static int32_t run_of(int32_t pos) {
    return pos <= 0 ? -1 : tq_center_clamp(pos)/SPAN; // -1: position 0
}

// cell j joins a run
static void add_cell(struct tq_center_cells * cells, struct tq_center_run * run, int j, int32_t pos) {
    const int n = run->first + run->n;
    cells->cell[n] = (uint8_t) j;
    cells->at  [n] = (uint8_t) (tq_center_clamp(pos)%SPAN);
    run->in_order  = run->in_order && (run->n == 0 || (cells->at[n] == cells->at[n - 1] + 1 && cells->cell[n] == cells->cell[n - 1] + 1));
    run->n++;
}

// cells that are all used, at one position after the other: most tiles of one sequence. False if they are not.
static bool add_sequence(struct tq_center_cells * cells, const int32_t * pos, const bool * used) {
    int all = 1;
    for (int j = 0; j < N; ++j) {
        all &= used[j];
    }
    if (!all) { // then not all positions are there
        return false;
    }
    int32_t other = pos[0] <= 0;
    for (int j = 0; j < N; ++j) {
        other |= pos[j] ^ (int32_t) ((uint32_t) pos[0] + (uint32_t) j);
    }
    if (other) {
        return false;
    }
    const int at = tq_center_clamp(pos[0])%SPAN;
    const int n  = SPAN - at < N ? SPAN - at : N; // in the first span
    for (int j = 0; j < N; ++j) {
        cells->cell[j] = (uint8_t) j;
        cells->at  [j] = (uint8_t) ((at + j)%SPAN);
    }
    cells->n_runs  = n < N ? 2 : 1;
    cells->runs[0] = (struct tq_center_run) { run_of(pos[0]),     0, n,     true };
    cells->runs[1] = (struct tq_center_run) { run_of(pos[N - 1]), n, N - n, true };
    return true;
}

void tq_center_cells_init(struct tq_center_cells * cells, const int32_t * pos, const bool * used) {
    if (add_sequence(cells, pos, used)) {
        return;
    }
    // spans as they come, which are few unless sequences alternate
    enum { MAX_RUNS = 4 };
    int n = 0; // cells
    int i = -1;
    for (int j = 0; j < N && i < MAX_RUNS; ++j) {
        if (used[j]) {
            const int32_t span = run_of(pos[j]);
            if (i < 0 || cells->runs[i].span != span) {
                cells->runs[++i] = (struct tq_center_run) { span, n, 0, true };
            }
            add_cell(cells, &cells->runs[i], j, pos[j]);
            n++;
        }
    }
    cells->n_runs = i + 1;
    if (i < MAX_RUNS) {
        return;
    }
    // a span's cells together
    bool done[N];
    for (int j = 0; j < N; ++j) {
        done[j] = !used[j];
    }
    n = 0;
    cells->n_runs = 0;
    for (int first = 0; first < N; ++first) {
        if (done[first]) {
            continue;
        }
        struct tq_center_run * run = &cells->runs[cells->n_runs++];
        *run = (struct tq_center_run) { run_of(pos[first]), n, 0, true };
        for (int j = first; j < N; ++j) {
            if (!done[j] && run_of(pos[j]) == run->span) {
                add_cell(cells, run, j, pos[j]);
                done[j] = true;
                n++;
            }
        }
    }
}

// a run's cells of one span for up to QUERIES queries; the span is computed as a whole
static void score_run(const struct tq_center * center, const struct tq_center_query * queries, int n, const struct tq_center_run * run,
        const uint8_t * cell, const uint8_t * at, float * scores, size_t step) {
    const int32_t n_rot  = center->n_rot;
    const float * angles = center->table + (int64_t) 3*PAGE*n_rot;
    const float * w[QUERIES];
    for (int r = 0; r < n; ++r) {
        w[r] = queries[r].w + n_rot;
    }
    if (run->in_order && run->n == SPAN) {
        tq_tile()->turns(angles, n_rot/2, w, n, scores, step);
        return;
    }
    float sums[QUERIES][SPAN] = { { 0 } };
    tq_tile()->turns(angles, n_rot/2, w, n, sums[0], SPAN);
    for (int r = 0; r < n; ++r) {
        float * to = scores + r*step;
        if (run->in_order) {
            const float * from = sums[r] + at[0];
            to += cell[0];
            for (int j = 0; j < run->n; ++j) {
                to[j] += from[j];
            }
        } else {
            for (int j = 0; j < run->n; ++j) {
                to[cell[j]] += sums[r][at[j]];
            }
        }
    }
}

void tq_center_scores(const struct tq_center * center, struct tq_center_query * queries, int n, const struct tq_center_cells * cells,
        float * scores, size_t step) {
    for (int i = 0; i < cells->n_runs; ++i) {
        const struct tq_center_run * run = &cells->runs[i];
        const uint8_t * cell = cells->cell + run->first;
        const uint8_t * at   = cells->at   + run->first;
        for (int r = 0; r < n && run->span < 0; ++r) {
            for (int j = 0; j < run->n; ++j) {
                scores[r*step + cell[j]] += queries[r].first;
            }
        }
        if (run->span < 0) {
            continue;
        }
        turn_queries(center, queries, n, run->span);
        for (int r = 0; r < n; r += QUERIES) {
            score_run(center, queries + r, n - r < QUERIES ? n - r : QUERIES, run, cell, at, scores + r*step, step);
        }
    }
}
