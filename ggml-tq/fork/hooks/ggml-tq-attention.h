#pragma once

// FLASH_ATTN_EXT on the CPU where keys or values are of the cache types. C++, for ggml-cpu/ops.cpp alone, whose vector
// functions it uses.
//
// A unit of work is a stream, the query heads that share a key and a value head, up to ROWS of their queries ("rows"), and a
// range of cells. It goes through the range in tiles of CELLS: each tile is unpacked once for all rows, in the rotated basis,
// and the sums of values are turned back once at the end. Ranges of one row are combined after a barrier. Units do not
// depend on the number of threads, so neither do results.
//
// Where the library has tiles of integers, our side of a product uses them; otherwise, and for the other side's types, rows
// become floats and upstream's simd_gemm multiplies.

#include "ggml-tq-ops.h"
#include "ggml-cpu-impl.h"
#include "simd-gemm.h"
#include "vec.h"

#include <cfloat>
#include <cmath>

namespace ggml_tq_attention {

constexpr int64_t ROWS      = 64;
constexpr int64_t CELLS     = TQ_BLOCK_SIZE;
constexpr int64_t MIN_RANGE = 256; // cells
constexpr int64_t MAX_UNITS = 128; // that ranges of cells are made for
constexpr int64_t FEW_ROWS  = 8;   // transposing a tile of floats pays above

// with the parameters of this process; made once a thread
static inline const tq_tile_type & tile_type(tq_type type) {
    static thread_local struct { uint64_t hash; bool made; tq_tile_type tile; } cache[TQ_TYPE_COUNT];
    auto & c = cache[type];
    if (!c.made || c.hash != ggml_tq_params()->hash) {
        c = { ggml_tq_params()->hash, true, tq_tile_type_init(ggml_tq_params(), type) };
    }
    return c.tile;
}

// keys or values
struct side {
    const ggml_tensor * t;
    int64_t      n;     // head dim
    bool         ours;
    bool         tiles;
    tq_tile_type type;
    int64_t      n_parts;
    size_t       block_size = 0;

    side(const ggml_tensor * t, bool use_ref) :
        t(t), n(t->ne[0]), ours(ggml_tq_is_type(t->type)), tiles(ours && tq_tile_available() && !use_ref), type(), n_parts(1) {
        if (tiles) {
            type       = tile_type(ggml_tq_type_of(t->type));
            n_parts    = type.n_parts;
            block_size = tq_row_size(type.type, TQ_BLOCK_SIZE);
        }
    }

    int64_t n_blocks() const { return n/TQ_BLOCK_SIZE; }

    const char * row(int64_t cell, int64_t head, int64_t stream) const {
        return (const char *) t->data + cell*t->nb[1] + head*t->nb[2] + stream*t->nb[3];
    }

    // one row as floats, ours in the rotated basis
    void read(const char * row, float * dst) const {
        if (ours) {
            tq_decode_rotated(ggml_tq_params(), ggml_tq_type_of(t->type), row, dst, n);
        } else if (t->type == GGML_TYPE_F32) {
            memcpy(dst, row, n*sizeof(float));
        } else if (t->type == GGML_TYPE_F16) {
            ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, dst, n);
        } else if (t->type == GGML_TYPE_BF16) {
            ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) row, dst, n);
        } else {
            ggml_get_type_traits(t->type)->to_float(row, dst, n);
        }
    }
};

static inline int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

static inline float * take(float *& p, int64_t n) { // n floats of scratch
    float * r = p;
    p += div_up(n, 16)*16;
    return r;
}

struct op {
    const ggml_tensor * dst;
    const ggml_tensor * q;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    side k, v;
    ggml_tq_center center;

    int64_t n_head, n_token, n_stream, n_kv;
    int64_t group;  // heads
    int64_t n_group, n_row, n_row_tile, n_range, range, n_unit;
    int64_t n_out;  // floats of a row's sums of values
    float   scale, max_bias, softcap;

