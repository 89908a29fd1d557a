// A device's ops on the cache types against the C library: rows that SET_ROWS and CPY encode must be equal to the bit, also where
// RoPE comes first, and so must what GET_ROWS and CPY decode; FLASH_ATTN_EXT is compared with attention in double precision,
// with and without centered keys, over views as a cache's. Also with parameters that are not the built-in ones.
// usage: test-backend [device [part of a type's name]]

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-tq-names.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

static ggml_backend_t backend;
static int n_bad   = 0;
static int n_tests = 0;
static double worst = 0.0; // error of attention, mean square relative to the output's

static void report(bool ok, const char * what, ggml_type type, const std::string & detail) {
    n_tests++;
    if (!ok) {
        n_bad++;
        printf("FAIL %s %s: %s\n", what, ggml_type_name(type), detail.c_str());
    }
}

// one op on tensors of its own: make() builds it, set() fills its sources
struct run {
    ggml_context_ptr        ctx { ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_buffer_ptr buffer;
    ggml_backend_ptr        cpu;
    ggml_backend_sched_ptr  sched;
    ggml_cgraph * graph = nullptr;
    std::vector<std::pair<ggml_tensor *, std::function<void(ggml_tensor *)>>> inputs;

    ggml_tensor * input(ggml_tensor * t, std::function<void(ggml_tensor *)> set) {
        inputs.push_back({ t, set });
        return t;
    }

    template <typename T> ggml_tensor * input(ggml_tensor * t, const std::vector<T> & data) {
        GGML_ASSERT(ggml_nbytes(t) == data.size()*sizeof(T));
        return input(t, [data](ggml_tensor * t) { ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t)); });
    }

    void allocate() {
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        ggml_backend_buffer_clear(buffer.get(), 0x5a); // what is not written shows
        for (auto & [tensor, set] : inputs) {
            set(tensor);
        }
    }

    bool compute(const std::vector<ggml_tensor *> & ops) { // in this order
        graph = ggml_new_graph_custom(ctx.get(), 32, false);
        for (ggml_tensor * op : ops) {
            if (!ggml_backend_supports_op(backend, op)) {
                return false;
            }
            ggml_build_forward_expand(graph, op);
        }
        allocate();
        return ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS;
    }

    // the same through a scheduler, which has the backend optimize the graph before it gives tensors their places; the first op's
    // result can be read
    void schedule(const std::vector<ggml_tensor *> & ops) {
        ggml_backend_t backends[2] = { backend, backend };
        if (ggml_backend_dev_type(ggml_backend_get_device(backend)) != GGML_BACKEND_DEVICE_TYPE_CPU) { // the last one must be it
            cpu.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
            backends[1] = cpu.get();
        }
        sched.reset(ggml_backend_sched_new(backends + (cpu ? 0 : 1), nullptr, cpu ? 2 : 1, 128, false, true));
        graph = ggml_new_graph_custom(ctx.get(), 32, false);
        for (ggml_tensor * op : ops) {
            ggml_build_forward_expand(graph, op);
        }
        for (auto & [tensor, set] : inputs) {
            ggml_set_input(tensor);
        }
        ggml_set_output(ops[0]);
        GGML_ASSERT(ggml_backend_sched_alloc_graph(sched.get(), graph));
        for (auto & [tensor, set] : inputs) {
            set(tensor);
        }
        GGML_ASSERT(ggml_backend_sched_graph_compute(sched.get(), graph) == GGML_STATUS_SUCCESS);
    }
};

template <typename T> static std::vector<T> get(ggml_tensor * t) {
    std::vector<T> data(ggml_nbytes(t)/sizeof(T));
    ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
    return data;
}

// blocks as they come, and what the format treats apart
static std::vector<float> make_rows(size_t n, std::mt19937_64 & rng) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (size_t b = 0; b < n/64; ++b) {
        const float scale = std::ldexp(1.0f, (int) (rng() % 3) == 0 ? (int) (rng() % 80) - 60 : 0);
        float * v = x.data() + 64*b;
        for (int j = 0; j < 64; ++j) {
            v[j] = normal(rng)*scale;
        }
        switch (rng() % 24) {
            case 0: v[rng() % 64] *= 1000.0f;                           break;
            case 1: std::fill(v, v + 64, scale);                        break;
            case 2: std::fill(v, v + 64, 0.0f); v[rng() % 64] = scale;  break;
            case 3: std::fill(v, v + 64, 0.0f);                         break;
            case 4: v[rng() % 64] = NAN;                                break;
            case 5: v[rng() % 64] = INFINITY;                           break;
            case 6: std::fill(v, v + 64, -3.4e38f);                     break;
            case 7: std::fill(v, v + 64, 0.0f); v[0] = 0x1p-60f;        break;
            case 8: for (int j = 0; j < 64; ++j) { v[j] = j % 2 ? 1e-42f : 1e38f; } break;
            case 9: for (int j = 0; j < 64; ++j) { v[j] = normal(rng)*7e-8f; }      break;
            default: break;
        }
    }
    return x;
}

static std::vector<uint8_t> encode(ggml_type type, const std::vector<float> & x) {
    std::vector<uint8_t> packed(ggml_row_size(type, (int64_t) x.size()));
    tq_encode(ggml_tq_params(), ggml_tq_type_of(type), x.data(), packed.data(), (int64_t) x.size());
    return packed;
}

static std::vector<float> decode(ggml_type type, const std::vector<uint8_t> & packed) {
    std::vector<float> x(packed.size()/ggml_type_size(type)*TQ_BLOCK_SIZE);
    tq_decode(ggml_tq_params(), ggml_tq_type_of(type), packed.data(), x.data(), (int64_t) x.size());
    return x;
}

static void compare(const char * what, ggml_type type, const std::vector<float> & want, const std::vector<float> & got) {
    size_t n = 0;
    size_t first = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        if (memcmp(&want[i], &got[i], sizeof(float)) != 0 && !(std::isnan(want[i]) && std::isnan(got[i]))) {
            first = n++ == 0 ? i : first;
        }
    }
    char detail[160];
    snprintf(detail, sizeof(detail), "%zu of %zu numbers differ, number %zu is %a, want %a", n, want.size(), first, got[first], want[first]);
    report(n == 0 && want.size() == got.size(), what, type, detail);
}

