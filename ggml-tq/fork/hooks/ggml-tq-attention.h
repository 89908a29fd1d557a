#pragma once

// FLASH_ATTN_EXT on the CPU where keys or values are of the cache types. C++, for ggml-cpu/ops.cpp alone, whose vector
// functions it uses.
//
// The query heads that share a key and a value head, and up to ROWS of their queries ("rows"), go through the cells in
// ranges of RANGE, and through a range in tiles of CELLS. Each tile is unpacked once for all rows, in the rotated basis. A
// range has its own maximum, weights and sums of values; ranges are folded in order, and the sums turned back at the end.
//
// A row's result depends on its query and the cells that it sees, to the bit: not on the other rows of the batch, on the number of
// threads, on how far the cache is read, nor, within a range, on where its cells are. The codes of the next layer depend on the last bit,
// so that texts would differ between a server's slots otherwise. Hence scores and sums of values are products of integers
// (tq_tile_multiply), exact in any order; queries are rounded by themselves, weights by the range's largest; and floats, for
// the other side's types and for use_ref, are summed up in the order of cells and coordinates, always by simd_gemm.

#include "ggml-tq-ops.h"
#include "ggml-cpu-impl.h"
#include "simd-gemm.h"
#include "vec.h"

#include <cfloat>
#include <cmath>

namespace ggml_tq_attention {

constexpr int64_t ROWS         = 64;
constexpr int64_t CELLS        = TQ_BLOCK_SIZE;
constexpr int64_t RANGE        = 512;             // cells; 512 weights of 15 bits and levels of 8 fit a sum of 32
constexpr int64_t MAX_PARTIALS = 8 << 20;         // floats, of ranges that threads share

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
    bool         tiles; // of integers
    tq_tile_type type;
    int64_t      n_parts;
    size_t       block_size = 0;

    side(const ggml_tensor * t, bool use_ref) :
        t(t), n(t->ne[0]), ours(ggml_tq_is_type(t->type)), tiles(ours && !use_ref), type(), n_parts(1) {
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
    int64_t n_group, n_row, n_row_tile, n_base, n_range;
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
        n_base     = n_stream*n_row_tile*n_group;
        n_range    = div_up(n_kv, RANGE);
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

    int64_t row_size() const { return 2 + n_out; } // of a result: maximum, sum of weights, sums of values

    // units of work are ranges: n_base units would not keep the threads busy. Fewer threads than planned need no more memory.
    bool split(int n_threads) const {
        return n_range > 1 && n_base < 4*n_threads && n_partials() <= MAX_PARTIALS;
    }
    int64_t n_partials() const { return n_base*n_range*std::min(ROWS, n_row)*row_size(); }

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
    tq_tile_numbers * qn; // [k.n_blocks][k.n_parts][ROWS]
    float * qs;      // [k.n_blocks][k.n_parts][ROWS], their units
    tq_tile_numbers * pn; // [RANGE/CELLS][ROWS]
    int32_t * sums;  // [2][ROWS][TQ_BLOCK_SIZE]
    float * tile;    // [ROWS][CELLS]
    float * bias;    // [ROWS][CELLS]
    float * weights; // [ROWS][RANGE], scores before
    float * rows;    // [CELLS][k.n or v.n]
    float * floats;  // [ROWS][v.n], sums of values that are not integers
    float * columns; // [k.n][CELLS]
    float * part;    // [ROWS][row_size], of a range
    float * total;   // [ROWS][row_size]
    int64_t size;    // floats

    scratch(const op & a, float * base) {
        float * p = base;
        const int64_t n_numbers = ROWS*(int64_t) sizeof(tq_tile_numbers)/(int64_t) sizeof(float);
        const int64_t n_keys    = a.k.tiles ? a.k.n_blocks()*a.k.n_parts : 0;
        q       = take(p, ROWS*a.k.n);
        qr      = take(p, ROWS*a.k.n);
        qc      = take(p, a.center.pos ? ROWS*TQ_CENTER_QUERY_SIZE(a.center.center.n_rot) : 0);
        qn      = (tq_tile_numbers *) take(p, n_keys*n_numbers);
        qs      = take(p, n_keys*ROWS);
        pn      = (tq_tile_numbers *) take(p, RANGE/CELLS*n_numbers);
        sums    = (int32_t *) take(p, 2*ROWS*TQ_BLOCK_SIZE);
        tile    = take(p, ROWS*CELLS);
        bias    = take(p, ROWS*CELLS);
        weights = take(p, ROWS*RANGE);
        rows    = take(p, CELLS*std::max(a.k.n, a.v.n));
        floats  = take(p, ROWS*a.v.n);
        columns = take(p, a.k.n*CELLS);
        part    = take(p, ROWS*a.row_size());
        total   = take(p, ROWS*a.row_size());
        size    = p - base;
    }
};

// a float as an integer of the same order, and back: maxima of integers vectorize
static inline int32_t order_of(float x) {
    int32_t i;
    memcpy(&i, &x, sizeof(i));
    return i ^ (i >> 31 & 0x7fffffff);
}

static inline float of_order(int32_t i) {
    i ^= i >> 31 & 0x7fffffff;
    float x;
    memcpy(&x, &i, sizeof(x));
    return x;
}

// the largest value(i) of n, none of them NaN
template <typename F> static inline float max_of(int64_t n, F value) {
    int32_t max = INT32_MIN;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t x = order_of(value(i));
        max = x > max ? x : max;
    }
    return of_order(max);
}