    op(const ggml_tensor * dst, bool use_ref) :
        dst(dst), q(dst->src[0]), mask(dst->src[3]), sinks(dst->src[4]), k(dst->src[1], use_ref), v(dst->src[2], use_ref),
        center(dst, GGML_TQ_SRC_FLASH_ATTN),
        n_head(q->ne[2]), n_token(q->ne[1]), n_stream(q->ne[3]), n_kv(k.t->ne[1]) {
        group      = n_head/std::max(k.t->ne[2], v.t->ne[2]);
        n_group    = n_head/group;
        n_row      = n_token*group;
        n_row_tile = div_up(n_row, ROWS);
        const int64_t n_base = n_stream*n_group*n_row_tile;
        n_range    = std::max<int64_t>(1, std::min(MAX_UNITS/n_base, div_up(n_kv, MIN_RANGE)));
        range      = div_up(div_up(n_kv, n_range), CELLS)*CELLS;
        n_range    = div_up(n_kv, range);
        n_unit     = n_base*n_range;
        n_out      = v.n*v.n_parts;
        memcpy(&scale,    (const float *) dst->op_params + 0, sizeof(float));
        memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
        memcpy(&softcap,  (const float *) dst->op_params + 2, sizeof(float));
        scale = softcap != 0.0f ? scale/softcap : scale;
    }

    void check() const {
        GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[0] == k.n);
        GGML_ASSERT(k.t->nb[0] == ggml_type_size(k.t->type) && v.t->nb[0] == ggml_type_size(v.t->type));
        GGML_ASSERT(k.t->ne[3] == n_stream && v.t->ne[3] == n_stream && v.t->ne[1] == n_kv);
        GGML_ASSERT(n_head % k.t->ne[2] == 0 && n_head % v.t->ne[2] == 0);
        GGML_ASSERT(n_group % k.t->ne[2] == 0 && n_group % v.t->ne[2] == 0);
        GGML_ASSERT(dst->ne[0] == v.n && dst->ne[1] == n_head && dst->ne[2] == n_token && ggml_is_contiguous(dst));
        GGML_ASSERT(!center.pos || center.center.head_dim == k.n);
    }

    int64_t row_size() const { return 2 + n_out; } // of a range's result: maximum, sum, sums of values

    float slope(int64_t head) const { // ALiBi
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const uint32_t n_log2 = 1u << (uint32_t) floor(log2((double) n_head));
        return head < n_log2 ? powf(powf(2.0f, -max_bias/n_log2), head + 1) : powf(powf(2.0f, -max_bias/2.0f/n_log2), 2*(head - n_log2) + 1);
    }
};

// what a thread works in
struct scratch {
    float * q;       // [ROWS][k.n]
    float * qr;      // [ROWS][k.n], for stored keys: scaled, if keys are centered, and rotated
    float * qc;      // [ROWS][...], for centers
    float * turned;  // [ROWS][n_rot], the same at a tile's first position
    float * angles;  // [n_rot][CELLS], of as many positions
    tq_tile_numbers * qn; // [k.n_blocks][k.n_parts][ROWS]
    tq_tile_numbers * pn; // [ROWS]
    float * scores;  // [ROWS][CELLS], then weights
    float * bias;    // [ROWS][CELLS]
    float * rows;    // [CELLS][k.n or v.n]
    float * columns; // [k.n][CELLS]
    float * out;     // [ROWS][n_out]
    int64_t size;    // floats

    scratch(const op & a, float * base) {
        float * p = base;
        const int64_t n_numbers = ROWS*(int64_t) sizeof(tq_tile_numbers)/(int64_t) sizeof(float);
        q       = take(p, ROWS*a.k.n);
        qr      = take(p, ROWS*a.k.n);
        const int64_t n_rot = a.center.pos ? a.center.center.n_rot : 0;
        qc      = take(p, a.center.pos ? ROWS*TQ_CENTER_QUERY_SIZE(n_rot) : 0);
        turned  = take(p, ROWS*n_rot);
        angles  = take(p, n_rot*CELLS);
        qn      = (tq_tile_numbers *) take(p, a.k.tiles ? a.k.n_blocks()*a.k.n_parts*n_numbers : 0);
        pn      = (tq_tile_numbers *) take(p, n_numbers);
        scores  = take(p, ROWS*CELLS);
        bias    = take(p, ROWS*CELLS);
        rows    = take(p, CELLS*std::max(a.k.n, a.v.n));
        columns = take(p, a.k.n*CELLS);
        out     = take(p, ROWS*a.n_out);
        size    = p - base;
    }
};

static inline float max_magnitude(const float * x, int64_t n) { // not finite where one is not
    float max = 0.0f;
    bool  finite = true;
    for (int64_t i = 0; i < n; ++i) {
        const float a = fabsf(x[i]);
        max     = a > max ? a : max;
        finite &= a <= FLT_MAX;
    }
    return finite ? max : NAN;
}

