// ggml's FLASH_ATTN_EXT over the cache types, against attention computed in double precision on rows that ggml's own
// to_float decodes. Both paths of a real run: one token (decode) and batches (prompt processing). All implementations that the
// machine has must give the same bits.
// usage: test-attention [seed]

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-tq-names.h"
#include "ggml-tq-ops.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <vector>

struct attn_case {
    int       d_k, d_v;       // head dims
    int       n_head, n_head_kv;
    int       n_kv, n_q;
    ggml_type type_k, type_v;
    bool      centered;       // keys have a large component that RoPE turns, stored without it (docs/format.md section 10)
    bool      in_order   = false; // cells are in the order of positions
    int       n_stream   = 1;
    int       n_mask     = 1;     // heads that the mask distinguishes
    bool      scattered  = false; // the mask hides cells at random, and whole tiles
    bool      cache_view = false; // rows of K and V hold all heads, as in llama.cpp
    bool      sinks      = false;
    float     max_bias   = 0.0f;  // ALiBi
    float     softcap    = 0.0f;

    std::string str() const {
        char text[512];
        snprintf(text, sizeof(text), "K %s V %s%s%s, head dims %d/%d, %d/%d heads, %d cached, %d queries, %d streams, %d masks%s%s%s, ALiBi %g, soft-cap %g",
            ggml_type_name(type_k), ggml_type_name(type_v), centered ? ", centered" : "", in_order ? " in order" : "", d_k, d_v,
            n_head, n_head_kv, n_kv, n_q, n_stream, n_mask, scattered ? " scattered" : "", cache_view ? ", cache view" : "",
            sinks ? ", sinks" : "", max_bias, softcap);
        return text;
    }
};

// rows of n values in the given type, and what a reader of that type sees
static std::vector<uint8_t> pack(ggml_type type, std::vector<float> & x, int n) {
    const int64_t n_rows = (int64_t) x.size()/n;
    std::vector<uint8_t> packed(n_rows*ggml_row_size(type, n));
    ggml_quantize_chunk(type, x.data(), packed.data(), 0, n_rows, n, nullptr);
    if (type != GGML_TYPE_F32) {
        ggml_get_type_traits(type)->to_float(packed.data(), x.data(), (int64_t) x.size());
    }
    return packed;
}

struct center_tensors { ggml_tensor * pos = nullptr; ggml_tensor * m = nullptr; ggml_tensor * table = nullptr; };

static center_tensors make_center(ggml_context * ctx, const attn_case & c, std::mt19937_64 & rng) {
    const int n_rot = c.d_k;
    std::vector<double> freqs(n_rot/2);
    for (int i = 0; i < n_rot/2; ++i) {
        freqs[i] = std::pow(1e4, -2.0*i/n_rot);
    }
    center_tensors t;
    t.table = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rot, TQ_CENTER_ROWS);
    t.table->op_params[0] = c.n_kv%4 == 0; // both orders of pairs
    t.table->op_params[1] = n_rot;
    tq_center_make_table(freqs.data(), n_rot, (float *) t.table->data);
    t.m   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.d_k, c.n_head_kv, 4);
    t.pos = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, c.n_kv, c.n_stream);
    std::normal_distribution<float> normal;
    const int64_t n = (int64_t) c.d_k*c.n_head_kv;
    for (int64_t i = 0; i < n; ++i) {
        float * m = (float *) t.m->data + i;
        m[0]   = normal(rng)*20.0f;
        m[n]   = std::exp(0.3f*normal(rng)); // the scale, and its reciprocal
        m[2*n] = 1.0f/m[n];
        m[3*n] = normal(rng)*30.0f; // the center at position 0
    }
    for (int j = 0; j < c.n_kv*c.n_stream; ++j) {
        ((int32_t *) t.pos->data)[j] = c.in_order ? (c.d_v == 128 ? 65500 : 0) + j : (j*7919 + 13) % 100000;
    }
    if (!c.in_order) {
        ((int32_t *) t.pos->data)[7] = 0;
    }
    return t;
}