// rows[i] of n_row values are row index[i] of got; the others are untouched
static void compare_rows(const char * what, ggml_type type, int64_t n_row, const std::vector<float> & rows,
        const std::vector<int64_t> & index, const std::vector<uint8_t> & got) {
    const size_t nb = ggml_row_size(type, n_row);
    std::vector<uint8_t> want(got.size(), 0x5a);
    const std::vector<uint8_t> packed = encode(type, rows);
    for (size_t i = 0; i < index.size(); ++i) {
        memcpy(want.data() + index[i]*nb, packed.data() + i*nb, nb);
    }
    size_t n = 0;
    size_t first = 0;
    const size_t size = ggml_type_size(type);
    for (size_t b = 0; b < want.size()/size; ++b) {
        if (memcmp(want.data() + b*size, got.data() + b*size, size) != 0) {
            first = n++ == 0 ? b : first;
        }
    }
    report(n == 0, what, type, std::to_string(n) + " of " + std::to_string(want.size()/size) + " blocks differ, the first is " + std::to_string(first));
}

static void test_set_rows(ggml_type type, std::mt19937_64 & rng, bool index_64, int64_t n_row, int64_t n, int64_t pad) {
    run r;
    const std::vector<float> x = make_rows(n_row*n, rng);
    std::vector<int64_t> index(n + 7);
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), rng);
    index.resize(n);
    ggml_tensor * dst = ggml_new_tensor_2d(r.ctx.get(), type, n_row, n + 7);
    ggml_tensor * all = ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, n_row + pad, n); // rows of a larger tensor
    ggml_tensor * src = ggml_view_2d(r.ctx.get(), all, n_row, n, all->nb[1], 0);
    r.input(all, [&](ggml_tensor * t) {
        for (int64_t i = 0; i < n; ++i) {
            ggml_backend_tensor_set(t, x.data() + i*n_row, i*t->nb[1], n_row*sizeof(float));
        }
    });
    ggml_tensor * idx = ggml_new_tensor_1d(r.ctx.get(), index_64 ? GGML_TYPE_I64 : GGML_TYPE_I32, n);
    if (index_64) {
        r.input(idx, index);
    } else {
        r.input(idx, std::vector<int32_t>(index.begin(), index.end()));
    }
    if (!r.compute({ ggml_set_rows(r.ctx.get(), dst, src, idx) })) {
        report(false, "SET_ROWS", type, "not supported");
        return;
    }
    compare_rows("SET_ROWS", type, n_row, x, index, get<uint8_t>(dst));
}

static void test_copies(ggml_type type, std::mt19937_64 & rng) {
    const int64_t ne[3] = { 192, 5, 7 };
    const std::vector<float>   x = make_rows(ne[0]*ne[1]*ne[2], rng);
    const std::vector<uint8_t> p = encode(type, x);
    const std::vector<float>   y = decode(type, p);
    {
        run r;
        ggml_tensor * dst = ggml_new_tensor_3d(r.ctx.get(), type, ne[0], ne[1], ne[2]);
        ggml_tensor * src = r.input(ggml_new_tensor_3d(r.ctx.get(), GGML_TYPE_F32, ne[0], ne[1], ne[2]), x);
        report(r.compute({ ggml_cpy(r.ctx.get(), src, dst) }), "CPY to", type, "not supported");
        report(get<uint8_t>(dst) == p, "CPY to", type, "the rows differ");
    }
    {
        run r;
        ggml_tensor * src = r.input(ggml_new_tensor_3d(r.ctx.get(), type,          ne[0], ne[1], ne[2]), p);
        ggml_tensor * dst = ggml_new_tensor_1d        (r.ctx.get(), GGML_TYPE_F32, ne[0]*ne[1]*ne[2]); // another shape
        report(r.compute({ ggml_cpy(r.ctx.get(), src, dst) }), "CPY from", type, "not supported");
        compare("CPY from", type, y, get<float>(dst));
    }
    {
        run r; // rows of a permuted tensor
        ggml_tensor * src = r.input(ggml_new_tensor_3d(r.ctx.get(), type,          ne[0], ne[1], ne[2]), p);
        ggml_tensor * dst = ggml_new_tensor_3d        (r.ctx.get(), GGML_TYPE_F32, ne[0], ne[2], ne[1]);
        report(r.compute({ ggml_cpy(r.ctx.get(), ggml_permute(r.ctx.get(), src, 0, 2, 1, 3), dst) }), "CPY from permuted", type, "not supported");
        std::vector<float> want;
        for (int64_t i = 0; i < ne[1]; ++i) {
            for (int64_t j = 0; j < ne[2]; ++j) {
                const auto row = y.begin() + (j*ne[1] + i)*ne[0];
                want.insert(want.end(), row, row + ne[0]);
            }
        }
        compare("CPY from permuted", type, want, get<float>(dst));
    }
    {
        run r;
        const std::vector<int32_t> index = { 3, 0, 34, 3, 17 };
        ggml_tensor * src = r.input(ggml_new_tensor_2d(r.ctx.get(), type, ne[0], ne[1]*ne[2]), p);
        ggml_tensor * idx = r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I32, (int64_t) index.size()), index);
        ggml_tensor * dst = ggml_get_rows(r.ctx.get(), src, idx);
        report(r.compute({ dst }), "GET_ROWS", type, "not supported");
        std::vector<float> want;
        for (const int32_t i : index) {
            want.insert(want.end(), y.begin() + i*ne[0], y.begin() + (i + 1)*ne[0]);
        }
        compare("GET_ROWS", type, want, get<float>(dst));
    }
    {
        run r; // to where no vector of 16 bytes begins
        ggml_tensor * src = r.input(ggml_new_tensor_1d(r.ctx.get(), type, ne[0]*ne[1]*ne[2]), p);
        ggml_tensor * all = ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_F32, ne[0]*ne[1]*ne[2] + 1);
        ggml_tensor * dst = ggml_view_1d(r.ctx.get(), all, ne[0]*ne[1]*ne[2], sizeof(float));
        report(r.compute({ ggml_cpy(r.ctx.get(), src, dst) }), "CPY from, unaligned", type, "not supported");
        std::vector<float> got = get<float>(all);
        got.erase(got.begin());
        compare("CPY from, unaligned", type, y, got);
    }
    {
        run r; // an index for each matrix
        const std::vector<int32_t> index = { 3, 0, 4, 1, 2, 2, 4, 4, 0, 1, 0, 3, 2, 1, 4, 4, 1, 1, 0, 2, 3 };
        ggml_tensor * src = r.input(ggml_new_tensor_3d(r.ctx.get(), type, ne[0], ne[1], ne[2]), p);
        ggml_tensor * idx = r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_I32, 3, ne[2]), index);
        ggml_tensor * dst = ggml_get_rows(r.ctx.get(), src, idx);
        report(r.compute({ dst }), "GET_ROWS of matrices", type, "not supported");
        std::vector<float> want;
        for (size_t i = 0; i < index.size(); ++i) {
            const auto row = y.begin() + ((int64_t) i/3*ne[1] + index[i])*ne[0];
            want.insert(want.end(), row, row + ne[0]);
        }
        compare("GET_ROWS of matrices", type, want, get<float>(dst));
    }
    {
        run r; // any bytes decode
        std::vector<uint8_t> noise(p.size());
        for (uint8_t & b : noise) {
            b = (uint8_t) rng();
        }
        ggml_tensor * src = r.input(ggml_new_tensor_1d(r.ctx.get(), type, ne[0]*ne[1]*ne[2]), noise);
        ggml_tensor * dst = ggml_new_tensor_1d        (r.ctx.get(), GGML_TYPE_F32, ne[0]*ne[1]*ne[2]);
        report(r.compute({ ggml_cpy(r.ctx.get(), src, dst) }), "CPY of noise", type, "not supported");
        compare("CPY of noise", type, decode(type, noise), get<float>(dst));
    }
}