static inline float max_of_cells(const float * x) { // 16 maxima at a time, so that the loop vectorizes
    float m[16];
    memcpy(m, x, sizeof(m));
    for (int64_t i = 16; i < CELLS; i += 16) {
        for (int l = 0; l < 16; ++l) {
            m[l] = x[i + l] > m[l] ? x[i + l] : m[l];
        }
    }
    for (int h = 8; h > 0; h /= 2) {
        for (int l = 0; l < h; ++l) {
            m[l] = m[l + h] > m[l] ? m[l + h] : m[l];
        }
    }
    return m[0];
}

struct unit {
    const op & a;
    scratch    s;
    int64_t    stream, group, row0, n_rows, cell0, cell1;
    float      max[ROWS];
    float      sum[ROWS];
    float      slope[ROWS];
    const ggml_fp16_t * mask[ROWS];
    tq_center_query     qc[ROWS];
    bool       used[CELLS]; // by a row

    unit(const op & a, float * base) : a(a), s(a, base) {
        const tq_center & c = a.center.center;
        for (int64_t j = 0; a.center.pos && j < CELLS; ++j) {
            for (int64_t i = 0; i < c.n_rot; ++i) {
                s.angles[i*CELLS + j] = c.table[j*c.n_rot + i];
            }
        }
    }

    int64_t token_of(int64_t r) const { return (row0 + r)/a.group; }
    int64_t head_of (int64_t r) const { return group*a.group + (row0 + r)%a.group; }
    int64_t k_head() const { return group*a.group/(a.n_head/a.k.t->ne[2]); }
    int64_t v_head() const { return group*a.group/(a.n_head/a.v.t->ne[2]); }

    const float * center() const { return a.center.of_head(k_head()); }

    void start(int64_t index) {
        group = index % a.n_group;
        index /= a.n_group;
        row0   = index % a.n_row_tile*ROWS;
        n_rows = std::min(ROWS, a.n_row - row0);
        index /= a.n_row_tile;
        cell0  = index % a.n_range*a.range;
        cell1  = std::min(cell0 + a.range, a.n_kv);
        stream = index/a.n_range;

        for (int64_t r = 0; r < n_rows; ++r) {
            const int64_t token = token_of(r);
            const int64_t head  = head_of(r);
            max  [r] = -INFINITY;
            sum  [r] = 0.0f;
            slope[r] = a.slope(head);
            const ggml_tensor * m = a.mask;
            mask [r] = m ? (const ggml_fp16_t *) ((const char *) m->data + token*m->nb[1] + head%m->ne[2]*m->nb[2] + stream%m->ne[3]*m->nb[3]) : nullptr;
            memcpy(s.q + r*a.k.n, (const char *) a.q->data + token*a.q->nb[1] + head*a.q->nb[2] + stream*a.q->nb[3], a.k.n*sizeof(float));
        }
        memset(s.out, 0, n_rows*a.n_out*sizeof(float));
        if (a.k.ours) {
            memcpy(s.qr, s.q, n_rows*a.k.n*sizeof(float));
            for (int64_t r = 0; a.center.pos && r < n_rows; ++r) {
                ggml_vec_mul_f32(a.k.n, s.qr + r*a.k.n, s.qr + r*a.k.n, a.center.inverse(k_head()));
            }
            tq_rotate(ggml_tq_params(), s.qr, s.qr, n_rows*a.k.n);
        }
        if (a.k.tiles) {
            for (int part = 0; part < a.k.n_parts; ++part) {
                const float * x = s.qr;
                if (part == 1) {
                    tq_sketch(ggml_tq_params(), s.qr, s.rows, n_rows*a.k.n); // ROWS is at most CELLS
                    x = s.rows;
                }
                for (int64_t r = 0; r < n_rows; ++r) {
                    for (int64_t b = 0; b < a.k.n_blocks(); ++b) {
                        const float * xb = x + r*a.k.n + b*TQ_BLOCK_SIZE;
                        tq_tile_split(xb, nullptr, max_magnitude(xb, TQ_BLOCK_SIZE), s.qn + (b*a.k.n_parts + part)*ROWS + r);
                    }
                }
            }
        }
        for (int64_t r = 0; a.center.pos && r < n_rows; ++r) {
            qc[r] = tq_center_query_init(&a.center.center, center(), s.q + r*a.k.n, s.qc + r*TQ_CENTER_QUERY_SIZE(a.center.center.n_rot));
        }
    }