static inline bool all_below(int64_t n, const float * x, float bound) { // false where one is not a number
    int n_bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        n_bad += !(x[i] <= bound);
    }
    return n_bad == 0;
}

static inline float max_magnitude(int64_t n, const float * x) { // not finite where one is not
    float a[TQ_BLOCK_SIZE];
    float max = 0.0f;
    for (int64_t i = 0; i < n; i += TQ_BLOCK_SIZE) {
        for (int l = 0; l < TQ_BLOCK_SIZE; ++l) {
            a[l] = fabsf(x[i + l]);
        }
        if (!all_below(TQ_BLOCK_SIZE, a, FLT_MAX)) {
            return NAN;
        }
        max = std::max(max, max_of(TQ_BLOCK_SIZE, [&](int64_t l) { return a[l]; }));
    }
    return max;
}

// of n weights up to 1, n a multiple of 16 up to RANGE; integers, so that masked cells and the order do not matter
static inline float sum_of_weights(int64_t n, const float * w) {
    int32_t s[16] = { 0 };
    for (int64_t i = 0; i < n; i += 16) {
        for (int l = 0; l < 16; ++l) {
            s[l] += (int32_t) (w[i + l]*(1 << 25));
        }
    }
    int64_t sum = 0;
    for (int l = 0; l < 16; ++l) {
        sum += s[l];
    }
    return (float) sum/(1 << 25);
}

// rows of row_size; a range's result joins the total of those before it
static void fold(const op & a, float * total, const float * part) {
    if (part[0] == -INFINITY) {
        return;
    }
    const float max = std::max(total[0], part[0]);
    const float f = expf(total[0] - max);
    const float g = expf(part[0]  - max);
    total[0] = max;
    for (int64_t i = 1; i < a.row_size(); ++i) {
        total[i] = total[i]*f + part[i]*g;
    }
}

static inline void clear(const op & a, float * row) {
    row[0] = -INFINITY;
    memset(row + 1, 0, (a.row_size() - 1)*sizeof(float));
}

struct unit {
    const op & a;
    scratch    s;
    int64_t    base = -1;
    int64_t    stream, group, row0, n_rows;
    float      slope[ROWS];
    const ggml_fp16_t * mask[ROWS];
    const float *       bias[ROWS];  // of a tile
    tq_center_query     qc[ROWS];
    // of a range
    bool       used[RANGE];          // by a row
    int64_t    slots[RANGE/CELLS];   // first cells of the tiles that are used
    int64_t    n_slots, cell1;
    bool       damaged[ROWS];

    unit(const op & a, float * base) : a(a), s(a, base) {}

    int64_t token_of(int64_t r) const { return (row0 + r)/a.group; }
    int64_t head_of (int64_t r) const { return group*a.group + (row0 + r)%a.group; }
    int64_t k_head() const { return group*a.group/(a.n_head/a.k.t->ne[2]); }
    int64_t v_head() const { return group*a.group/(a.n_head/a.v.t->ne[2]); }
    int64_t n_cells(int64_t cell) const { return std::min(CELLS, cell1 - cell); }

