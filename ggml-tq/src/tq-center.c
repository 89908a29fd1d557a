// Centered keys: docs/format.md, section 10. Compile without floating-point contraction.

#include "tq-internal.h"

#include <math.h>

#define PAGE 256 // positions whose angles one part of the table holds

void tq_center_make_table(const double * freqs, int32_t n_rot, float * table) {
    const int32_t n_pairs = n_rot/2;
    for (int64_t row = 0; row < 3*PAGE; ++row) {
        const double pos = (double) ((row%PAGE) << 8*(row/PAGE));
        for (int32_t i = 0; i < n_pairs; ++i) {
            table[row*n_rot + i]           = (float) cos(pos*freqs[i]);
            table[row*n_rot + i + n_pairs] = (float) sin(pos*freqs[i]);
        }
    }
    for (int64_t i = 0; i < n_rot; ++i) {
        for (int64_t row = 0; row < PAGE; ++row) {
            table[3*PAGE*n_rot + i*PAGE + row] = table[row*n_rot + i];
        }
    }
}

// the turn (c, s) of pair i goes on by 256*page positions
static void turn_pages(const struct tq_center * center, int32_t page, int32_t i, float * c, float * s) {
    for (int part = 1; part < 3; ++part, page >>= 8) {
        if ((page & 0xff) != 0) {
            const float * row = center->table + (int64_t) (part*PAGE + (page & 0xff))*center->n_rot;
            const float c1 = *c*row[i]                   - *s*row[i + center->n_rot/2];
            const float s1 = *c*row[i + center->n_rot/2] + *s*row[i];
            *c = c1;
            *s = s1;
        }
    }
}

static void pair(const struct tq_center * center, int32_t i, int32_t * a, int32_t * b) {
    *a = center->neox ? i                   : 2*i;
    *b = center->neox ? i + center->n_rot/2 : 2*i + 1;
}

static int32_t clamp(int32_t pos) {
    return pos < 0 ? 0 : pos & 0xffffff;
}

void tq_center_add(const struct tq_center * center, const float * m, int32_t pos, float sign, float * x) {
    const int32_t n_rot   = center->n_rot;
    const int32_t n_pairs = n_rot/2;
    pos = clamp(pos);
    const float * row = center->table + (int64_t) (pos%PAGE)*n_rot;
    for (int32_t i = 0; i < n_pairs; ++i) {
        float c = row[i];
        float s = row[i + n_pairs];
        turn_pages(center, pos/PAGE, i, &c, &s);
        int32_t a, b;
        pair(center, i, &a, &b);
        const float ma = m[a];
        const float mb = m[b];
        x[a] += sign*(ma*c - mb*s);
        x[b] += sign*(ma*s + mb*c);
    }
    for (int32_t i = n_rot; i < center->head_dim; ++i) {
        x[i] += sign*m[i];
    }
}

// w: [n_rot] the factors of cosines and sines at position 0, [n_rot] at the page's start, then what does not turn
struct tq_center_query tq_center_query_init(const struct tq_center * center, const float * m, const float * first, const float * q,
        float * w) {
    const int32_t n_rot   = center->n_rot;
    const int32_t n_pairs = n_rot/2;
    for (int32_t i = 0; i < n_pairs; ++i) {
        int32_t a, b;
        pair(center, i, &a, &b);
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

// w's second half at the start of a page
static void turn_query(const struct tq_center * center, struct tq_center_query * query, int32_t page) {
    const int32_t n_pairs = center->n_rot/2;
    const float * w  = query->w;
    float *       wp = query->w + center->n_rot;
    query->page = page;
    for (int32_t i = 0; i < n_pairs; ++i) {
        float c = 1.0f;
        float s = 0.0f;
        turn_pages(center, page, i, &c, &s);
        wp[i]           = w[i]*c           + w[i + n_pairs]*s;
        wp[i + n_pairs] = w[i + n_pairs]*c - w[i]*s;
    }
}

static int32_t run_of(int32_t pos) {
    return pos <= 0 ? -1 : clamp(pos)/PAGE; // -1: position 0
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
            cells->at  [n] = (uint8_t) (clamp(pos[j])%PAGE);
            run.in_order = run.in_order && (run.n == 0 || cells->at[n] == cells->at[n - 1] + 1);
            run.n++;
            n++;
        }
        cells->runs[cells->n_runs++] = run;
    }
}

// The same operations in the same order whether fused or not, and however many cells there are.
#ifdef FP_FAST_FMAF
#define MUL_ADD(a, b, c) fmaf(a, b, c)
#else
#define MUL_ADD(a, b, c) ((a)*(b) + (c))
#endif

void tq_center_scores(const struct tq_center * center, struct tq_center_query * query, const struct tq_center_cells * cells, float * scores) {
    const int32_t n_rot  = center->n_rot;
    const float * angles = center->table + (int64_t) 3*PAGE*n_rot;
    const float * w      = query->w + n_rot;
    for (int i = 0; i < cells->n_runs; ++i) {
        const struct tq_center_run * run = &cells->runs[i];
        const uint8_t * cell = cells->cell + run->first;
        const uint8_t * at   = cells->at   + run->first;
        if (run->page < 0) {
            for (int j = 0; j < run->n; ++j) {
                scores[cell[j]] += query->first;
            }
            continue;
        }
        float sum[N];
        for (int j = 0; j < N; ++j) {
            sum[j] = query->w[2*n_rot];
        }
        if (n_rot > 0 && query->page != run->page) {
            turn_query(center, query, run->page);
        }
        if (run->in_order && run->n == N) {
            for (int32_t k = 0; k < n_rot; ++k) {
                const float * a = angles + (int64_t) k*PAGE + at[0];
                for (int j = 0; j < N; ++j) {
                    sum[j] = MUL_ADD(w[k], a[j], sum[j]);
                }
            }
        } else if (run->in_order) {
            for (int32_t k = 0; k < n_rot; ++k) {
                const float * a = angles + (int64_t) k*PAGE + at[0];
                for (int j = 0; j < run->n; ++j) {
                    sum[j] = MUL_ADD(w[k], a[j], sum[j]);
                }
            }
        } else {
            for (int32_t k = 0; k < n_rot; ++k) {
                const float * a = angles + (int64_t) k*PAGE;
                for (int j = 0; j < run->n; ++j) {
                    sum[j] = MUL_ADD(w[k], a[at[j]], sum[j]);
                }
            }
        }
        for (int j = 0; j < run->n; ++j) {
            scores[cell[j]] += sum[j];
        }
    }
}
