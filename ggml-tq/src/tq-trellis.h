#pragma once

// Trellis codes (docs/format.md, section 9): what searches share.

#include "tq-internal.h"
#include "tq-codebooks.h"

#define TQ_TRELLIS_STATES    32
#define TQ_TRELLIS_MULTIPLES 5

struct tq_trellis {
    float table[32];
    int   taps[4]; // of bit i of the label, 0 beyond the last
    int   n_label_bits;
};

static const struct tq_trellis tq_trellis_codes[] = { // by bits
    [2] = { TQ_TRELLIS_2B, TQ_TRELLIS_TAPS_2B, 4 },
    [3] = { TQ_TRELLIS_3B, TQ_TRELLIS_TAPS_3B, 3 },
    [4] = { TQ_TRELLIS_4B, TQ_TRELLIS_TAPS_4B, 2 },
};

static const float tq_trellis_multiples[TQ_TRELLIS_MULTIPLES] = { 0.85214379f, 0.92311635f, 1.0f, 1.08328707f, 1.17351087f };

// of a register of six bits
#define TQ_PARITIES   0x96696996u // of five bits
#define TQ_PARITY(x)  ((int) (TQ_PARITIES >> ((x) & 31) & 1) ^ (x) >> 5)
#define TQ_LABEL(code, r) (TQ_PARITY((code)->taps[0] & (r))      | TQ_PARITY((code)->taps[1] & (r)) << 1 | \
                           TQ_PARITY((code)->taps[2] & (r)) << 2 | TQ_PARITY((code)->taps[3] & (r)) << 3)