    // bias and used; false if no row sees a cell of the tile
    bool read_mask(int64_t cell, int64_t n_cells) {
        if (!a.mask) {
            memset(s.bias, 0, n_rows*CELLS*sizeof(float));
        }
        float seen[CELLS];
        std::fill_n(seen, CELLS, -INFINITY);
        for (int64_t r = 0; r < n_rows; ++r) {
            float * b = s.bias + r*CELLS;
            if (a.mask && r > 0 && mask[r] == mask[r - 1] && slope[r] == slope[r - 1]) {
                memcpy(b, b - CELLS, CELLS*sizeof(float));
                continue;
            }
            if (a.mask) {
                ggml_cpu_fp16_to_fp32(mask[r] + cell, b, n_cells);
                for (int64_t i = 0; i < n_cells; ++i) {
                    b[i] *= slope[r];
                }
            }
            std::fill(b + n_cells, b + CELLS, -INFINITY);
            for (int64_t i = 0; i < CELLS; ++i) {
                seen[i] = b[i] > seen[i] ? b[i] : seen[i];
            }
        }
        bool any = false;
        for (int64_t i = 0; i < CELLS; ++i) {
            used[i] = seen[i] != -INFINITY;
            any    |= used[i];
        }
        return any;
    }

    void score(int64_t cell, int64_t n_cells) {
        memset(s.scores, 0, n_rows*CELLS*sizeof(float));
        if (a.k.tiles) {
            uint8_t bytes[2][TQ_TILE_SIZE];
            float   d[CELLS];
            for (int64_t b = 0; b < a.k.n_blocks(); ++b) {
                tq_tile_unpack(&a.k.type, false, a.k.row(cell, k_head(), stream) + b*a.k.block_size, a.k.t->nb[1], n_cells, bytes, d);
                for (int part = 0; part < a.k.n_parts; ++part) {
                    tq_tile_multiply(&a.k.type, part, bytes[part], s.qn + (b*a.k.n_parts + part)*ROWS, 1, n_rows, d, s.scores, CELLS);
                }
            }
        } else {
            const float * q = a.k.ours ? s.qr : s.q;
            for (int64_t i = 0; i < CELLS; ++i) {
                if (used[i]) {
                    a.k.read(a.k.row(cell + i, k_head(), stream), s.rows + i*a.k.n);
                } else {
                    memset(s.rows + i*a.k.n, 0, a.k.n*sizeof(float));
                }
            }
            if (n_rows <= FEW_ROWS) {
                for (int64_t r = 0; r < n_rows; ++r) {
                    for (int64_t i = 0; i < n_cells; ++i) {
                        ggml_vec_dot_f32(a.k.n, s.scores + r*CELLS + i, 0, s.rows + i*a.k.n, 0, q + r*a.k.n, 0, 1);
                    }
                }
            } else {
                for (int64_t i = 0; i < CELLS; ++i) {
                    for (int64_t d = 0; d < a.k.n; ++d) {
                        s.columns[d*CELLS + i] = s.rows[i*a.k.n + d];
                    }
                }
                simd_gemm(s.scores, q, s.columns, n_rows, a.k.n, CELLS);
            }
        }
        if (a.center.pos) {
            score_centers(cell, n_cells);
        }
    }

    // what centering took from the keys
    void score_centers(int64_t cell, int64_t n_cells) {
        const tq_center & c = a.center.center;
        const int32_t * pos = (const int32_t *) ((const char *) a.center.pos->data + stream*a.center.pos->nb[1]) + cell;
        int64_t first = 0; // used cell
        while (!used[first]) {
            first++;
        }
        const int64_t start = pos[first] - first; // the position of the tile's first cell, if they are in order
        bool in_order = start >= 0 && start + CELLS <= 1 << 24;
        for (int64_t i = first; i < n_cells; ++i) {
            in_order &= !used[i] || pos[i] == start + i;
        }
        if (in_order) {
            for (int64_t r = 0; r < n_rows; ++r) {
                tq_center_turn(&c, &qc[r], (int32_t) start, s.turned + r*c.n_rot);
                for (int64_t i = 0; i < CELLS; ++i) {
                    s.scores[r*CELLS + i] += qc[r].w[2*c.n_rot];
                }
            }
            simd_gemm(s.scores, s.turned, s.angles, n_rows, c.n_rot, CELLS);
            return;
        }
        for (int64_t r = 0; r < n_rows; ++r) {
            for (int64_t i = 0; i < n_cells; ++i) {
                if (s.bias[r*CELLS + i] != -INFINITY) {
                    s.scores[r*CELLS + i] += tq_center_score(&c, &qc[r], pos[i]);
                }
            }
        }
    }