// keys k [n_stream][n_head_kv][n_kv][d_k] and their centers through SET_ROWS; k becomes what attention must see
static std::vector<uint8_t> store_centered(ggml_context * ctx, const attn_case & c, const center_tensors & t, std::vector<float> & k) {
    const tq_center center = { c.d_k, c.d_k, t.table->op_params[0], (const float *) t.table->data };
    std::vector<uint8_t> packed(c.n_stream*c.n_head_kv*c.n_kv*ggml_row_size(c.type_k, c.d_k));
    for (int sh = 0; sh < c.n_stream*c.n_head_kv; ++sh) { // a cache of one head each, so that rows are in this test's order
        const int h = sh%c.n_head_kv;
        const float   * m   = (const float *) t.m->data + (int64_t) h*c.d_k;
        const int32_t * pos = (const int32_t *) t.pos->data + sh/c.n_head_kv*c.n_kv;
        const int64_t plane = (int64_t) c.d_k*c.n_head_kv;
        const auto add_center = [&](int j, float * row) {
            tq_center_add(&center, pos[j] == 0 ? m + 3*plane : m, pos[j], 1.0f, row);
        };
        float * rows = &k[(size_t) sh*c.n_kv*c.d_k];
        ggml_tensor * src = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.d_k, c.n_kv);
        for (int j = 0; j < c.n_kv; ++j) {
            add_center(j, rows + (int64_t) j*c.d_k);
        }
        memcpy(src->data, rows, ggml_nbytes(src));
        ggml_tensor * idx = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, c.n_kv);
        for (int j = 0; j < c.n_kv; ++j) {
            ((int32_t *) idx->data)[j] = j;
        }
        ggml_tensor * cache = ggml_new_tensor_2d(ctx, c.type_k, c.d_k, c.n_kv);
        ggml_tensor * set   = ggml_set_rows(ctx, cache, src, idx);
        set->src[GGML_TQ_SRC_SET_ROWS + 0] = ggml_view_1d(ctx, t.pos, c.n_kv, sh/c.n_head_kv*t.pos->nb[1]);
        set->src[GGML_TQ_SRC_SET_ROWS + 1] = ggml_view_3d(ctx, t.m, c.d_k, 1, 4, t.m->nb[1], t.m->nb[2], h*t.m->nb[1]);
        set->src[GGML_TQ_SRC_SET_ROWS + 2] = t.table;
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, set);
        ggml_graph_compute_with_ctx(ctx, graph, 2);
        memcpy(packed.data() + (size_t) sh*ggml_nbytes(cache), cache->data, ggml_nbytes(cache));

        ggml_get_type_traits(c.type_k)->to_float(cache->data, rows, (int64_t) c.n_kv*c.d_k);
        double residual = 0.0;
        for (int64_t i = 0; i < (int64_t) c.n_kv*c.d_k; ++i) {
            residual += rows[i]*rows[i];
        }
        GGML_ASSERT(residual/((double) c.n_kv*c.d_k) < 20.0 && "the cache holds what is left without the centers");
        const float * inverse = m + 2*plane;
        for (int j = 0; j < c.n_kv; ++j) {
            for (int l = 0; l < c.d_k; ++l) {
                rows[(int64_t) j*c.d_k + l] *= inverse[l];
            }
            add_center(j, rows + (int64_t) j*c.d_k);
        }
    }
    return packed;
}

// [n_stream][n_head_kv][n_kv] packed rows as a tensor, the heads of a cell beside each other if wanted
static ggml_tensor * make_cache(ggml_context * ctx, const attn_case & c, ggml_type type, int d, const std::vector<uint8_t> & packed) {
    if (!c.cache_view) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx, type, d, c.n_kv, c.n_head_kv, c.n_stream);
        memcpy(t->data, packed.data(), ggml_nbytes(t));
        return t;
    }
    const size_t row = ggml_row_size(type, d);
    ggml_tensor * t = ggml_new_tensor_3d(ctx, type, (int64_t) d*c.n_head_kv, c.n_kv, c.n_stream);
    for (int s = 0; s < c.n_stream; ++s) {
        for (int h = 0; h < c.n_head_kv; ++h) {
            for (int j = 0; j < c.n_kv; ++j) {
                memcpy((char *) t->data + s*t->nb[2] + j*t->nb[1] + h*row, &packed[(((size_t) s*c.n_head_kv + h)*c.n_kv + j)*row], row);
            }
        }
    }
    return ggml_view_4d(ctx, t, d, c.n_kv, c.n_head_kv, c.n_stream, t->nb[1], row, t->nb[2], 0);
}

