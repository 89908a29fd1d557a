// Time of ggml's FLASH_ATTN_EXT alone on the CPU, the cache types beside upstream's. Types are run in turn, round by round,
// so that a busy machine disturbs all alike; ratios are medians over rounds of a type's time to f16's in the same round.
// usage: bench-cpu-attention [-t THREADS] [-c CELLS] [-g HEADS_A_KEY_HEAD] [-d HEAD_DIM] [-q QUERIES] [-r ROUNDS] [--center]
//        [--tiles NAME] [--json] [TYPE...]
// A type is one for keys and values, or K/V; the first is what the others are compared with. --tiles: the cache types' implementation
// (avx512, avx2, ...), the machine's fastest if it is not given. --json: a line a type instead of a table.

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-tq-ops.h"
#include "../type-of.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct options {
    int  n_threads = 1;
    int  n_kv      = 8192;
    int  group     = 4;
    int  head_dim  = 128;
    int  n_q       = 1;
    int  n_rounds  = 7;
    bool center    = false;
    bool json      = false;
};

struct subject {
    std::string          name;
    ggml_context_ptr     ctx;
    ggml_cgraph        * graph = nullptr;
    ggml_cplan           plan  = {};
    std::vector<uint8_t> work;
    size_t               n_bytes = 0; // of keys and values
    std::vector<double>  seconds;
};

static constexpr int N_HEAD_KV = 8;

// a cache as llama.cpp's: a row is a cell's heads, seen by the op as [head_dim, n_kv, n_head]
static ggml_tensor * make_cache(ggml_context * ctx, ggml_type type, const options & o, std::mt19937 & rng) {
    const int64_t n = (int64_t) o.head_dim*N_HEAD_KV;
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, n, o.n_kv);
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    const int n_made = 128; // rows; the others repeat them
    for (int i = 0; i < o.n_kv; ++i) {
        char * row = (char *) t->data + i*t->nb[1];
        if (i >= n_made) {
            memcpy(row, (char *) t->data + (i%n_made)*t->nb[1], t->nb[1]);
            continue;
        }
        for (float & v : x) { v = normal(rng); }
        ggml_quantize_chunk(type, x.data(), row, 0, 1, n, nullptr);
    }
    return ggml_view_3d(ctx, t, o.head_dim, o.n_kv, N_HEAD_KV, t->nb[1], ggml_row_size(type, o.head_dim), 0);
}

static subject make_subject(const std::string & name, const options & o) {
    std::mt19937 rng(1);
    const size_t slash = name.find('/');
    const ggml_type type_k = type_of(name.substr(0, slash));
    const ggml_type type_v = slash == std::string::npos ? type_k : type_of(name.substr(slash + 1));
    const int64_t n_head  = (int64_t) N_HEAD_KV*o.group;
    const size_t  n_cache = (ggml_row_size(type_k, o.head_dim*N_HEAD_KV) + ggml_row_size(type_v, o.head_dim*N_HEAD_KV))*o.n_kv;
    ggml_init_params params = { n_cache + 2*sizeof(float)*o.head_dim*n_head*o.n_q + 2*(size_t) o.n_kv*o.n_q + (8u << 20), nullptr, false };

    subject s;
    s.name    = name;
    s.n_bytes = n_cache;
    s.ctx.reset(ggml_init(params));
    ggml_context * ctx = s.ctx.get();
    ggml_tensor * k = make_cache(ctx, type_k, o, rng);
    ggml_tensor * v = make_cache(ctx, type_v, o, rng);
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, o.head_dim, o.n_q, n_head);
    ggml_tensor * m = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, o.n_kv, o.n_q);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < ggml_nelements(q); ++i) {
        ((float *) q->data)[i] = normal(rng);
    }
    for (int i = 0; i < o.n_q; ++i) { // the last tokens of the cache ask
        for (int j = 0; j < o.n_kv; ++j) {
            ((ggml_fp16_t *) m->data)[(size_t) i*o.n_kv + j] = ggml_fp32_to_fp16(j <= o.n_kv - o.n_q + i ? 0.0f : -INFINITY);
        }
    }
    ggml_tensor * out = ggml_flash_attn_ext(ctx, q, k, v, m, 1.0f/sqrtf((float) o.head_dim), 0.0f, 0.0f);
    if (o.center && ggml_tq_is_type(type_k)) {
        ggml_tensor * pos     = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, o.n_kv, 1);
        ggml_tensor * centers = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, o.head_dim, N_HEAD_KV, 4); // and scales
        ggml_tensor * table   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, o.head_dim, TQ_CENTER_ROWS);
        for (int j = 0; j < o.n_kv; ++j) {
            ((int32_t *) pos->data)[j] = j;
        }
        for (int64_t i = 0; i < ggml_nelements(centers); ++i) {
            ((float *) centers->data)[i] = i < ggml_nelements(centers)/4 ? normal(rng) : 1.0f;
        }
        std::vector<double> freqs(o.head_dim/2);
        for (int i = 0; i < o.head_dim/2; ++i) {
            freqs[i] = pow(1e4, -2.0*i/o.head_dim);
        }
        tq_center_make_table(freqs.data(), o.head_dim, (float *) table->data);
        table->op_params[0] = 1;
        table->op_params[1] = o.head_dim;
        out->src[GGML_TQ_SRC_FLASH_ATTN + 0] = pos;
        out->src[GGML_TQ_SRC_FLASH_ATTN + 1] = centers;
        out->src[GGML_TQ_SRC_FLASH_ATTN + 2] = table;
    }
    s.graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(s.graph, out);
    s.plan = ggml_graph_plan(s.graph, o.n_threads, nullptr);
    s.work.resize(s.plan.work_size);
    s.plan.work_data = s.work.data();
    return s;
}

