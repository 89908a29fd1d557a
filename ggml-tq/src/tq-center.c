// Centered keys: docs/format.md, section 10. Compile without floating-point contraction.

#include "tq-internal.h"

#include <math.h>

#define PAGE 256 // positions whose angles one part of the table holds

void tq_center_make_table(const double * freqs, int32_t n_rot, float * table) {
    const int32_t n_pairs = n_rot/2;
    for (int64_t row = 0; row < TQ_CENTER_ROWS; ++row) {
        const double pos = (double) ((row%PAGE) << 8*(row/PAGE));
        for (int32_t i = 0; i < n_pairs; ++i) {
            table[row*n_rot + i]           = (float) cos(pos*freqs[i]);
            table[row*n_rot + i + n_pairs] = (float) sin(pos*freqs[i]);
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

float tq_center_score(const struct tq_center * center, struct tq_center_query * query, int32_t pos) {
    const int32_t n_rot   = center->n_rot;
    const int32_t n_pairs = n_rot/2;
    const float * w  = query->w;
    float       * wp = query->w + n_rot;
    pos = clamp(pos);
    if (pos == 0) {
        return query->first;
    }
    if (query->page != pos/PAGE) {
        query->page = pos/PAGE;
        for (int32_t i = 0; i < n_pairs; ++i) {
            float c = 1.0f;
            float s = 0.0f;
            turn_pages(center, query->page, i, &c, &s);
            wp[i]           = w[i]*c           + w[i + n_pairs]*s;
            wp[i + n_pairs] = w[i + n_pairs]*c - w[i]*s;
        }
    }
    const float * row = center->table + (int64_t) (pos%PAGE)*n_rot;
    float part[16] = { 0.0f }; // a row of partial sums, so that the loop vectorizes
    int32_t i = 0;
    for (; i + 16 <= n_rot; i += 16) {
        for (int l = 0; l < 16; ++l) {
            part[l] += wp[i + l]*row[i + l];
        }
    }
    float sum = w[2*n_rot];
    for (int l = 0; l < 16; ++l) {
        sum += part[l];
    }
    for (; i < n_rot; ++i) {
        sum += wp[i]*row[i];
    }
    return sum;
}