    void start(int64_t index) {
        if (index == base) {
            return;
        }
        base   = index;
        group  = index % a.n_group;
        index /= a.n_group;
        row0   = index % a.n_row_tile*ROWS;
        n_rows = std::min(ROWS, a.n_row - row0);
        stream = index/a.n_row_tile;

        for (int64_t r = 0; r < n_rows; ++r) {
            const int64_t token = token_of(r);
            const int64_t head  = head_of(r);
            slope[r] = a.slope(head);
            const ggml_tensor * m = a.mask;
            mask [r] = m ? (const ggml_fp16_t *) ((const char *) m->data + token*m->nb[1] + head%m->ne[2]*m->nb[2] + stream%m->ne[3]*m->nb[3]) : nullptr;
            memcpy(s.q + r*a.k.n, (const char *) a.q->data + token*a.q->nb[1] + head*a.q->nb[2] + stream*a.q->nb[3], a.k.n*sizeof(float));
        }
        if (a.k.ours) {
            memcpy(s.qr, s.q, n_rows*a.k.n*sizeof(float));
            for (int64_t r = 0; a.center.pos && r < n_rows; ++r) {
                ggml_vec_mul_f32(a.k.n, s.qr + r*a.k.n, s.qr + r*a.k.n, a.center.inverse(k_head()));
            }
            tq_rotate(ggml_tq_params(), s.qr, s.qr, n_rows*a.k.n);
        }
        for (int part = 0; a.k.tiles && part < a.k.n_parts; ++part) {
            const float * x = s.qr;
            if (part == 1) {
                tq_sketch(ggml_tq_params(), s.qr, s.rows, n_rows*a.k.n); // ROWS is at most CELLS
                x = s.rows;
            }
            for (int64_t r = 0; r < n_rows; ++r) {
                for (int64_t b = 0; b < a.k.n_blocks(); ++b) {
                    const float * xb  = x + r*a.k.n + b*TQ_BLOCK_SIZE;
                    const float   max = max_magnitude(TQ_BLOCK_SIZE, xb);
                    const int64_t i   = (b*a.k.n_parts + part)*ROWS + r;
                    tq_tile_split(false, xb, nullptr, max, s.qn + i);
                    s.qs[i] = tq_tile_number_scale(max)*a.k.type.unit[part];
                }
            }
        }
        for (int64_t r = 0; a.center.pos && r < n_rows; ++r) {
            qc[r] = tq_center_query_init(&a.center.center, a.center.of_head(k_head()), a.center.at(k_head(), 0), s.q + r*a.k.n,
                s.qc + r*TQ_CENTER_QUERY_SIZE(a.center.center.n_rot));
        }
    }

    // bias and used[CELLS]; false if no row sees a cell of the tile
    bool read_mask(int64_t cell, bool * used) {
        int32_t seen[CELLS] = { 0 };
        for (int64_t r = 0; r < n_rows; ++r) {
            if (r > 0 && mask[r] == mask[r - 1] && slope[r] == slope[r - 1]) {
                bias[r] = bias[r - 1];
                continue;
            }
            float * b = s.bias + r*CELLS;
            bias[r] = b;
            if (a.mask) {
                const float f = slope[r];
                ggml_cpu_fp16_to_fp32(mask[r] + cell, b, n_cells(cell));
                for (int64_t i = 0; i < CELLS; ++i) {
                    b[i] *= f;
                }
            } else {
                std::fill_n(b, CELLS, 0.0f);
            }
            std::fill(b + n_cells(cell), b + CELLS, -INFINITY);
            for (int64_t i = 0; i < CELLS; ++i) {
                seen[i] |= b[i] != -INFINITY;
            }
        }
        int32_t any = 0;
        for (int64_t i = 0; i < CELLS; ++i) {
            used[i] = seen[i] != 0;
            any    |= seen[i];
        }
        return any != 0;
    }