static double run(subject & s) {
    const auto start = std::chrono::steady_clock::now();
    ggml_graph_compute(s.graph, &s.plan);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static double median(std::vector<double> x) {
    std::nth_element(x.begin(), x.begin() + x.size()/2, x.end());
    return x[x.size()/2];
}

int main(int argc, char ** argv) {
    options o;
    std::vector<std::string> names;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        int * value = arg == "-t" ? &o.n_threads : arg == "-c" ? &o.n_kv     : arg == "-g" ? &o.group
                    : arg == "-d" ? &o.head_dim  : arg == "-q" ? &o.n_q      : arg == "-r" ? &o.n_rounds : nullptr;
        if (value && i + 1 < argc) {
            *value = atoi(argv[++i]);
        } else if (arg == "--center") {
            o.center = true;
        } else if (arg == "--json") {
            o.json = true;
        } else if (arg == "--tiles" && i + 1 < argc) {
            if (!tq_tile_use(argv[++i])) {
                fprintf(stderr, "this machine has no tiles '%s'\n", argv[i]);
                return 1;
            }
        } else {
            names.push_back(arg);
        }
    }
    if (names.empty()) {
        names = { "f16", "q8_0", "q4_0", "tq4_tcq", "tq3_tcq", "tq3_mse", "tq4_mse", "tq4_qjl" };
    }
    std::vector<subject> subjects;
    for (const auto & name : names) {
        subjects.push_back(make_subject(name, o));
    }
    for (auto & s : subjects) {
        run(s);
    }
    for (int round = 0; round < o.n_rounds; ++round) {
        for (auto & s : subjects) {
            int    n     = 0;
            double total = 0.0;
            while (n < 1 || total < 0.02) { // repetitions of short ops
                total += run(s);
                n++;
            }
            s.seconds.push_back(total/n);
        }
    }
    if (!o.json) {
        printf("%d thread(s), %d cells, %d heads on %d, head dim %d, %d queries, %s, %s tiles, median of %d rounds\n",
            o.n_threads, o.n_kv, N_HEAD_KV*o.group, N_HEAD_KV, o.head_dim, o.n_q, o.center ? "centered" : "not centered", tq_tile_use(nullptr), o.n_rounds);
        printf("| K/V | us | ns a stored element | packed GB/s | speed / %s |\n|---|---|---|---|---|\n", names[0].c_str());
    }
    for (auto & s : subjects) {
        std::vector<double> ratios;
        for (size_t i = 0; i < s.seconds.size(); ++i) {
            ratios.push_back(subjects[0].seconds[i]/s.seconds[i]);
        }
        const double t     = median(s.seconds);
        const double ratio = median(ratios);
        if (o.json) {
            printf("{\"type\": \"%s\", \"tiles\": \"%s\", \"threads\": %d, \"cells\": %d, \"group\": %d, \"head_dim\": %d, \"queries\": %d, "
                "\"centered\": %s, \"rounds\": %d, \"us\": %.1f, \"least_us\": %.1f, \"bytes\": %zu, \"than\": \"%s\", \"speed\": %.3f}\n",
                s.name.c_str(), tq_tile_use(nullptr), o.n_threads, o.n_kv, o.group, o.head_dim, o.n_q, o.center ? "true" : "false", o.n_rounds,
                t*1e6, *std::min_element(s.seconds.begin(), s.seconds.end())*1e6, s.n_bytes, names[0].c_str(), ratio);
            continue;
        }
        printf("| %s | %.0f | %.3f | %.2f | %.2f |\n", s.name.c_str(), t*1e6, t*1e9/(2.0*o.head_dim*N_HEAD_KV*o.n_kv), (double) s.n_bytes/t*1e-9, ratio);
    }
    return 0;
}