struct attn_errors { // normalized mean squared errors of the op
    double op;
    double ref;      // its slow path, in floats
    double damaged;  // on rows of which three bytes of each 64 coordinates were changed
    const char * differs; // what changes a row's bits and should not, or nullptr
};

// what of a case is computed, and how
struct attn_run {
    int  n_threads = 2;
    bool use_ref   = false;
    int  i0 = 0, n_q = -1;    // of its queries; -1: all
    int  before = 0, after = 0; // cells that nobody sees, with damaged scales
};

// packed rows [n_stream][n_head_kv][n_kv] with others around them
static std::vector<uint8_t> surround(const std::vector<uint8_t> & packed, int n_cache, int n_kv, int before, int after) {
    const size_t row = packed.size()/n_cache/n_kv;
    std::vector<uint8_t> result((size_t) n_cache*(before + n_kv + after)*row, 0xff);
    for (int i = 0; i < n_cache; ++i) {
        memcpy(&result[((size_t) i*(before + n_kv + after) + before)*row], &packed[(size_t) i*n_kv*row], n_kv*row);
    }
    return result;
}

static attn_errors attention_errors(const attn_case & c, bool compare_bits, std::mt19937_64 & rng) {
    std::normal_distribution<float> normal;
    std::vector<float> q((size_t) c.d_k*c.n_q*c.n_head*c.n_stream);
    std::vector<float> k((size_t) c.d_k*c.n_kv*c.n_head_kv*c.n_stream);
    std::vector<float> v((size_t) c.d_v*c.n_kv*c.n_head_kv*c.n_stream);
    for (float & x : q) { x = normal(rng)*(c.centered ? 0.1f : 1.5f); }
    for (float & x : k) { x = normal(rng)*1.5f; }
    for (float & x : v) { x = normal(rng); }
    // a channel that dwarfs the others, as real keys have
    for (size_t i = 3; i < k.size(); i += c.d_k) { k[i] += 8.0f; }

    ggml_init_params params_k = { 2*k.size()*sizeof(float) + (8u << 20), nullptr, false };
    ggml_context_ptr ctx_k { ggml_init(params_k) };
    std::vector<uint8_t> kp;
    center_tensors center;
    if (c.centered) {
        center = make_center(ctx_k.get(), c, rng);
        kp = store_centered(ctx_k.get(), c, center, k);
    } else {
        kp = pack(c.type_k, k, c.d_k);
    }
    const std::vector<uint8_t> vp = pack(c.type_v, v, c.d_v);

    // the last n_q of n_kv positions ask, causally
    std::vector<ggml_fp16_t> mask((size_t) c.n_kv*c.n_q*c.n_mask*c.n_stream);
    for (size_t i = 0; i < mask.size(); ++i) {
        const int token = (int) (i/c.n_kv)%c.n_q;
        const int cell  = (int) (i%c.n_kv);
        bool visible = cell <= c.n_kv - c.n_q + token;
        if (c.scattered) {
            visible = visible && cell/64%3 != 1 && rng()%4 != 0;
        }
        mask[i] = ggml_fp32_to_fp16(!visible ? -INFINITY : c.max_bias > 0.0f ? (float) (cell - c.n_kv)/16.0f : 0.0f);
    }
    std::vector<float> sinks(c.n_head);
    for (float & x : sinks) { x = normal(rng)*2.0f; }
    const float scale = 1.0f/std::sqrt((float) c.d_k);

    std::vector<double> want((size_t) c.d_v*c.n_head*c.n_q*c.n_stream); // in the op's order
    std::vector<double> p(c.n_kv);
    for (int s = 0; s < c.n_stream; ++s) {
        for (int h = 0; h < c.n_head; ++h) {
            const int n_log2 = 1 << (int) std::floor(std::log2(c.n_head));
            const double slope = c.max_bias <= 0.0f ? 1.0 : h < n_log2 ? std::pow(2.0, -c.max_bias*(h + 1)/n_log2)
                                                                       : std::pow(2.0, -c.max_bias/2*(2*(h - n_log2) + 1)/n_log2);
            const size_t cache = ((size_t) s*c.n_head_kv + h/(c.n_head/c.n_head_kv))*c.n_kv;
            for (int i = 0; i < c.n_q; ++i) {
                const float       * qi = &q[(((size_t) s*c.n_head + h)*c.n_q + i)*c.d_k];
                const ggml_fp16_t * mi = &mask[(((size_t) s*c.n_mask + h%c.n_mask)*c.n_q + i)*c.n_kv];
                double max = c.sinks ? sinks[h] : -INFINITY;
                for (int j = 0; j < c.n_kv; ++j) {
                    const double m = slope*ggml_fp16_to_fp32(mi[j]);
                    p[j] = -INFINITY;
                    if (m != -INFINITY) {
                        const float * kj = &k[(cache + j)*c.d_k];
                        double x = 0.0;
                        for (int l = 0; l < c.d_k; ++l) { x += (double) qi[l]*kj[l]; }
                        x *= scale;
                        p[j] = (c.softcap > 0.0f ? c.softcap*std::tanh(x/c.softcap) : x) + m;
                        max  = std::fmax(max, p[j]);
                    }
                }
                double sum = c.sinks ? std::exp(sinks[h] - max) : 0.0;
                double * out = &want[(((size_t) s*c.n_q + i)*c.n_head + h)*c.d_v];
                for (int j = 0; j < c.n_kv; ++j) {
                    p[j] = p[j] == -INFINITY ? 0.0 : std::exp(p[j] - max);
                    sum += p[j];
                    for (int l = 0; p[j] != 0.0 && l < c.d_v; ++l) {
                        out[l] += p[j]*v[(cache + j)*c.d_v + l];
                    }
                }
                for (int l = 0; l < c.d_v; ++l) {
                    out[l] = sum == 0.0 ? 0.0 : out[l]/sum;
                }
            }
        }
    }

    const auto run = [&](const std::vector<uint8_t> & kp, const std::vector<uint8_t> & vp, const attn_run & o) {
        const int n_q = o.n_q < 0 ? c.n_q : o.n_q;
        attn_case d = c; // with the cells around
        d.n_kv += o.before + o.after;
        const int n_cache = c.n_stream*c.n_head_kv;
        ggml_init_params params = { (q.size() + want.size())*sizeof(float) + (kp.size() + vp.size() + mask.size()*2)/c.n_kv*d.n_kv
            + (size_t) d.n_kv*c.n_stream*4 + (1u << 20), nullptr, false };
        ggml_context_ptr ctx { ggml_init(params) };
        // queries as llama.cpp has them: a token's heads beside each other
        ggml_tensor * tq = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, c.d_k, c.n_head, n_q, c.n_stream);
        for (int s = 0; s < c.n_stream; ++s) {
            for (int h = 0; h < c.n_head; ++h) {
                for (int i = 0; i < n_q; ++i) {
                    memcpy((float *) tq->data + (((size_t) s*n_q + i)*c.n_head + h)*c.d_k, &q[(((size_t) s*c.n_head + h)*c.n_q + o.i0 + i)*c.d_k], c.d_k*sizeof(float));
                }
            }
        }
        tq = ggml_permute(ctx.get(), tq, 0, 2, 1, 3);
        ggml_tensor * tk = make_cache(ctx.get(), d, c.type_k, c.d_k, surround(kp, n_cache, c.n_kv, o.before, o.after));
        ggml_tensor * tv = make_cache(ctx.get(), d, c.type_v, c.d_v, surround(vp, n_cache, c.n_kv, o.before, o.after));
        ggml_tensor * tm = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, d.n_kv, n_q, c.n_mask, c.n_stream);
        std::fill_n((ggml_fp16_t *) tm->data, ggml_nelements(tm), ggml_fp32_to_fp16(-INFINITY));
        for (int i = 0; i < c.n_stream*c.n_mask*n_q; ++i) {
            memcpy((ggml_fp16_t *) tm->data + (size_t) i*d.n_kv + o.before, &mask[((size_t) i/n_q*c.n_q + o.i0 + i%n_q)*c.n_kv], c.n_kv*sizeof(ggml_fp16_t));
        }
        ggml_tensor * out = ggml_flash_attn_ext(ctx.get(), tq, tk, tv, tm, scale, c.max_bias, c.softcap);
        if (c.sinks) {
            ggml_tensor * ts = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, c.n_head);
            memcpy(ts->data, sinks.data(), ggml_nbytes(ts));
            ggml_flash_attn_ext_add_sinks(out, ts);
        }
        if (c.centered) {
            ggml_tensor * pos = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, d.n_kv, c.n_stream);
            std::fill_n((int32_t *) pos->data, ggml_nelements(pos), -1);
            for (int s = 0; s < c.n_stream; ++s) {
                memcpy((int32_t *) pos->data + (size_t) s*d.n_kv + o.before, (int32_t *) center.pos->data + (size_t) s*c.n_kv, c.n_kv*sizeof(int32_t));
            }
            out->src[GGML_TQ_SRC_FLASH_ATTN + 0] = pos;
            out->src[GGML_TQ_SRC_FLASH_ATTN + 1] = center.m;
            out->src[GGML_TQ_SRC_FLASH_ATTN + 2] = center.table;
        }
        ggml_cgraph * graph = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(graph, out);
        ggml_cplan plan = ggml_graph_plan(graph, o.n_threads, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        plan.use_ref   = o.use_ref;
        ggml_graph_compute(graph, &plan);
        return std::vector<float>((float *) out->data, (float *) out->data + ggml_nelements(out));
    };
    const auto error = [&](const std::vector<float> & got) {
        double err = 0.0, power = 0.0;
        for (size_t i = 0; i < want.size(); ++i) {
            err   += (got[i] - want[i])*(got[i] - want[i]);
            power += want[i]*want[i];
        }
        return err/power;
    };
    std::vector<uint8_t> kd = kp;
    std::vector<uint8_t> vd = vp;
    const auto damage = [](std::vector<uint8_t> & rows, size_t block) {
        for (size_t i = 0; i < rows.size(); i += block) {
            for (size_t l = 5; l < 8; ++l) { rows[i + l] ^= 0xff; }
        }
    };
    damage(kd, ggml_row_size(c.type_k, 64));
    damage(vd, ggml_row_size(c.type_v, 64));

    const std::vector<float> got = run(kp, vp, {});
    // the rows of queries [i0, i0 + n) with other ways to compute them
    const auto same = [&](const attn_run & o) {
        const int    n_q = o.n_q < 0 ? c.n_q : o.n_q;
        const size_t row = (size_t) c.d_v*c.n_head;
        const std::vector<float> other = run(kp, vp, o);
        for (int s = 0; s < c.n_stream; ++s) {
            if (memcmp(&other[s*n_q*row], &got[((size_t) s*c.n_q + o.i0)*row], n_q*row*sizeof(float)) != 0) {
                return false;
            }
        }
        return true;
    };
    attn_run one, three, last, first, longer, later, elsewhere;
    one.n_threads    = 1;
    three.n_threads  = 3;
    last.n_q         = 1;
    last.i0          = c.n_q - 1;
    first.n_q        = (c.n_q + 1)/2;
    longer.after     = 700;
    later.before     = 1024;
    elsewhere.before = std::max(0, std::min(77, 512 - c.n_kv)); // within a range of cells
    const char * differs = !compare_bits ? nullptr : !same(one) ? "1 thread" : !same(three) ? "3 threads" : !same(last) ? "the last query alone" : !same(first) ? "half of the batch"
        : !same(longer) ? "a longer cache" : !same(later) || !same(elsewhere) ? "cells at other places" : nullptr;
    for (int i = 1; !differs && tq_tile_name(i); ++i) {
        tq_tile_use(tq_tile_name(i));
        differs = same({}) ? nullptr : tq_tile_name(i);
    }
    tq_tile_use(tq_tile_name(0));
    attn_run ref;
    ref.use_ref = true;
    return { error(got), error(run(kp, vp, ref)), error(run(kd, vd, {})), differs };
}

