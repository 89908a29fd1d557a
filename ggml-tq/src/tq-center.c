// Centered keys: docs/format.md, section 10. Compile without floating-point contraction.

#include "tq-internal.h"

#include <math.h>

#define PAGE TQ_CENTER_PAGE

// cosine and sine of pair i at position pos, the sine `sine` floats on
static void make_angles(const double * freqs, int32_t i, double pos, float * dst, int32_t sine) {
    dst[0]    = (float) cos(pos*freqs[i]);
    dst[sine] = (float) sin(pos*freqs[i]);
}

void tq_center_make_table(const double * freqs, int32_t n_rot, float * table) {
    const int32_t n_pairs = n_rot/2;
    float * distances = table     + (int64_t) 3*PAGE*n_rot;
    float * middles   = distances + (int64_t) TQ_CENTER_HALF*n_rot;
    for (int32_t i = 0; i < n_pairs; ++i) {
        for (int64_t row = 0; row < 3*PAGE; ++row) {
            make_angles(freqs, i, (double) ((row%PAGE) << 8*(row/PAGE)), table + row*n_rot + i, n_pairs);
        }
        for (int32_t j = 0; j < TQ_CENTER_HALF; ++j) {
            make_angles(freqs, i, j + 0.5, distances + i*TQ_CENTER_HALF + j, n_pairs*TQ_CENTER_HALF);
        }
        for (int32_t j = 0; j < PAGE/TQ_CENTER_SPAN; ++j) {
            make_angles(freqs, i, j*TQ_CENTER_SPAN + TQ_CENTER_HALF - 0.5, middles + j*n_rot + i, n_pairs);
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

void tq_center_add(const struct tq_center * center, const float * m, int32_t pos, float sign, float * x) {
    const int32_t n_rot   = center->n_rot;
    const int32_t n_pairs = n_rot/2;
    pos = tq_center_clamp(pos);
    const float * row = center->table + (int64_t) (pos%PAGE)*n_rot;
    for (int32_t i = 0; i < n_pairs; ++i) {
        float c = row[i];
        float s = row[i + n_pairs];
        turn_pages(center, pos/PAGE, i, &c, &s);
        int32_t a, b;
        tq_center_pair(center, i, &a, &b);
        const float ma = m[a];
        const float mb = m[b];
        x[a] += sign*(ma*c - mb*s);
        x[b] += sign*(ma*s + mb*c);
    }
    for (int32_t i = n_rot; i < center->head_dim; ++i) {
        x[i] += sign*m[i];
    }
}