//
// centered keys
//

struct centers {
    int64_t head_dim, n_head;
    int32_t n_rot, neox;
    std::vector<float> m, table;

    centers(int64_t head_dim, int64_t n_head, int32_t n_rot, int32_t neox, std::mt19937_64 & rng) :
            head_dim(head_dim), n_head(n_head), n_rot(n_rot), neox(neox), m(4*head_dim*n_head), table(std::max(1, n_rot)*TQ_CENTER_ROWS) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < head_dim*n_head; ++i) {
            m[i]                       = 3.0f*normal(rng);
            m[i +   head_dim*n_head]   = std::exp(0.3f*normal(rng)); // the scale, and its reciprocal
            m[i + 2*head_dim*n_head]   = 1.0f/m[i + head_dim*n_head];
            m[i + 3*head_dim*n_head]   = 5.0f*normal(rng); // the center at position 0
        }
        std::vector<double> freqs(n_rot/2);
        for (int i = 0; i < n_rot/2; ++i) {
            freqs[i] = std::pow(10000.0, -2.0*i/n_rot);
        }
        tq_center_make_table(freqs.data(), n_rot, table.data());
    }

    void add(int64_t head, int32_t pos, float sign, float * key) const {
        const tq_center c = { (int32_t) head_dim, n_rot, neox, table.data() };
        tq_center_add(&c, m.data() + ((pos > 0 ? 0 : 3*n_head) + head)*head_dim, pos, sign, key);
    }

    // plane 1: by the scales, plane 2: by their reciprocals
    void multiply(int64_t head, int plane, float * key) const {
        for (int64_t i = 0; i < head_dim; ++i) {
            key[i] *= m[(plane*n_head + head)*head_dim + i];
        }
    }

    // r: whose tensors they are
    void attach(run & r, ggml_tensor * op, int first, ggml_tensor * pos) const {
        op->src[first]     = pos;
        op->src[first + 1] = r.input(ggml_new_tensor_3d(r.ctx.get(), GGML_TYPE_F32, head_dim, n_head, 4), m);
        op->src[first + 2] = r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, std::max(1, n_rot), TQ_CENTER_ROWS), table);
        op->src[first + 2]->op_params[0] = neox;
        op->src[first + 2]->op_params[1] = n_rot;
    }
};

static std::vector<int32_t> make_positions(size_t n, std::mt19937_64 & rng) {
    std::vector<int32_t> pos(n);
    for (size_t i = 0; i < n; ++i) {
        pos[i] = i % 5 == 0 ? (int32_t) (rng() % 0x1000000) : (int32_t) (rng() % 3000);
    }
    pos[0]   = 0;
    pos[n/2] = -1; // as in a cell that is empty
    return pos;
}

static void test_set_rows_centered(ggml_type type, std::mt19937_64 & rng, int32_t n_rot, int32_t neox) {
    run r;
    const int64_t n = 11;
    const centers c(128, 3, n_rot, neox, rng);
    const int64_t n_row = c.head_dim*c.n_head;
    std::normal_distribution<float> normal;
    std::vector<float> x(n_row*n);
    for (float & v : x) {
        v = 4.0f*normal(rng);
    }
    const std::vector<int32_t> pos = make_positions(n, rng);
    std::vector<int64_t> index(n);
    std::iota(index.begin(), index.end(), 2);
    ggml_tensor * dst = ggml_new_tensor_2d(r.ctx.get(), type, n_row, n + 4);
    ggml_tensor * src = r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, n_row, n), x);
    ggml_tensor * idx = r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I64, n), index);
    ggml_tensor * op  = ggml_set_rows(r.ctx.get(), dst, src, idx);
    c.attach(r, op, 3, r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I32, n), pos));
    if (!r.compute({ op })) {
        report(false, "SET_ROWS centered", type, "not supported");
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t h = 0; h < c.n_head; ++h) {
            c.add(h, pos[i], -1.0f, x.data() + i*n_row + h*c.head_dim);
            c.multiply(h, 1, x.data() + i*n_row + h*c.head_dim);
        }
    }
    compare_rows("SET_ROWS centered", type, n_row, x, index, get<uint8_t>(dst));
}

