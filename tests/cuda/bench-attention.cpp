// Time of FLASH_ATTN_EXT on a device, the op alone: packed keys and values of the cache types against f16 and upstream's
// quantized types. One line of JSON a measurement.
// usage: bench-attention [-d DEVICE] [-r REPETITIONS] [-c] [-s HEADS/KV_HEADS/HEAD_DIM,...] [-n CELLS,...] [-b STREAMS,...]
//                        [-q QUERIES,...] [TYPE_K[/TYPE_V]...]
// -c: cells have centered keys as well. Buffers take turns, so that nothing stays in the device's cache between runs of the
// op; bandwidth is what a copy within the device reads and writes, in the same process.

#include "bench.h"
#include "ggml-tq-names.h"
#include "../type-of.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

// bytes a second, read and written
static double copy_bandwidth() {
    const int64_t n = 1 << 28;
    ggml_context_ptr ctx { ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_tensor * a = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    ggml_tensor * b = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 32, false);
    const int n_copies = 8;
    for (int i = 0; i < n_copies; ++i) {
        ggml_build_forward_expand(graph, ggml_cpy(ctx.get(), i % 2 ? b : a, i % 2 ? a : b));
    }
    ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };
    ggml_backend_buffer_clear(buffer.get(), 0x3c);
    return 2.0*n*sizeof(float)*n_copies/time_of(graph);
}

struct shape {
    int64_t n_head, n_head_kv, d, n_kv, n_q, n_stream;
};

static void fill(ggml_tensor * t, const std::vector<uint8_t> & noise, size_t from) {
    const size_t n = ggml_nbytes(t);
    for (size_t at = 0; at < n; at += noise.size()/2) {
        ggml_backend_tensor_set(t, noise.data() + from % (noise.size()/4)*2, at, std::min(n - at, noise.size()/2));
    }
}

// a packed row of random vectors, over and over
static std::vector<uint8_t> make_noise(ggml_type type, std::mt19937_64 & rng) {
    std::normal_distribution<float> normal;
    const int64_t n = 64*1024;
    std::vector<float> x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    std::vector<uint8_t> row(ggml_row_size(type, n));
    ggml_quantize_chunk(type, x.data(), row.data(), 0, 1, n, nullptr);
    std::vector<uint8_t> noise;
    while (noise.size() < (8u << 20)) {
        noise.insert(noise.end(), row.begin(), row.end());
    }
    return noise;
}

static void bench(const shape & s, ggml_type type_k, ggml_type type_v, bool centered, double bandwidth) {
    std::mt19937_64 rng(1);
    const size_t bytes = s.n_kv*s.n_head_kv*s.n_stream*(ggml_row_size(type_k, s.d) + ggml_row_size(type_v, s.d));
    const int n_ops = (int) std::max<size_t>(4, std::min<size_t>(64, (400u << 20)/bytes + 1)); // more than caches hold
    ggml_context_ptr ctx { ggml_init({ (size_t) (12*n_ops + 16)*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 4*n_ops + 16, false);

    ggml_tensor * q    = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, s.d, s.n_q, s.n_head, s.n_stream);
    ggml_tensor * mask = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, s.n_kv, s.n_q, 1, s.n_stream);
    ggml_tensor * pos  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, s.n_kv, s.n_stream);
    ggml_tensor * m    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, s.d, s.n_head_kv, 4);
    ggml_tensor * turn = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, s.d, TQ_CENTER_ROWS);
    turn->op_params[0] = 1;
    turn->op_params[1] = (int32_t) s.d;
    std::vector<ggml_tensor *> keys, values;
    for (int i = 0; i < n_ops; ++i) {
        ggml_tensor * k = ggml_new_tensor_3d(ctx.get(), type_k, s.d*s.n_head_kv, s.n_kv, s.n_stream);
        ggml_tensor * v = ggml_new_tensor_3d(ctx.get(), type_v, s.d*s.n_head_kv, s.n_kv, s.n_stream);
        keys.push_back(k);
        values.push_back(v);
        ggml_tensor * out = ggml_flash_attn_ext(ctx.get(), q,
            ggml_view_4d(ctx.get(), k, s.d, s.n_kv, s.n_head_kv, s.n_stream, k->nb[1], ggml_row_size(type_k, s.d), k->nb[2], 0),
            ggml_view_4d(ctx.get(), v, s.d, s.n_kv, s.n_head_kv, s.n_stream, v->nb[1], ggml_row_size(type_v, s.d), v->nb[2], 0),
            mask, 1.0f/std::sqrt((float) s.d), 0.0f, 0.0f);
        ggml_prec_set_acc(out, GGML_PREC_F32);
        if (centered) {
            out->src[5] = pos;
            out->src[6] = m;
            out->src[7] = turn;
        }
        if (!ggml_backend_supports_op(backend, out)) {
            return;
        }
        ggml_build_forward_expand(graph, out);
    }
    ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };
    if (!buffer) {
        return;
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    std::normal_distribution<float> normal;
    std::vector<float> x(ggml_nelements(q));
    for (float & v : x) {
        v = normal(rng);
    }
    ggml_backend_tensor_set(q, x.data(), 0, ggml_nbytes(q));
    std::vector<int32_t> positions(ggml_nelements(pos));
    for (size_t i = 0; i < positions.size(); ++i) {
        positions[i] = (int32_t) (i % s.n_kv);
    }
    ggml_backend_tensor_set(pos, positions.data(), 0, ggml_nbytes(pos));
    x.assign(ggml_nelements(m), 1.0f);
    ggml_backend_tensor_set(m, x.data(), 0, ggml_nbytes(m));
    std::vector<double> freqs(s.d/2);
    for (int64_t i = 0; i < s.d/2; ++i) {
        freqs[i] = std::pow(10000.0, -2.0*i/s.d);
    }
    x.resize(ggml_nelements(turn));
    tq_center_make_table(freqs.data(), (int32_t) s.d, x.data());
    ggml_backend_tensor_set(turn, x.data(), 0, ggml_nbytes(turn));
    const std::vector<uint8_t> noise_k = make_noise(type_k, rng);
    const std::vector<uint8_t> noise_v = make_noise(type_v, rng);
    for (int i = 0; i < n_ops; ++i) {
        fill(keys  [i], noise_k, 0);
        fill(values[i], noise_v, 0);
    }

    const double seconds = time_of(graph)/n_ops;
    printf("{\"n_head\": %d, \"n_head_kv\": %d, \"head_dim\": %d, \"n_kv\": %d, \"n_q\": %d, \"n_stream\": %d, \"type_k\": \"%s\", \"type_v\": \"%s\", "
        "\"centered\": %s, \"us\": %.2f, \"gb_s\": %.1f, \"of_copy\": %.3f}\n",
        (int) s.n_head, (int) s.n_head_kv, (int) s.d, (int) s.n_kv, (int) s.n_q, (int) s.n_stream, ggml_type_name(type_k), ggml_type_name(type_v),
        centered ? "true" : "false", seconds*1e6, bytes/seconds/1e9, bytes/seconds/bandwidth);
    fflush(stdout);
}