    // scores become weights; peak[r] is a row's largest
    void soft_max(float * peak) {
        for (int64_t r = 0; r < n_rows; ++r) {
            float       * p = s.scores + r*CELLS;
            const float * b = s.bias   + r*CELLS;
            if (a.softcap != 0.0f) {
                for (int64_t i = 0; i < CELLS; ++i) {
                    p[i] = a.softcap*tanhf(p[i]*a.scale);
                }
            } else {
                for (int64_t i = 0; i < CELLS; ++i) {
                    p[i] *= a.scale;
                }
            }
            for (int64_t i = 0; i < CELLS; ++i) {
                p[i] = b[i] == -INFINITY ? -INFINITY : p[i] + b[i];
            }
            const float tile_max = max_of_cells(p);
            if (tile_max == -INFINITY) {
                memset(p, 0, CELLS*sizeof(float));
                peak[r] = 0.0f;
                continue;
            }
            if (tile_max > max[r]) {
                const float f = expf(max[r] - tile_max);
                ggml_vec_scale_f32(a.n_out, s.out + r*a.n_out, f);
                sum[r] *= f;
                max[r]  = tile_max;
            }
            sum [r] += (float) ggml_vec_soft_max_f32(CELLS, p, p, max[r]);
            peak[r]  = expf(tile_max - max[r]);
        }
    }

    void add_values(int64_t cell, int64_t n_cells, const float * peak) {
        if (!a.v.tiles) {
            for (int64_t i = 0; i < CELLS; ++i) {
                if (used[i]) {
                    a.v.read(a.v.row(cell + i, v_head(), stream), s.rows + i*a.v.n);
                } else {
                    memset(s.rows + i*a.v.n, 0, a.v.n*sizeof(float));
                }
            }
            simd_gemm(s.out, s.scores, s.rows, n_rows, CELLS, a.v.n);
            return;
        }
        uint8_t bytes[2][TQ_TILE_SIZE];
        float   d[CELLS];
        for (int64_t b = 0; b < a.v.n_blocks(); ++b) {
            tq_tile_unpack(&a.v.type, true, a.v.row(cell, v_head(), stream) + b*a.v.block_size, a.v.t->nb[1], n_cells, bytes, d);
            float * out = s.out + b*TQ_BLOCK_SIZE;
            for (int64_t i = 0; i < n_cells; ++i) {
                if (!(fabsf(d[i]) <= FLT_MAX)) { // damaged: seen by those that look at it
                    d[i] = 0.0f;
                    for (int64_t r = 0; r < n_rows; ++r) {
                        if (s.scores[r*CELLS + i] != 0.0f) {
                            std::fill_n(out + r*a.n_out, TQ_BLOCK_SIZE, NAN);
                        }
                    }
                }
            }
            const float d_max = max_magnitude(d, CELLS);
            for (int64_t r = 0; r < n_rows; ++r) {
                tq_tile_split(s.scores + r*CELLS, d, peak[r]*d_max, s.pn + r);
            }
            for (int part = 0; part < a.v.n_parts; ++part) {
                tq_tile_multiply(&a.v.type, part, bytes[part], s.pn, 1, n_rows, nullptr, out + part*a.v.n, a.n_out);
            }
        }
    }

    void compute() {
        for (int64_t cell = cell0; cell < cell1; cell += CELLS) {
            const int64_t n_cells = std::min(CELLS, cell1 - cell);
            if (read_mask(cell, n_cells)) {
                float peak[ROWS];
                score(cell, n_cells);
                soft_max(peak);
                add_values(cell, n_cells, peak);
            }
        }
    }
};