// keys and values of a layer, which may be one launch; keys centered
static void test_set_rows_pair(ggml_type k, ggml_type v, std::mt19937_64 & rng, int64_t n) {
    run r;
    const centers c(128, 2, 64, 1, rng);
    const int64_t n_k = c.head_dim*c.n_head;
    const int64_t n_v = 448;
    std::vector<float> x = make_rows(n_k*n, rng);
    const std::vector<float>   y   = make_rows(n_v*n, rng);
    const std::vector<int32_t> pos = make_positions(n, rng);
    std::vector<int64_t> index_k(n), index_v(n);
    for (int64_t i = 0; i < n; ++i) {
        index_k[i] = n - i;
        index_v[i] = (i + 1) % n;
    }
    ggml_tensor * dst_k = ggml_new_tensor_2d(r.ctx.get(), k, n_k, n + 2);
    ggml_tensor * dst_v = ggml_new_tensor_2d(r.ctx.get(), v, n_v, n + 2);
    ggml_tensor * all   = r.input(ggml_new_tensor_3d(r.ctx.get(), GGML_TYPE_F32, n_v/7, 7, n), y);
    ggml_tensor * set_k = ggml_set_rows(r.ctx.get(), dst_k, r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, n_k, n), x),
        r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I64, n), index_k));
    ggml_tensor * set_v = ggml_set_rows(r.ctx.get(), dst_v, ggml_view_2d(r.ctx.get(), all, n_v, n, all->nb[2], 0),
        r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I64, n), index_v));
    c.attach(r, set_k, 3, r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I32, n), pos));
    if (!r.compute({ set_k, set_v })) {
        report(false, "SET_ROWS pair", k, "not supported");
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t h = 0; h < c.n_head; ++h) {
            c.add(h, pos[i], -1.0f, x.data() + i*n_k + h*c.head_dim);
            c.multiply(h, 1, x.data() + i*n_k + h*c.head_dim);
        }
    }
    compare_rows("SET_ROWS pair", k, n_k, x, index_k, get<uint8_t>(dst_k));
    compare_rows("SET_ROWS pair", v, n_v, y, index_v, get<uint8_t>(dst_v));
}

// one after the other to the same rows
static void test_set_rows_again(ggml_type type, std::mt19937_64 & rng) {
    run r;
    const std::vector<float>   x     = make_rows(2*256, rng);
    const std::vector<float>   y     = make_rows(2*256, rng);
    const std::vector<int64_t> index = { 1, 2 };
    ggml_tensor * dst   = ggml_new_tensor_2d(r.ctx.get(), type, 256, 4);
    ggml_tensor * idx   = r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I64, 2), index);
    ggml_tensor * first = ggml_set_rows(r.ctx.get(), dst, r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, 256, 2), x), idx);
    ggml_tensor * next  = ggml_set_rows(r.ctx.get(), dst, r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, 256, 2), y), idx);
    if (!r.compute({ first, next })) {
        report(false, "SET_ROWS again", type, "not supported");
        return;
    }
    compare_rows("SET_ROWS again", type, 256, y, index, get<uint8_t>(dst));
}

// What a layer does before attention: RoPE of queries and keys, SET_ROWS of keys (centered or not) and values, which may be one
// launch. The results are those of RoPE on its own, to the bit, and of the library's encoder. Planned: a scheduler has the graph in
// a model's order first.
struct layer_case {
    ggml_type k, v;
    int64_t n, n_head, n_head_kv;
    int     mode, n_dims, n_offs;
    bool    factors, yarn, centered, planned;
};

static ggml_tensor * rope(run & r, const layer_case & c, ggml_tensor * x, ggml_tensor * pos, ggml_tensor * factors) {
    ggml_tensor * y = ggml_rope_ext(r.ctx.get(), x, pos, factors, c.n_dims, c.mode, 4096, 10000.0f, c.yarn ? 0.25f : 1.0f,
        c.yarn ? 1.0f : 0.0f, c.yarn ? 0.9f : 1.0f, 32.0f, 1.0f);
    if (c.n_offs) {
        ggml_rope_set_offset(y, c.n_offs);
    }
    return y;
}

static void test_layer(const layer_case & c, std::mt19937_64 & rng) {
    const int64_t d     = 128;
    const int64_t n_all = c.n_head + 2*c.n_head_kv; // heads of one projection
    const int64_t n_row = d*c.n_head_kv;
    const centers center(d, c.n_head_kv, 64, c.mode == GGML_ROPE_TYPE_NEOX, rng);
    std::normal_distribution<float> normal;
    std::vector<float> x(d*n_all*c.n), f(c.n_dims/2);
    for (float & v : x) {
        v = 4.0f*normal(rng);
    }
    for (float & v : f) {
        v = std::exp(std::fabs(normal(rng)));
    }
    std::vector<int32_t> pos(c.n);
    std::vector<int64_t> index(c.n);
    for (int64_t i = 0; i < c.n; ++i) {
        pos  [i] = i == 0 ? 0 : (int32_t) (rng() % 40000);
        index[i] = c.n - i;
    }
    const auto heads = [&](run & r, ggml_tensor * all, int64_t first, int64_t n) {
        return ggml_view_3d(r.ctx.get(), all, d, n, c.n, d*sizeof(float), all->nb[1], first*d*sizeof(float));
    };
    const auto inputs = [&](run & r, ggml_tensor ** all, ggml_tensor ** p, ggml_tensor ** factors) {
        *all     = r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, d*n_all, c.n), x);
        *p       = r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I32, c.n), pos);
        *factors = c.factors ? r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_F32, c.n_dims/2), f) : nullptr;
    };
    run alone;
    ggml_tensor * all, * p, * factors;
    inputs(alone, &all, &p, &factors);
    ggml_tensor * q = rope(alone, c, heads(alone, all, 0,        c.n_head   ), p, factors);
    ggml_tensor * k = rope(alone, c, heads(alone, all, c.n_head, c.n_head_kv), p, factors);
    if (!alone.compute({ q, k })) {
        report(false, "layer", c.k, "RoPE not supported");
        return;
    }
    const std::vector<float> want_q = get<float>(q);
    std::vector<float>       want_k = get<float>(k);
    std::vector<float>       want_v;
    for (int64_t i = 0; i < c.n; ++i) {
        const float * v = x.data() + (i*n_all + c.n_head + c.n_head_kv)*d;
        want_v.insert(want_v.end(), v, v + n_row);
        for (int64_t h = 0; c.centered && h < c.n_head_kv; ++h) {
            center.add(h, pos[i], -1.0f, want_k.data() + i*n_row + h*d);
            center.multiply(h, 1, want_k.data() + i*n_row + h*d);
        }
    }

    run r;
    run cache; // apart, as a cache is
    ggml_tensor * dst_k = ggml_new_tensor_2d(cache.ctx.get(), c.k, n_row, c.n + 2);
    ggml_tensor * dst_v = ggml_new_tensor_2d(cache.ctx.get(), c.v, n_row, c.n + 2);
    inputs(r, &all, &p, &factors);
    const auto projection = [&](int64_t first, int64_t n) {
        ggml_tensor * t = heads(r, all, first, n);
        return c.planned ? ggml_cont(r.ctx.get(), t) : t;
    };
    ggml_tensor * v = projection(c.n_head + c.n_head_kv, c.n_head_kv);
    q = rope(r, c, projection(0,        c.n_head   ), p, factors);
    k = rope(r, c, projection(c.n_head, c.n_head_kv), p, factors);
    const auto set_rows = [&](ggml_tensor * dst, ggml_tensor * src) {
        return ggml_set_rows(r.ctx.get(), dst, ggml_view_2d(r.ctx.get(), src, n_row, c.n, src->nb[2], 0),
            r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I64, c.n), index));
    };
    ggml_tensor * set_k = set_rows(dst_k, k);
    ggml_tensor * set_v = set_rows(dst_v, v);
    if (c.centered) {
        center.attach(cache, set_k, 3, p);
    }
    cache.allocate();
    if (c.planned) {
        r.schedule({ q, v, k, set_k, set_v });
    } else {
        r.compute({ q, set_k, set_v });
    }
    if (strncmp(ggml_backend_name(backend), "CUDA", 4) == 0) { // it is one launch: RoPE is next to RoPE, and that of keys is not kept
        int at = 0;
        while (ggml_graph_node(r.graph, at) != q) {
            at++;
        }
        const std::vector<uint8_t> kept = c.planned ? std::vector<uint8_t>() : get<uint8_t>(k);
        const bool one = c.planned ? ggml_graph_node(r.graph, at + 1) == k :
            std::all_of(kept.begin(), kept.end(), [](uint8_t x) { return x == 0x5a; });
        report(one, "layer", c.k, "not in one launch");
    }
    compare     ("layer's queries", c.k, want_q, get<float>(q));
    compare_rows("layer's keys",    c.k, n_row, want_k, index, get<uint8_t>(dst_k));
    compare_rows("layer's values",  c.v, n_row, want_v, index, get<uint8_t>(dst_v));
}