    void score(int64_t slot) {
        const int64_t cell = slots[slot];
        const bool *  used = this->used + slot*CELLS;
        memset(s.tile, 0, n_rows*CELLS*sizeof(float));
        if (a.v.tiles) {
            tq_tile_prefetch(a.v.row(cell, v_head(), stream), a.v.t->nb[1], (int) n_cells(cell), a.v.n_blocks()*a.v.block_size);
        }
        if (a.k.tiles) {
            alignas(64) int8_t bytes[2][TQ_TILE_SIZE];
            float  d[CELLS];
            for (int64_t b = 0; b < a.k.n_blocks(); ++b) {
                const char * first = a.k.row(cell, k_head(), stream) + b*a.k.block_size;
                tq_tile_unpack(&a.k.type, false, first, a.k.t->nb[1], (int) n_cells(cell), bytes);
                tq_tile_scales(first, a.k.t->nb[1], (int) n_cells(cell), d);
                for (int64_t part = 0; part < a.k.n_parts; ++part) {
                    const int64_t i0 = (b*a.k.n_parts + part)*ROWS;
                    for (int64_t r0 = 0; r0 < n_rows; r0 += 12) { // few, so that their sums stay near
                        const int64_t n = std::min((int64_t) 12, n_rows - r0);
                        memset(s.sums, 0, n*CELLS*sizeof(int32_t));
                        tq_tile_multiply(bytes[part], s.qn + i0 + r0, (int) n, s.sums, CELLS);
                        for (int64_t r = 0; r < n; ++r) {
                            const float f = s.qs[i0 + r0 + r];
                            float *     t = s.tile + (r0 + r)*CELLS;
                            for (int64_t i = 0; i < CELLS; ++i) {
                                t[i] += f*d[i]*(float) s.sums[r*CELLS + i];
                            }
                        }
                    }
                }
            }
        } else {
            read_rows(a.k, k_head(), cell, used);
            for (int64_t i = 0; i < CELLS; ++i) {
                for (int64_t l = 0; l < a.k.n; ++l) {
                    s.columns[l*CELLS + i] = s.rows[i*a.k.n + l];
                }
            }
            simd_gemm(s.tile, a.k.ours ? s.qr : s.q, s.columns, n_rows, a.k.n, CELLS);
        }
        if (a.center.pos) { // what centering took from the keys
            tq_center_cells cells;
            tq_center_cells_init(&cells, (const int32_t *) ((const char *) a.center.pos->data + stream*a.center.pos->nb[1]) + cell, used);
            tq_center_scores(&a.center.center, qc, (int) n_rows, &cells, s.tile, CELLS);
        }
        const int32_t hidden = (int32_t) 0xff800000; // -INFINITY
        for (int64_t r = 0; r < n_rows; ++r) {
            const float * x = s.tile + r*CELLS;
            const float * b = bias[r];
            float       * p = s.weights + r*RANGE + slot*CELLS;
            const float scale = a.scale;
            if (a.softcap != 0.0f) {
                for (int64_t i = 0; i < CELLS; ++i) {
                    p[i] = b[i] == -INFINITY ? -INFINITY : a.softcap*tanhf(x[i]*a.scale) + b[i];
                }
            } else {
                float y[CELLS];
                for (int64_t i = 0; i < CELLS; ++i) {
                    y[i] = x[i]*scale + b[i];
                }
                for (int64_t i = 0; i < CELLS; ++i) { // whatever y is; as integers, which vectorizes
                    int32_t u, v;
                    memcpy(&u, y + i, sizeof(u));
                    memcpy(&v, b + i, sizeof(v));
                    u = v == hidden ? v : u;
                    memcpy(p + i, &u, sizeof(u));
                }
            }
        }
    }

    // rows of used cells as floats, zeros for the others
    void read_rows(const side & side, int64_t head, int64_t cell, const bool * used) {
        for (int64_t i = 0; i < CELLS; ++i) {
            if (used[i]) {
                side.read(side.row(cell + i, head, stream), s.rows + i*side.n);
            } else {
                memset(s.rows + i*side.n, 0, side.n*sizeof(float));
            }
        }
    }