// a row's result from all of its cells; out is overwritten
static inline void finish(const op & a, int64_t stream, int64_t token, int64_t head, float max, float sum, float * out) {
    float f = 1.0f;
    if (a.sinks) {
        const float sink = ((const float *) a.sinks->data)[head];
        const float m    = std::max(max, sink);
        f    = expf(max - m);
        sum  = sum*f + expf(sink - m);
    }
    ggml_vec_scale_f32(a.n_out, out, sum == 0.0f ? 0.0f : f/sum);
    float * dst = (float *) a.dst->data + ((stream*a.n_token + token)*a.n_head + head)*a.v.n;
    if (!a.v.ours) {
        memcpy(dst, out, a.v.n*sizeof(float));
        return;
    }
    if (a.v.tiles) {
        for (int64_t i = 0; i < a.n_out; i += TQ_BLOCK_SIZE) {
            float x[TQ_BLOCK_SIZE];
            for (int l = 0; l < TQ_BLOCK_SIZE; ++l) {
                x[tq_tile_coordinate(l)] = out[i + l];
            }
            memcpy(out + i, x, sizeof(x));
        }
        if (a.v.n_parts == 2) {
            tq_unsketch(ggml_tq_params(), out + a.v.n, out + a.v.n, a.v.n);
            ggml_vec_acc_f32(a.v.n, out, out + a.v.n);
        }
    }
    tq_unrotate(ggml_tq_params(), out, dst, a.v.n);
}

// the ranges of a row, combined
static inline void combine(const op & a, const float * partials, int64_t index, float * out) {
    const int64_t group  = index % a.n_group;
    const int64_t row    = index/a.n_group % a.n_row;
    const int64_t stream = index/a.n_group/a.n_row;
    const auto partial = [&](int64_t i) {
        const int64_t unit = ((stream*a.n_range + i)*a.n_row_tile + row/ROWS)*a.n_group + group;
        return partials + (unit*ROWS + row%ROWS)*a.row_size();
    };
    float max = -INFINITY;
    for (int64_t i = 0; i < a.n_range; ++i) {
        max = std::max(max, partial(i)[0]);
    }
    float sum = 0.0f;
    memset(out, 0, a.n_out*sizeof(float));
    for (int64_t i = 0; i < a.n_range; ++i) {
        const float * p = partial(i);
        if (p[0] != -INFINITY) {
            const float f = expf(p[0] - max);
            sum += f*p[1];
            ggml_vec_mad_f32(a.n_out, out, p + 2, f);
        }
    }
    finish(a, stream, row/a.group, group*a.group + row%a.group, max, sum, out);
}

} // namespace ggml_tq_attention

extern "C" size_t ggml_tq_flash_attn_work_size(const ggml_tensor * dst, int n_threads) {
    if (!ggml_tq_attends(dst)) {
        return 0;
    }
    size_t size = 0;
    for (const bool use_ref : { false, true }) {
        const ggml_tq_attention::op a(dst, use_ref);
        const int64_t n_partial = a.n_range > 1 ? a.n_unit*ggml_tq_attention::ROWS*a.row_size() : 0;
        size = std::max(size, sizeof(float)*(n_threads*ggml_tq_attention::scratch(a, nullptr).size + n_partial));
    }
    return size;
}

static inline void ggml_tq_flash_attn(const ggml_compute_params * params, const ggml_tensor * dst) {
    using namespace ggml_tq_attention;
    const op a(dst, params->use_ref);
    a.check();
    const int ith = params->ith;
    const int nth = params->nth;
    const int64_t n_scratch = scratch(a, nullptr).size;
    float * base     = (float *) params->wdata + ith*n_scratch;
    float * partials = (float *) params->wdata + nth*n_scratch;

    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);
    unit u(a, base);
    for (int64_t i = ith; i < a.n_unit; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        u.start(i);
        u.compute();
        for (int64_t r = 0; r < u.n_rows; ++r) {
            float * out = u.s.out + r*a.n_out;
            if (a.n_range == 1) {
                finish(a, u.stream, u.token_of(r), u.head_of(r), u.max[r], u.sum[r], out);
                continue;
            }
            float * p = partials + (i*ROWS + r)*a.row_size();
            p[0] = u.max[r];
            p[1] = u.sum[r];
            memcpy(p + 2, out, a.n_out*sizeof(float));
        }
    }
    if (a.n_range > 1) {
        ggml_barrier(params->threadpool);
        for (int64_t i = ith; i < a.n_stream*a.n_row*a.n_group; i += nth) {
            combine(a, partials, i, base);
        }
    }
}