static void test_layers(ggml_type type, std::mt19937_64 & rng) {
    const ggml_type other = type == GGML_TYPE_TQ3_TCQ ? GGML_TYPE_TQ4_TCQ : type == GGML_TYPE_TQ4_TCQ ? GGML_TYPE_TQ3_MSE : type;
    for (const int mode : { GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX }) {
        for (const bool planned : { false, true }) {
            test_layer({ type, other,   1, 8, 2, mode, 128,  0, false, false, false, planned }, rng);
            test_layer({ type, type,    1, 8, 2, mode, 128,  0, true,  false, true,  planned }, rng);
            test_layer({ type, type,    5, 3, 3, mode, 128,  0, true,  true,  false, planned }, rng);
            test_layer({ type, other, 130, 9, 3, mode,  64,  0, false, false, true,  planned }, rng);
            test_layer({ type, type,   17, 4, 1, mode,  96, 32, false, true,  false, planned }, rng);
            test_layer({ type, type,  520, 8, 2, mode, 128,  0, false, false, false, planned }, rng);
        }
    }
}

//
// attention
//

struct attn_case {
    ggml_type type_k, type_v;
    int64_t d_k, d_v, n_head, n_head_kv, n_kv, n_q, n_stream;
    bool    centered;
    bool    in_order = false; // cells hold the positions from some one on, as a cache without gaps does
    bool    sinks    = false;
    float   max_bias = 0.0f;
    float   cap      = 0.0f;
    float   v_scale  = 1.0f;
    int64_t n_stored = 0;     // cells of a stream that the same graph stores, before attention
};

// slope of a head (ALiBi)
static double slope_of(const attn_case & c, int64_t head) {
    if (c.max_bias == 0.0f) {
        return 1.0;
    }
    const int64_t n = (int64_t) 1 << (int) std::floor(std::log2((double) c.n_head));
    return head < n ? std::pow(2.0, -c.max_bias/n*(head + 1)) : std::pow(2.0, -c.max_bias/n/2*(2*(head - n) + 1));
}

// keys or values [d, n_kv, n_head, n_stream] as a cache holds them: [d*n_head, cells, n_stream], more cells than n_kv
static ggml_tensor * cache_view(run & r, ggml_type type, const attn_case & c, int64_t d, const std::vector<uint8_t> & packed) {
    const int64_t n_cells = c.n_kv + 64;
    ggml_tensor * all = ggml_new_tensor_3d(r.ctx.get(), type, d*c.n_head_kv, n_cells, c.n_stream);
    r.input(all, [&packed, n_stream = c.n_stream, n_kv = c.n_kv](ggml_tensor * t) {
        for (int64_t s = 0; s < n_stream; ++s) {
            ggml_backend_tensor_set(t, packed.data() + s*n_kv*t->nb[1], s*t->nb[2], n_kv*t->nb[1]);
        }
    });
    return ggml_view_4d(r.ctx.get(), all, d, c.n_kv, c.n_head_kv, c.n_stream, all->nb[1], ggml_row_size(type, d), all->nb[2], 0);
}

// SET_ROWS of some cells of a cache_view; rows are those of a pack. Before, the cells hold what the first ones do.
static ggml_tensor * store(run & r, ggml_tensor * view, const std::vector<int64_t> & cells, const std::vector<float> & rows) {
    ggml_tensor * all = view->view_src;
    return ggml_set_rows(r.ctx.get(), ggml_reshape_2d(r.ctx.get(), all, all->ne[0], all->ne[1]*all->ne[2]),
        r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_F32, all->ne[0], (int64_t) cells.size()), rows),
        r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I64, (int64_t) cells.size()), cells));
}

// rows of n values; x becomes what a reader sees. Trellis codes take long to find: after some hundred rows they repeat
static std::vector<uint8_t> pack(ggml_type type, std::vector<float> & x, int64_t n, std::vector<float> * before = nullptr) {
    const int64_t n_rows = (int64_t) x.size()/n;
    const int64_t n_own  = std::min<int64_t>(n_rows, 251);
    const size_t  nb     = ggml_row_size(type, n);
    for (int64_t i = n_own; i < n_rows; ++i) {
        memcpy(x.data() + i*n, x.data() + i*7919 % n_own*n, n*sizeof(float));
    }
    if (before) {
        *before = x;
    }
    std::vector<uint8_t> packed(n_rows*nb);
    ggml_quantize_chunk(type, x.data(), packed.data(), 0, n_own, n, nullptr);
    for (int64_t i = n_own; i < n_rows; ++i) {
        memcpy(packed.data() + i*nb, packed.data() + i*7919 % n_own*nb, nb);
    }
    ggml_get_type_traits(type)->to_float(packed.data(), x.data(), n_rows*n);
    return packed;
}