int main(int argc, char ** argv) {
    const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 0) : (uint64_t) time(nullptr);
    std::mt19937_64 rng(seed);
    printf("seed %" PRIu64 "\n", seed);

    std::vector<attn_case> cases;
    for (const ggml_type type : { GGML_TQ_TYPE_LIST }) {
        for (const int n_q : { 1, 17 }) {
            for (const int d : { 64, 192, 512 }) {
                cases.push_back({ d, d, 4, 2, 100, n_q, type, type, false });
            }
            cases.push_back({ 128, 128, 8, 1, n_q == 1 ? 600 : 300, n_q, type, type, false });
            cases.push_back({  64,  64, 3, 3,  70, n_q, type, type, false });
            cases.push_back({  64,  64, 6, 2, 1200, n_q, type, n_q == 1 ? GGML_TYPE_F16 : type, true, true });
            cases.push_back({ 576, 512, 4, 1,  64, n_q, type, type, false });
            for (const int n_q_centered : { n_q, 70 }) {
                for (const bool in_order : { false, true }) {
                    cases.push_back({  64,  64, 4, 2, 100, n_q_centered, type, type,           true, in_order });
                    cases.push_back({ 128, 128, 4, 1, 131, n_q_centered, type, GGML_TYPE_F16,  true, in_order });
                    cases.push_back({ 256, 256, 2, 2,  90, n_q_centered, type, GGML_TYPE_Q8_0, true, in_order });
                }
            }
            for (const ggml_type other : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
                cases.push_back({ 64, 64, 4, 2, 90, n_q, type, other, false });
                cases.push_back({ 64, 64, 4, 2, 90, n_q, other, type, false });
            }
        }
        for (const int n_q : { 1, 40 }) { // everything at once, and each by itself
            for (int what = -1; what < 7; ++what) {
                attn_case c = { 64, 128, 6, 2, 330, n_q, type, type, false };
                c.centered   = what == -1;
                c.in_order   = true;
                c.n_stream   = what == -1 || what == 0 ? 3 : 1;
                c.n_mask     = what == -1 || what == 1 ? 6 : 1;
                c.scattered  = what == -1 || what == 2;
                c.cache_view = what == -1 || what == 3;
                c.sinks      = what == -1 || what == 4;
                c.max_bias   = what == -1 || what == 5 ? 4.0f : 0.0f;
                c.softcap    = what == -1 || what == 6 ? 5.0f : 0.0f;
                cases.push_back(c);
            }
        }
    }

    // floats err by their rounding; tiles of integers by that of codebooks to 8 bits, which the levels of trellises need not.
    // logits have a standard deviation of 2.7, of centered keys most of the logit is exact; damage shows as 2e-2 and more
    const double max_ref   = 1e-8;
    const double max_exact = 1e-6;
    const double max_error = 3e-4;
    int n_failed = 0;
    double worst = 0.0, worst_exact = 0.0, worst_ref = 0.0, least_damage = INFINITY;
    for (const auto & c : cases) {
        const attn_errors err = attention_errors(c, c.n_kv >= 300 || rng()%4 == 0, rng);
        const auto has_codebook = [](ggml_type t) { return ggml_tq_is_type(t) && tq_get_type_info(ggml_tq_type_of(t))->kind != TQ_KIND_TCQ; };
        const bool exact = !has_codebook(c.type_k) && !has_codebook(c.type_v);
        (exact ? worst_exact : worst) = std::fmax(exact ? worst_exact : worst, err.op);
        worst_ref    = std::fmax(worst_ref, err.ref);
        least_damage = std::fmin(least_damage, err.damaged);
        if (!(err.op < (exact ? max_exact : max_error)) || !(err.ref < max_ref) || err.damaged < max_error || err.differs) {
            printf("FAIL %s: error %.2e, by the slow path %.2e, with damaged rows %.2e%s%s\n", c.str().c_str(), err.op, err.ref, err.damaged,
                err.differs ? ", other bits with " : "", err.differs ? err.differs : "");
            n_failed++;
        }
    }
    printf("%zu cases, worst error %.2e (bound %.0e), of trellises %.2e (%.0e), by the slow path %.2e (%.0e), least with damage %.2e, %d failed\n",
        cases.size(), worst, max_error, worst_exact, max_exact, worst_ref, max_ref, least_damage, n_failed);
    return n_failed ? 1 : 0;
}