    // scores of the range become weights
    void soft_max() {
        const int64_t n = n_slots*CELLS;
        for (int64_t r = 0; r < n_rows; ++r) {
            float * p    = s.weights + r*RANGE;
            float * part = s.part + r*a.row_size();
            damaged[r] = !all_below(n, p, FLT_MAX);
            const float max = max_of(n, [&](int64_t i) { return p[i]; });
            if (damaged[r] || max == -INFINITY) {
                memset(p, 0, n*sizeof(float));
                part[0] = damaged[r] ? 0.0f : -INFINITY;
                continue;
            }
            ggml_vec_soft_max_f32((int) n, p, p, max);
            part[0] = max;
            part[1] = sum_of_weights(n, p);
        }
    }

    void add_values() {
        if (a.v.tiles) {
            for (int64_t b = 0; b < a.v.n_blocks(); ++b) {
                add_value_blocks(b);
            }
        } else {
            memset(s.floats, 0, n_rows*a.v.n*sizeof(float));
            for (int64_t slot = 0; slot < n_slots; ++slot) {
                for (int64_t r = 0; r < n_rows; ++r) {
                    memcpy(s.tile + r*CELLS, s.weights + r*RANGE + slot*CELLS, CELLS*sizeof(float));
                }
                read_rows(a.v, v_head(), slots[slot], used + slot*CELLS);
                simd_gemm(s.floats, s.tile, s.rows, n_rows, CELLS, a.v.n);
            }
            for (int64_t r = 0; r < n_rows; ++r) {
                memcpy(s.part + r*a.row_size() + 2, s.floats + r*a.v.n, a.v.n*sizeof(float));
            }
        }
        for (int64_t r = 0; r < n_rows; ++r) {
            if (damaged[r]) {
                std::fill_n(s.part + r*a.row_size() + 1, a.row_size() - 1, NAN);
            }
        }
    }

    // of one block of coordinates
    void add_value_blocks(int64_t b) {
        const auto first = [&](int64_t slot) { return a.v.row(slots[slot], v_head(), stream) + b*a.v.block_size; };
        const int64_t n = n_slots*CELLS;
        float d  [RANGE];
        float max[ROWS];
        for (int64_t slot = 0; slot < n_slots; ++slot) {
            tq_tile_scales(first(slot), a.v.t->nb[1], (int) n_cells(slots[slot]), d + slot*CELLS);
        }
        if (!all_below(n, d, FLT_MAX)) { // damaged: seen by those that look at it
            for (int64_t i = 0; i < n; ++i) {
                for (int64_t r = 0; r < n_rows && !(d[i] <= FLT_MAX); ++r) {
                    damaged[r] |= s.weights[r*RANGE + i] != 0.0f;
                }
                d[i] = d[i] <= FLT_MAX ? d[i] : 0.0f;
            }
        }
        for (int64_t r = 0; r < n_rows; ++r) {
            const float * w = s.weights + r*RANGE;
            max[r] = max_of(n, [&](int64_t i) { return fabsf(w[i]*d[i]); });
            for (int64_t slot = 0; slot < n_slots; ++slot) {
                tq_tile_split(true, w + slot*CELLS, d + slot*CELLS, max[r], s.pn + slot*ROWS + r);
            }
        }
        alignas(64) int8_t bytes[2][TQ_TILE_SIZE];
        for (int64_t part = 0; part < a.v.n_parts; ++part) {
            memset(s.sums + part*ROWS*TQ_BLOCK_SIZE, 0, n_rows*TQ_BLOCK_SIZE*sizeof(int32_t));
        }
        for (int64_t slot = 0; slot < n_slots; ++slot) {
            tq_tile_unpack(&a.v.type, true, first(slot), a.v.t->nb[1], (int) n_cells(slots[slot]), bytes);
            for (int64_t part = 0; part < a.v.n_parts; ++part) {
                tq_tile_multiply(bytes[part], s.pn + slot*ROWS, (int) n_rows, s.sums + part*ROWS*TQ_BLOCK_SIZE, TQ_BLOCK_SIZE);
            }
        }
        for (int64_t part = 0; part < a.v.n_parts; ++part) {
            for (int64_t r = 0; r < n_rows; ++r) {
                const int32_t * sums = s.sums + (part*ROWS + r)*TQ_BLOCK_SIZE;
                const float     unit = a.v.type.unit[part]*tq_tile_number_scale(max[r]);
                float * out = s.part + r*a.row_size() + 2 + part*a.v.n + b*TQ_BLOCK_SIZE;
                for (int l = 0; l < TQ_BLOCK_SIZE; ++l) {
                    out[l] = unit*(float) sums[l];
                }
            }
        }
    }