static void test_attention(const attn_case & c, std::mt19937_64 & rng) {
    run r;
    std::normal_distribution<float> normal;
    std::vector<float> q(c.d_k*c.n_q*c.n_head*c.n_stream);
    std::vector<float> k(c.d_k*c.n_head_kv*c.n_kv*c.n_stream); // [d, head, cell, stream]
    std::vector<float> v(c.d_v*c.n_head_kv*c.n_kv*c.n_stream);
    for (float & x : q) { x = normal(rng); }
    for (float & x : k) { x = normal(rng); }
    for (float & x : v) { x = c.v_scale*normal(rng); }
    std::vector<float> kx, vx;
    std::vector<uint8_t> kp = pack(c.type_k, k, c.d_k, &kx);
    std::vector<uint8_t> vp = pack(c.type_v, v, c.d_v, &vx);
    const centers m(c.d_k, c.n_head_kv, (int32_t) (c.n_kv % 2 ? c.d_k : c.d_k/2), c.n_kv % 3 != 0, rng); // both kinds of RoPE
    std::vector<int32_t> pos = make_positions(c.n_kv*c.n_stream, rng);
    for (int64_t i = 0; c.in_order && i < c.n_kv*c.n_stream; ++i) {
        pos[i] = i % c.n_kv == 77 ? 5 : (int32_t) (i % c.n_kv + 65300*(i/c.n_kv)); // one is out of order
    }
    if (c.centered) {
        for (int64_t i = 0; i < c.n_kv*c.n_stream; ++i) {
            for (int64_t h = 0; h < c.n_head_kv; ++h) {
                m.multiply(h, 2, k.data() + (i*c.n_head_kv + h)*c.d_k);
                m.add(h, pos[i], 1.0f, k.data() + (i*c.n_head_kv + h)*c.d_k);
            }
        }
    }
    // the cells that are stored, and what in
    std::vector<int64_t> cells;
    std::vector<float>   stored_k, stored_v;
    std::vector<int32_t> stored_pos;
    const auto is_stored = [&](int64_t cell) { return (c.n_kv - 1 - cell) % 7 == 0 && (c.n_kv - 1 - cell)/7 < c.n_stored; };
    for (int64_t i = 0; i < c.n_kv*c.n_stream; ++i) {
        if (!is_stored(i % c.n_kv)) {
            continue;
        }
        cells.push_back(i/c.n_kv*(c.n_kv + 64) + i % c.n_kv);
        stored_pos.push_back(pos[i]);
        for (int64_t h = 0; h < c.n_head_kv && c.centered; ++h) {
            float * row = kx.data() + (i*c.n_head_kv + h)*c.d_k;
            m.multiply(h, 2, row);
            m.add(h, pos[i], 1.0f, row);
        }
        const auto take = [i, n_head = c.n_head_kv](std::vector<float> & to, const std::vector<float> & from, int64_t d) {
            to.insert(to.end(), from.begin() + i*n_head*d, from.begin() + (i + 1)*n_head*d);
        };
        take(stored_k, kx, c.d_k);
        take(stored_v, vx, c.d_v);
        memcpy(kp.data() + i*c.n_head_kv*ggml_row_size(c.type_k, c.d_k), kp.data(), c.n_head_kv*ggml_row_size(c.type_k, c.d_k));
        memcpy(vp.data() + i*c.n_head_kv*ggml_row_size(c.type_v, c.d_v), vp.data(), c.n_head_kv*ggml_row_size(c.type_v, c.d_v));
    }
    // a cell is seen or not
    std::vector<ggml_fp16_t> mask(c.n_kv*c.n_q*c.n_stream);
    for (size_t i = 0; i < mask.size(); ++i) {
        const bool seen = i % c.n_kv == 0 || is_stored(i % c.n_kv) || (rng() % 8 != 0 && (i % c.n_kv < 100 || i % c.n_kv >= 164)); // no tile of 64 is seen
        mask[i] = ggml_fp32_to_fp16(!seen ? -INFINITY : c.max_bias > 0.0f ? -0.125f*(i % 37) : 0.0f);
    }
    std::vector<float> sinks(c.n_head);
    for (float & x : sinks) { x = 2.0f*normal(rng); }

    ggml_tensor * tq = r.input(ggml_new_tensor_4d(r.ctx.get(), GGML_TYPE_F32, c.d_k, c.n_q, c.n_head, c.n_stream), q);
    ggml_tensor * tk = cache_view(r, c.type_k, c, c.d_k, kp);
    ggml_tensor * tv = cache_view(r, c.type_v, c, c.d_v, vp);
    ggml_tensor * tm = r.input(ggml_new_tensor_4d(r.ctx.get(), GGML_TYPE_F16, c.n_kv, c.n_q, 1, c.n_stream), mask);
    const float scale = 1.0f/std::sqrt((float) c.d_k);
    ggml_tensor * out = ggml_flash_attn_ext(r.ctx.get(), tq, tk, tv, tm, scale, c.max_bias, c.cap);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    if (c.sinks) {
        ggml_flash_attn_ext_add_sinks(out, r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_F32, c.n_head), sinks));
    }
    if (c.centered) {
        m.attach(r, out, 5, r.input(ggml_new_tensor_2d(r.ctx.get(), GGML_TYPE_I32, c.n_kv, c.n_stream), pos));
    }
    char what[256];
    snprintf(what, sizeof(what), "V %s, head dims %d/%d, %d/%d heads, %d cells, %d queries, %d streams%s%s%s, bias %g, cap %g, %d stored", ggml_type_name(c.type_v),
        (int) c.d_k, (int) c.d_v, (int) c.n_head, (int) c.n_head_kv, (int) c.n_kv, (int) c.n_q, (int) c.n_stream,
        c.centered ? ", centered" : "", c.in_order ? " in order" : "", c.sinks ? ", sinks" : "", c.max_bias, c.cap, (int) c.n_stored);
    std::vector<ggml_tensor *> ops = { out };
    if (c.n_stored > 0) {
        ggml_tensor * set_k = store(r, tk, cells, stored_k);
        ggml_tensor * set_v = store(r, tv, cells, stored_v);
        if (c.centered) {
            m.attach(r, set_k, 3, r.input(ggml_new_tensor_1d(r.ctx.get(), GGML_TYPE_I32, (int64_t) cells.size()), stored_pos));
        }
        ops = { set_k, set_v, out };
    }
    if (!r.compute(ops)) {
        report(false, "FLASH_ATTN_EXT", c.type_k, std::string(what) + ": not supported");
        return;
    }
    const std::vector<float> got = get<float>(out); // [d_v, head, query, stream]
    ggml_backend_graph_compute(backend, r.graph);
    report(memcmp(got.data(), get<float>(out).data(), ggml_nbytes(out)) == 0, "FLASH_ATTN_EXT", c.type_k, std::string(what) + ": another result");

    double err  = 0.0;
    double norm = 0.0;
    std::vector<double> w(c.n_kv);
    std::vector<double> want(c.d_v);
    for (int64_t s = 0; s < c.n_stream; ++s) {
        for (int64_t h = 0; h < c.n_head; ++h) {
            const int64_t hkv = h/(c.n_head/c.n_head_kv);
            for (int64_t iq = 0; iq < c.n_q; ++iq) {
                const float * qr = q.data() + ((s*c.n_head + h)*c.n_q + iq)*c.d_k;
                double sum = c.sinks ? std::exp((double) sinks[h]) : 0.0;
                std::fill(want.begin(), want.end(), 0.0);
                for (int64_t i = 0; i < c.n_kv; ++i) {
                    const float * kr = k.data() + ((s*c.n_kv + i)*c.n_head_kv + hkv)*c.d_k;
                    const float * vr = v.data() + ((s*c.n_kv + i)*c.n_head_kv + hkv)*c.d_v;
                    const float bias = ggml_fp16_to_fp32(mask[(s*c.n_q + iq)*c.n_kv + i]);
                    if (bias == -INFINITY) {
                        continue;
                    }
                    double dot = 0.0;
                    for (int64_t j = 0; j < c.d_k; ++j) {
                        dot += (double) qr[j]*kr[j];
                    }
                    const double score = c.cap == 0.0f ? dot*scale : c.cap*std::tanh(dot*scale/c.cap);
                    const double e = std::exp(score + slope_of(c, h)*bias);
                    sum += e;
                    for (int64_t j = 0; j < c.d_v; ++j) {
                        want[j] += e*vr[j];
                    }
                }
                const float * row = got.data() + ((s*c.n_q + iq)*c.n_head + h)*c.d_v;
                for (int64_t j = 0; j < c.d_v; ++j) {
                    err  += std::pow(row[j] - want[j]/sum, 2);
                    norm += std::pow(want[j]/sum, 2);
                }
            }
        }
    }
    // f16 keys, values and weights on a GPU, 8-bit queries on the CPU
    const bool ok = err/norm < 5e-4;
    report(ok, "FLASH_ATTN_EXT", c.type_k, std::string(what) + ": error " + std::to_string(err/norm));
    worst = std::max(worst, err/norm);
}