int main(int argc, char ** argv) {
    std::string device = "CUDA0";
    std::string shapes = "32/8/128";
    std::vector<int64_t> cells   = { 32768 };
    std::vector<int64_t> streams = { 1 };
    std::vector<int64_t> queries = { 1 };
    std::vector<std::string> types;
    bool centered = false;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "-c") {
            centered = true;
        } else if (arg[0] == '-' && i + 1 < argc) {
            const std::string value = argv[++i];
            switch (arg[1]) {
                case 'd': device      = value;                break;
                case 'r': repetitions = atoi(value.c_str());  break;
                case 's': shapes      = value;                break;
                case 'n': cells       = numbers(value);       break;
                case 'b': streams     = numbers(value);       break;
                case 'q': queries     = numbers(value);       break;
                default: fprintf(stderr, "%s?\n", arg.c_str()); return 1;
            }
        } else {
            types.push_back(arg);
        }
    }
    if (types.empty()) {
        types = { "f16", "q8_0", "q4_0", "tq4_tcq", "tq3_tcq", "tq2_tcq", "tq4_mse", "tq3_mse", "tq2_mse", "tq4_qjl/tq4_mse", "tq3_qjl/tq3_mse" };
    }
    ggml_backend_dev_t dev = open_device(device);
    if (!dev) {
        return 1;
    }
    const double bandwidth = copy_bandwidth();
    printf("{\"device\": \"%s\", \"copy_gb_s\": %.1f}\n", ggml_backend_dev_description(dev), bandwidth/1e9);
    for (const std::string & shape_name : split(shapes, ',')) {
        const std::vector<std::string> part = split(shape_name, '/');
        if (part.size() != 3) {
            fprintf(stderr, "HEADS/KV_HEADS/HEAD_DIM: %s\n", shape_name.c_str());
            return 1;
        }
        for (const int64_t n_kv : cells) {
            for (const int64_t n_stream : streams) {
                for (const int64_t n_q : queries) {
                    const shape s = { atoll(part[0].c_str()), atoll(part[1].c_str()), atoll(part[2].c_str()), n_kv, n_q, n_stream };
                    for (const std::string & name : types) {
                        const std::vector<std::string> kv = split(name, '/');
                        const ggml_type k = type_of(kv[0]);
                        const ggml_type v = type_of(kv.back());
                        bench(s, k, v, false, bandwidth);
                        if (centered && k >= GGML_TYPE_TQ2_MSE && k <= GGML_TYPE_TQ4_TCQ) {
                            bench(s, k, v, true, bandwidth);
                        }
                    }
                }
            }
        }
    }
    ggml_backend_free(backend);
    return 0;
}
