#pragma once

// What kernels know of the parameters of one type. They get it as an argument.

#include "ggml-tq.h"
#include "tq-codebooks.h"

#include <cstdint>
#include <cstring>

struct tq_codec {
    uint64_t rotation;       // sign words (docs/format.md section 3)
    uint64_t sketch;
    float    table[32];      // centroids; _tcq: levels
    float    thresholds[15];
    float    kappa;
};

static inline uint64_t tq_sign_word(const float * signs) {
    uint64_t w = 0;
    for (int i = 0; i < TQ_BLOCK_SIZE; ++i) {
        w |= (uint64_t) (signs[i] < 0.0f) << i;
    }
    return w;
}

static inline tq_codec tq_make_codec(const tq_params * params, tq_type type) {
    const uint64_t rotation = tq_sign_word(params->rotation_signs);
    const uint64_t sketch   = tq_sign_word(params->sketch_signs);
    switch (type) {
        case TQ_TYPE_TQ2_TCQ: return { rotation, sketch, TQ_TRELLIS_2B, {}, 0.0f };
        case TQ_TYPE_TQ3_TCQ: return { rotation, sketch, TQ_TRELLIS_3B, {}, 0.0f };
        case TQ_TYPE_TQ4_TCQ: return { rotation, sketch, TQ_TRELLIS_4B, {}, 0.0f };
        default: break;
    }
    const tq_quantizer & quantizer = params->quantizers[type];
    tq_codec codec = { rotation, sketch, {}, {}, quantizer.kappa };
    memcpy(codec.table,      quantizer.centroids,  sizeof(quantizer.centroids));
    memcpy(codec.thresholds, quantizer.thresholds, sizeof(quantizer.thresholds));
    return codec;
}