// every way that FLASH_ATTN_EXT takes
static void test_attentions(const std::vector<ggml_type> & types, std::mt19937_64 & rng) {
    for (const ggml_type type : types) {
        for (const bool centered : { false, true }) {
            test_attention({ type, type,           64,  64,  4, 2, 256, 1,  1, centered }, rng);
            test_attention({ type, GGML_TYPE_F16,  128, 128, 8, 2, 512, 1,  1, centered }, rng);
            test_attention({ type, type,           128, 128, 6, 2, 256, 33, 2, centered }, rng);
            test_attention({ type, GGML_TYPE_Q8_0, 256, 256, 4, 1, 300, 5,  1, centered }, rng);
            // many queries: rows are decoded
            test_attention({ type, type,           64,  64,  5, 5, 701, 40, 1, centered }, rng);
            test_attention({ type, type,           128, 128, 20, 20, 303, 33, 2, centered, true }, rng);
            test_attention({ type, type,           256, 256, 10, 5, 261, 35, 1, centered }, rng);
        }
        test_attention({ GGML_TYPE_F16, type, 128, 128, 8, 2, 512, 7, 1, false }, rng);
    }
    // few queries: every pair of the types, every head dim, groups that fill a tile of rows and that do not
    for (const ggml_type k : types) {
        for (const ggml_type v : { GGML_TQ_TYPE_LIST }) {
            test_attention({ k, v,  64,  64,  9, 3, 300, 1, 1, true, true }, rng);
            test_attention({ k, v, 128, 128, 12, 3, 517, 2, 1, false }, rng);
            test_attention({ k, v, 128, 128,  8, 1, 261, 2, 2, true, true }, rng);
            test_attention({ k, v, 256, 256,  4, 2, 256, 3, 1, false }, rng);
        }
        // values of the _qjl types are left to upstream's kernels, which do not have all of what follows
        const ggml_type v = k >= GGML_TYPE_TQ2_QJL && k <= GGML_TYPE_TQ4_QJL ? (ggml_type) (k - GGML_TYPE_TQ2_QJL + GGML_TYPE_TQ2_MSE) : k;
        for (const int64_t d : { 64, 128, 192, 256 }) {
            for (const int64_t group : { 1, 4, 7, 8 }) {
                for (const int64_t n_q : { 1, 2, 3, 4, 9, 16 }) {
                    const bool even = n_q % 2 == 0;
                    if (d != 192 || group*n_q <= 32) {
                        test_attention({ k, v, d, d, 2*group, 2, 49 + 16*group + 40*n_q, n_q, 1 + (n_q % 3 == 0), even, group != 4 }, rng);
                    }
                }
            }
            test_attention({ k, v, d, d, 4, 1,    3, 1, 1, true,  true }, rng);
            test_attention({ k, v, d, d, 8, 2,  300, 2, 1, true,  true,  true,  0.0f,  0.0f }, rng);
            test_attention({ k, v, d, d, 6, 2,  300, 1, 2, false, false, true,  8.0f,  0.0f }, rng);
            test_attention({ k, v, d, d, 8, 1,  300, 1, 1, true,  true,  false, 0.0f, 10.0f }, rng);
            test_attention({ k, v, d, d, 8, 1,  300, 2, 1, true,  false, true,  8.0f,  5.0f }, rng);
            test_attention({ k, v, d, d, 4, 1, 1300, 1, 1, false, false, false, 0.0f,  0.0f, 1e-3f }, rng);
            test_attention({ k, v, d, d, 4, 1, 1300, 1, 1, false, false, false, 0.0f,  0.0f, 3e3f }, rng);
        }
        // right behind what stores some of the cells
        for (const ggml_type w : { v, GGML_TYPE_TQ3_MSE, GGML_TYPE_TQ3_TCQ }) {
            for (const int64_t n_stored : { 1, 2, 7 }) {
                for (const bool centered : { false, true }) {
                    test_attention({ k, w, 128, 128, 8, 2,  201,        1, 1, centered, true, false, 0.0f, 0.0f, 1.0f, n_stored }, rng);
                    test_attention({ k, w,  64,  64, 6, 2,  280, n_stored, 2, centered, true, false, 0.0f, 0.0f, 1.0f, n_stored }, rng);
                    test_attention({ k, w, 256, 256, 4, 2,  517, n_stored, 1, centered, true, false, 0.0f, 0.0f, 1.0f, n_stored }, rng);
                }
            }
        }
        // so many keys that a block has two key heads, if they are even in number
        test_attention({ k, v,  64,  64, 96, 32, 4100, 1,  1, true,  true }, rng);
        test_attention({ k, v,  64,  64, 64, 32, 4200, 1,  1, false, false, true,  8.0f, 5.0f }, rng);
        test_attention({ k, v,  64,  64, 64, 32,  300, 1, 16, true,  true,  true }, rng);
        test_attention({ k, v,  64,  64,  9,  3, 43700, 1, 1, false }, rng);
        test_attention({ k, v, 128, 128, 32, 32, 4101, 1,  1, true,  false, true }, rng);
        test_attention({ k, v, 128, 128, 16,  8, 4100, 2,  4, true,  true }, rng);
        test_attention({ k, v, 128, 128, 64, 16, 8193, 1,  1, true,  true,  false, 0.0f, 0.0f, 1.0f, 7 }, rng);
        // so few heads that there are more than 32 parts
        test_attention({ k, v, 256, 256,  4,  1, 9000, 1,  1, false, true,  true }, rng);
        test_attention({ k, v, 128, 128, 8, 2, 9000, 1, 1, true,  true }, rng);
        test_attention({ k, v,  64,  64, 4, 4,  5000, 1, 8, false, true }, rng);
    }
}