    // s.part of a range
    void compute(int64_t range) {
        const int64_t cell0 = range*RANGE;
        cell1   = std::min(cell0 + RANGE, a.n_kv);
        n_slots = 0;
        for (int64_t r = 0; r < n_rows; ++r) {
            clear(a, s.part + r*a.row_size());
        }
        for (int64_t cell = cell0; cell < cell1; cell += CELLS) {
            if (read_mask(cell, used + n_slots*CELLS)) {
                slots[n_slots] = cell;
                score(n_slots++);
            }
        }
        if (n_slots > 0) {
            soft_max();
            add_values();
        }
    }
};

// a row's output from its total, which is overwritten
static void finish(const op & a, int64_t base, int64_t r, float * total) {
    const int64_t row    = base/a.n_group % a.n_row_tile*ROWS + r;
    const int64_t stream = base/a.n_group/a.n_row_tile;
    const int64_t token  = row/a.group;
    const int64_t head   = base%a.n_group*a.group + row%a.group;
    float   max = total[0];
    float   sum = total[1];
    float * out = total + 2;
    float   f   = 1.0f;
    if (a.sinks) {
        const float sink = ((const float *) a.sinks->data)[head];
        const float m    = std::max(max, sink);
        f   = expf(max - m);
        sum = sum*f + expf(sink - m);
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

} // namespace ggml_tq_attention

extern "C" size_t ggml_tq_flash_attn_work_size(const ggml_tensor * dst, int n_threads) {
    if (!ggml_tq_attends(dst)) {
        return 0;
    }
    size_t size = 0;
    for (const bool use_ref : { false, true }) {
        const ggml_tq_attention::op a(dst, use_ref);
        const int64_t n_partials = a.split(n_threads) ? a.n_partials() : 0;
        size = std::max(size, sizeof(float)*(n_threads*ggml_tq_attention::scratch(a, nullptr).size + n_partials));
    }
    return size;
}

static inline void ggml_tq_flash_attn(const ggml_compute_params * params, const ggml_tensor * dst) {
    using namespace ggml_tq_attention;
    const op a(dst, params->use_ref);
    a.check();
    const int  ith   = params->ith;
    const int  nth   = params->nth;
    const bool split = a.split(nth);
    const int64_t n_scratch = scratch(a, nullptr).size;
    const int64_t n_rows    = std::min(ROWS, a.n_row); // of a base unit at most
    float * partials = (float *) params->wdata + nth*n_scratch; // [n_base][n_range][n_rows][row_size]
    unit u(a, (float *) params->wdata + ith*n_scratch);

    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);
    const int64_t n_unit = split ? a.n_base*a.n_range : a.n_base;
    for (int64_t i = ith; i < n_unit; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        if (split) {
            u.start(i/a.n_range);
            u.compute(i%a.n_range);
            memcpy(partials + i*n_rows*a.row_size(), u.s.part, u.n_rows*a.row_size()*sizeof(float));
            continue;
        }
        u.start(i);
        for (int64_t r = 0; r < u.n_rows; ++r) {
            clear(a, u.s.total + r*a.row_size());
        }
        for (int64_t range = 0; range < a.n_range; ++range) {
            u.compute(range);
            for (int64_t r = 0; r < u.n_rows; ++r) {
                fold(a, u.s.total + r*a.row_size(), u.s.part + r*a.row_size());
            }
        }
        for (int64_t r = 0; r < u.n_rows; ++r) {
            finish(a, i, r, u.s.total + r*a.row_size());
        }
    }
    if (!split) {
        return;
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = ith; i < a.n_base*n_rows; i += nth) {
        const int64_t base = i/n_rows;
        const int64_t r    = i%n_rows;
        if (base/a.n_group % a.n_row_tile*ROWS + r < a.n_row) {
            clear(a, u.s.total);
            for (int64_t range = 0; range < a.n_range; ++range) {
                fold(a, u.s.total, partials + ((base*a.n_range + range)*n_rows + r)*a.row_size());
            }
            finish(a, base, r, u.s.total);
        }
    }
}
