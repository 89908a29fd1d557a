#pragma once

// The CPU backend's ops on the cache types, where they do more than ggml's tables of functions: rows are encoded several at
// a time, and keys are centered (docs/format.md section 10). C++, header only, for ggml-cpu/ops.cpp.

#include "ggml-tq-traits.h"

#include <algorithm>
#include <cstring>

// The extra sources of an op on centered keys: three from `first` on, or none
//   positions I32 [n] or [n_kv, n_stream], centers F32 [head_dim, n_head_kv, 4]: centers, scales, 1/scales, those of position 0;
//   table F32 [n_rot, TQ_CENTER_ROWS]
//   with op_params: 1 if pairs are NEOX's, n_rot (which may be 0; the table then has one column that is not read)
#define GGML_TQ_SRC_SET_ROWS   3
#define GGML_TQ_SRC_FLASH_ATTN 5

struct ggml_tq_center {
    const ggml_tensor * pos;
    const ggml_tensor * centers;
    tq_center           center;

    ggml_tq_center(const ggml_tensor * op, int first) : pos(op->src[first]), centers(op->src[first + 1]) {
        if (pos) {
            const ggml_tensor * table = op->src[first + 2];
            GGML_ASSERT(pos->type == GGML_TYPE_I32 && centers->type == GGML_TYPE_F32 && table->type == GGML_TYPE_F32);
            GGML_ASSERT(centers->ne[2] == 4);
            GGML_ASSERT(table->ne[0] == std::max(1, table->op_params[1])); // a copy on another device has no parameters
            center = { (int32_t) centers->ne[0], table->op_params[1], table->op_params[0], (const float *) table->data };
        }
    }

    const float * of_head(int64_t head, int64_t plane = 0) const {
        return (const float *) ((const char *) centers->data + head*centers->nb[1] + plane*centers->nb[2]);
    }
    const float * at     (int64_t head, int32_t p) const { return of_head(head, p > 0 ? 0 : 3); }
    const float * scale  (int64_t head) const { return of_head(head, 1); }
    const float * inverse(int64_t head) const { return of_head(head, 2); }
};

// SET_ROWS. Thread ith of nth.
static inline void ggml_tq_set_rows(const ggml_tensor * dst, int ith, int nth) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * idx = dst->src[1];
    const ggml_tq_center center(dst, GGML_TQ_SRC_SET_ROWS);
    const tq_type type  = ggml_tq_type_of(dst->type);
    const int64_t n_row = src->ne[0];
    // what is encoded as a piece: a head where there are centers, otherwise a block; pieces of several rows together, since
    // the library works on several blocks at a time
    const int64_t n_piece = center.pos ? center.center.head_dim : TQ_BLOCK_SIZE;
    const int64_t n_max   = 1024;
    GGML_ASSERT(n_piece <= n_max && n_row % n_piece == 0);
    float   x     [n_max];
    uint8_t packed[n_max]; // a byte a coordinate is more than any type needs
    char *  to    [n_max/TQ_BLOCK_SIZE];
    int64_t n = 0;
    const size_t piece_size = tq_row_size(type, n_piece);

    const auto flush = [&]() {
        tq_encode(ggml_tq_params(), type, x, packed, n*n_piece);
        for (int64_t i = 0; i < n; ++i) {
            memcpy(to[i], packed + i*piece_size, piece_size);
        }
        n = 0;
    };
    // threads share the pieces: a token has one row
    const int64_t n_pieces = n_row/n_piece*src->ne[1];
    for (int64_t i3 = 0; i3 < src->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < src->ne[2]; ++i2) {
            for (int64_t ip = n_pieces*ith/nth; ip < n_pieces*(ith + 1)/nth; ++ip) {
                const int64_t ir = ip/(n_row/n_piece);
                const int64_t i  = ip%(n_row/n_piece)*n_piece;
                const char * at = (const char *) idx->data + ir*idx->nb[0] + i2%idx->ne[1]*idx->nb[1] + i3%idx->ne[2]*idx->nb[2];
                const int64_t i1 = idx->type == GGML_TYPE_I64 ? *(const int64_t *) at : *(const int32_t *) at;
                GGML_ASSERT(i1 >= 0 && i1 < dst->ne[1]);
                const char * from = (const char *) src->data + ir*src->nb[1] + i2*src->nb[2] + i3*src->nb[3];
                char       * row  = (char *) dst->data       + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3];
                float * piece = x + n*n_piece;
                if (src->type == GGML_TYPE_F16) {
                    ggml_fp16_to_fp32_row((const ggml_fp16_t *) from + i, piece, n_piece);
                } else {
                    memcpy(piece, (const float *) from + i, n_piece*sizeof(float));
                }
                if (center.pos) {
                    const int64_t head = i/n_piece;
                    const int32_t p    = ((const int32_t *) center.pos->data)[ir];
                    tq_center_add(&center.center, center.at(head, p), p, -1.0f, piece);
                    for (int64_t l = 0; l < n_piece; ++l) {
                        piece[l] *= center.scale(head)[l];
                    }
                }
                to[n++] = row + i/TQ_BLOCK_SIZE*tq_row_size(type, TQ_BLOCK_SIZE);
                if ((n + 1)*n_piece > n_max) {
                    flush();
                }
            }
        }
    }
    if (n > 0) {
        flush();
    }
}