// the paths of the attention kernel, a case each: so few that a sanitizer gets through them
static void test_few(ggml_type type, std::mt19937_64 & rng) {
    test_set_rows(type, rng, true,  64,   3, 0);
    test_set_rows(type, rng, true, 4096, 67, 0);
    test_layer({ type, type, 2, 8, 2, GGML_ROPE_TYPE_NEOX, 128, 0, true, true, true, true }, rng);
    test_attention({ type, type, 128, 128, 8, 2, 1100, 1, 1, true,  true }, rng);
    test_attention({ type, type, 128, 128, 4, 1,  300, 1, 1, false, true }, rng);
    test_attention({ type, type, 128, 128, 8, 1,  300, 1, 1, true,  true }, rng);
    test_attention({ type, type, 128, 128, 8, 1,  300, 2, 1, true,  true }, rng);
    test_attention({ type, type,  64,  64, 3, 1,  300, 1, 1, true,  true }, rng);
    test_attention({ type, type,  64,  64, 96, 32, 4100, 1, 1, true, true }, rng);
    test_attention({ type, type, 128, 128, 32,  8, 16390, 1, 1, true, true }, rng);
    test_attention({ type, type, 256, 256,  4,  1, 9000, 1, 1, false, true }, rng);
    test_attention({ type, type, 256, 256, 2, 1,  300, 1, 1, false, true }, rng);
    test_attention({ type, type, 128, 128, 8, 2,  256, 1, 1, true, true, false, 0.0f, 0.0f, 1.0f, 7 }, rng);
    test_attention({ type, type, 128, 128, 4, 2,  303, 33, 2, true, true }, rng);
    test_attention({ type, type,  64,  64, 3, 3,  300, 33, 1, false }, rng);
}

// usage: test-backend [DEVICE [PART OF A TYPE'S NAME [few]]]
int main(int argc, char ** argv) {
    ggml_backend_load_all();
    const char * name   = argc > 1 ? argv[1] : "CUDA0";
    const char * filter = argc > 2 ? argv[2] : "";
    std::vector<ggml_type> types; // the others are seen beside them only
    for (const ggml_type type : { GGML_TQ_TYPE_LIST }) {
        if (strstr(ggml_type_name(type), filter)) {
            types.push_back(type);
        }
    }
    ggml_backend_dev_t dev = ggml_backend_dev_by_name(name);
    if (!dev) {
        fprintf(stderr, "no device %s\n", name);
        return 1;
    }
    backend = ggml_backend_dev_init(dev, nullptr);

    std::mt19937_64 rng(1);
    const bool few = argc > 3 && strcmp(argv[3], "few") == 0;
    for (const ggml_type type : types) {
        if (few) {
            test_few(type, rng);
        }
    }
    for (int set = 0; set < 2 && !few; ++set) {
        for (const ggml_type type : types) {
            test_set_rows(type, rng, true,  64,   1,   0);
            test_set_rows(type, rng, true,  1024, 65,  0);
            test_set_rows(type, rng, false, 256,  301, 32);
            test_set_rows(type, rng, true,  4096, 67,  0); // trellises: so many that threads search alone
            test_copies(type, rng);
            test_set_rows_again(type, rng);
            test_layers(type, rng);
            for (const ggml_type v : { GGML_TQ_TYPE_LIST }) {
                test_set_rows_pair(type, v, rng, 3);
                test_set_rows_pair(type, v, rng, 301);
            }
            for (const int32_t n_rot : { 0, 32, 96, 128 }) {
                test_set_rows_centered(type, rng, n_rot, 0);
                test_set_rows_centered(type, rng, n_rot, 1);
            }
        }
        // once more with parameters that a model brings
        static tq_params own = *tq_params_default();
        const float codebook[4] = { -2.0f, -0.25f, 0.5f, 1.0f };
        tq_params_set_seeds(&own, 1, 2);
        tq_params_set_codebook(&own, TQ_TYPE_TQ2_MSE, codebook, 4);
        tq_params_set_codebook(&own, TQ_TYPE_TQ3_QJL, codebook, 4);
        tq_params_set_kappa(&own, TQ_TYPE_TQ3_QJL, 0.75f);
        ggml_tq_set_params(set == 0 ? &own : nullptr);
    }

    if (!few) {
        test_attentions(types, rng);
    }
    printf("%s: %d tests, %d failed; attention's largest error %.1e\n", name, n_tests, n_bad, worst);
    ggml_backend_free(backend);
    return n_bad ? 1 : 0;
}
