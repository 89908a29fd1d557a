// Scores of centers: docs/format.md, section 10. Compile without floating-point contraction.

#include "tq-internal.h"

#define PAGE  TQ_CENTER_PAGE
#define BLOCK TQ_CENTER_BLOCK
#define QUERIES 8 // together

// w: [n_rot] the factors of cosines and sines at position 0, [n_rot] at the page's start, then what does not turn
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

// the second half of w at the start of a page, for those queries that have another's
static void turn_queries(const struct tq_center * center, struct tq_center_query * queries, int n, int32_t page) {
    const int32_t n_rot   = center->n_rot;
    const int32_t n_pairs = n_rot/2;
    bool turned = true;
    for (int r = 0; r < n; ++r) {
        turned = turned && queries[r].page == page;
    }
    if (turned) {
        return;
    }
    for (int32_t i0 = 0; i0 < n_pairs; i0 += 16) {
        const int n_i = n_pairs - i0 < 16 ? n_pairs - i0 : 16;
        float c[16];
        float s[16];
        for (int i = 0; i < n_i; ++i) {
            c[i] = 1.0f;
            s[i] = 0.0f;
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
            if (queries[r].page != page) {
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
        queries[r].page = page;
    }
}

static int32_t run_of(int32_t pos) {
    return pos <= 0 ? -1 : tq_center_clamp(pos)/PAGE; // -1: position 0
}

void tq_center_cells_init(struct tq_center_cells * cells, const int32_t * pos, const bool * used) {
    bool done[N];
    int n = 0;
    for (int j = 0; j < N; ++j) {
        done[j] = !used[j];
    }
    cells->n_runs = 0;
    for (int first = 0; first < N; ++first) {
        if (done[first]) {
            continue;
        }
        struct tq_center_run run = { run_of(pos[first]), n, 0, true };
        for (int j = first; j < N; ++j) {
            if (done[j] || run_of(pos[j]) != run.page) {
                continue;
            }
            done[j] = true;
            cells->cell[n] = (uint8_t) j;
            cells->at  [n] = (uint8_t) (tq_center_clamp(pos[j])%PAGE);
            run.in_order = run.in_order && (run.n == 0 || (cells->at[n] == cells->at[n - 1] + 1 && cells->cell[n] == cells->cell[n - 1] + 1));
            run.n++;
            n++;
        }
        cells->runs[cells->n_runs++] = run;
    }
}

// a run's cells of one page for up to QUERIES queries; the blocks that they are in are computed as a whole
static void score_run(const struct tq_center * center, const struct tq_center_query * queries, int n, const struct tq_center_run * run,
        const uint8_t * cell, const uint8_t * at, float * scores, size_t step) {
    const int32_t n_rot  = center->n_rot;
    const float * angles = center->table + (int64_t) 3*PAGE*n_rot;
    const float * w   [QUERIES];
    float         sums[QUERIES][PAGE];
    for (int r = 0; r < n; ++r) {
        w[r] = queries[r].w + n_rot;
    }
    bool done[PAGE/BLOCK] = { false };
    for (int j = 0; j < run->n; ++j) {
        const int b = at[j]/BLOCK;
        if (done[b]) {
            continue;
        }
        done[b] = true;
        for (int r = 0; r < n; ++r) {
            for (int i = 0; i < BLOCK; ++i) {
                sums[r][b*BLOCK + i] = queries[r].w[2*n_rot];
            }
        }
        if (n_rot > 0) {
            tq_tile()->turns(angles + (int64_t) b*BLOCK*n_rot, n_rot, w, n, sums[0] + b*BLOCK, PAGE);
        }
    }
    for (int r = 0; r < n; ++r) {
        float * to = scores + r*step;
        if (run->in_order) {
            for (int j = 0; j < run->n; ++j) {
                to[cell[0] + j] += sums[r][at[0] + j];
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
        for (int r = 0; r < n && run->page < 0; ++r) {
            for (int j = 0; j < run->n; ++j) {
                scores[r*step + cell[j]] += queries[r].first;
            }
        }
        if (run->page < 0) {
            continue;
        }
        turn_queries(center, queries, n, run->page);
        for (int r = 0; r < n; r += QUERIES) {
            score_run(center, queries + r, n - r < QUERIES ? n - r : QUERIES, run, cell, at, scores + r*step, step);
        }
    }
}
