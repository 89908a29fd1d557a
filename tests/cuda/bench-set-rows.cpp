// Time that a layer's keys and values take to store: SET_ROWS of one after the other, as in a model's graph, each pair after a
// small op that it waits for. One line of JSON a measurement; "none" is that small op alone.
// usage: bench-set-rows [-d DEVICE] [-r REPETITIONS] [-c] [-s KV_HEADS/HEAD_DIM] [-n TOKENS,...] [TYPE_K[/TYPE_V]...]
// -c: with centered keys as well.

#include "bench.h"
#include "ggml-tq-names.h"
#include "../type-of.h"

#include <cmath>
#include <cstdio>
#include <random>

#define N_LAYERS 64

// GGML_TYPE_COUNT: nothing is stored
static void bench(int64_t n_head, int64_t d, int64_t n, ggml_type type_k, ggml_type type_v, bool centered) {
    const int64_t n_row   = n_head*d;
    const int64_t n_cells = n + 256;
    ggml_context_ptr ctx { ggml_init({ 16*N_LAYERS*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 8*N_LAYERS, false);
    ggml_tensor * x     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_row, n);
    ggml_tensor * index = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, n);
    ggml_tensor * pos   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n);
    ggml_tensor * m     = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d, n_head, 4);
    ggml_tensor * turn  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, d, TQ_CENTER_ROWS);
    turn->op_params[0] = 1;
    turn->op_params[1] = (int32_t) d;
    const bool none = type_k == GGML_TYPE_COUNT;
    for (int i = 0; i < N_LAYERS; ++i) {
        ggml_tensor * k = ggml_scale(ctx.get(), x, 1.0f + i);
        ggml_build_forward_expand(graph, k);
        if (none) {
            continue;
        }
        ggml_tensor * set_k = ggml_set_rows(ctx.get(), ggml_new_tensor_2d(ctx.get(), type_k, n_row, n_cells), k, index);
        ggml_tensor * set_v = ggml_set_rows(ctx.get(), ggml_new_tensor_2d(ctx.get(), type_v, n_row, n_cells), x, index);
        if (centered) {
            set_k->src[3] = pos;
            set_k->src[4] = m;
            set_k->src[5] = turn;
        }
        ggml_build_forward_expand(graph, set_k);
        ggml_build_forward_expand(graph, set_v);
        if (!ggml_backend_supports_op(backend, set_k) || !ggml_backend_supports_op(backend, set_v)) {
            return;
        }
    }
    ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };
    if (!buffer) {
        return;
    }
    std::mt19937_64 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(ggml_nelements(x));
    for (float & v : values) {
        v = normal(rng);
    }
    ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
    std::vector<int64_t> rows(n);
    std::vector<int32_t> positions(n);
    for (int64_t i = 0; i < n; ++i) {
        rows[i]      = 100 + i;
        positions[i] = (int32_t) (100000 + i);
    }
    ggml_backend_tensor_set(index, rows.data(),      0, ggml_nbytes(index));
    ggml_backend_tensor_set(pos,   positions.data(), 0, ggml_nbytes(pos));
    values.assign(ggml_nelements(m), 1.0f);
    ggml_backend_tensor_set(m, values.data(), 0, ggml_nbytes(m));
    std::vector<double> freqs(d/2);
    for (int64_t i = 0; i < d/2; ++i) {
        freqs[i] = std::pow(10000.0, -2.0*i/d);
    }
    values.resize(ggml_nelements(turn));
    tq_center_make_table(freqs.data(), (int32_t) d, values.data());
    ggml_backend_tensor_set(turn, values.data(), 0, ggml_nbytes(turn));

    printf("{\"n_head_kv\": %d, \"head_dim\": %d, \"n_tokens\": %d, \"type_k\": \"%s\", \"type_v\": \"%s\", \"centered\": %s, \"us\": %.2f}\n",
        (int) n_head, (int) d, (int) n, none ? "none" : ggml_type_name(type_k), none ? "none" : ggml_type_name(type_v),
        centered ? "true" : "false", time_of(graph)/N_LAYERS*1e6);
    fflush(stdout);
}

int main(int argc, char ** argv) {
    std::string device = "CUDA0";
    std::string shape  = "8/128";
    std::vector<int64_t> tokens = { 1, 512 };
    std::vector<std::string> types;
    bool centered = false;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "-c") {
            centered = true;
        } else if (arg[0] == '-' && i + 1 < argc) {
            const std::string value = argv[++i];
            switch (arg[1]) {
                case 'd': device      = value;               break;
                case 'r': repetitions = atoi(value.c_str()); break;
                case 's': shape       = value;               break;
                case 'n': tokens      = numbers(value);      break;
                default: fprintf(stderr, "%s?\n", arg.c_str()); return 1;
            }
        } else {
            types.push_back(arg);
        }
    }
    if (types.empty()) {
        types = { "none", "f16", "q8_0", "q4_0", "tq4_mse", "tq3_mse", "tq3_qjl", "tq4_tcq", "tq3_tcq", "tq2_tcq", "tq4_tcq/tq3_tcq", "tq4_tcq/tq3_mse" };
    }
    const std::vector<std::string> part = split(shape, '/');
    if (part.size() != 2) {
        fprintf(stderr, "KV_HEADS/HEAD_DIM: %s\n", shape.c_str());
        return 1;
    }
    ggml_backend_dev_t dev = open_device(device);
    if (!dev) {
        return 1;
    }
    printf("{\"device\": \"%s\"}\n", ggml_backend_dev_description(dev));
    for (const int64_t n : tokens) {
        for (const std::string & name : types) {
            const std::vector<std::string> kv = split(name, '/');
            const ggml_type k = name == "none" ? GGML_TYPE_COUNT : type_of(kv[0]);
            const ggml_type v = name == "none" ? GGML_TYPE_COUNT : type_of(kv.back());
            bench(atoll(part[0].c_str()), atoll(part[1].c_str()), n, k, v, false);
            if (centered && k >= GGML_TYPE_TQ2_MSE && k <= GGML_TYPE_TQ4_TCQ) {
                bench(atoll(part[0].c_str()), atoll(part[1].c_str()), n, k, v, true);
            }
        }
    }
    ggml_backend_free(backend);
    return 0;
}
