#include "llama-tq.h"
#include "llama-tq-center.h"

#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <mutex>
#include <stdexcept>

//
// parameters: from the file, and in the process
//

static const std::string PREFIX = "turboquant.";

static void refuse(const std::string & key, const std::string & problem) {
    throw std::runtime_error(key + ": " + problem);
}

static int64_t find(const gguf_context * gguf, const std::string & key) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0) {
        refuse(key, "missing");
    }
    return id;
}

// the value of a key of a certain type; throws if there is none. An array's elements follow the first.
template <typename T>
static const T * get(const gguf_context * gguf, const std::string & key, gguf_type type, size_t * n = nullptr) {
    const int64_t id = find(gguf, key);
    if (n == nullptr) {
        if (gguf_get_kv_type(gguf, id) != type) {
            refuse(key, std::string("wrong type, want ") + gguf_type_name(type));
        }
        return (const T *) gguf_get_val_data(gguf, id);
    }
    if (gguf_get_kv_type(gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, id) != type) {
        refuse(key, std::string("wrong type, want an array of ") + gguf_type_name(type));
    }
    *n = gguf_get_arr_n(gguf, id);
    return (const T *) gguf_get_arr_data(gguf, id);
}

static void check_keys(const gguf_context * gguf) {
    std::vector<std::string> known = { "version", "rotation.kind", "rotation.seed", "sketch.seed", "hash",
        "center.kind", "center.key", "center.scale", "center.first", "center.hash" };
    for (int t = 0; t < TQ_QUANTIZER_COUNT; ++t) {
        const tq_type_info * info = tq_get_type_info((tq_type) t);
        known.push_back(std::string(info->name) + ".codebook");
        if (info->kind == TQ_KIND_QJL) {
            known.push_back(std::string(info->name) + ".kappa");
        }
    }
    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        const std::string key = gguf_get_key(gguf, i);
        if (key.rfind(PREFIX, 0) != 0 || key.rfind(PREFIX + "provenance.", 0) == 0) {
            continue;
        }
        if (std::find(known.begin(), known.end(), key.substr(PREFIX.size())) == known.end()) {
            refuse(key, "unknown key");
        }
    }
}

static bool has_metadata(const gguf_context * gguf) {
    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        if (std::string(gguf_get_key(gguf, i)).rfind(PREFIX, 0) == 0) {
            return true;
        }
    }
    return false;
}

static std::string get_string(const gguf_context * gguf, const std::string & key) {
    const int64_t id = find(gguf, key);
    if (gguf_get_kv_type(gguf, id) != GGUF_TYPE_STRING) {
        refuse(key, "wrong type, want str");
    }
    return gguf_get_val_str(gguf, id);
}

// want numbers that are all valid; their bytes go into the hash
static std::vector<float> load_numbers(const gguf_context * gguf, const std::string & key, size_t want, const char * invalid,
        uint64_t & hash, bool (*valid)(float)) {
    size_t n = 0;
    const float * values = get<float>(gguf, key, GGUF_TYPE_FLOAT32, &n);
    if (n != want) {
        refuse(key, std::to_string(n) + " numbers, want " + std::to_string(want));
    }
    for (size_t i = 0; i < n; ++i) {
        if (!valid(values[i])) {
            refuse(key, "number " + std::to_string(i) + " is " + invalid);
        }
        hash = tq_hash_float(hash, values[i]);
    }
    return std::vector<float>(values, values + n);
}

static void load_centers(const gguf_context * gguf, const llama_hparams & hparams, llama_tq_model & tq) {
    const std::string kind = get_string(gguf, PREFIX + "center.kind");
    const std::string key  = PREFIX + "center.key";
    tq.center_hash = 0;
    if (kind != "mean") {
        if (kind != "none" && kind != "bias") {
            refuse(PREFIX + "center.kind", "unknown kind '" + kind + "', want 'none', 'bias' or 'mean'");
        }
        tq.center_kind = kind == "none" ? LLAMA_TQ_CENTER_NONE : LLAMA_TQ_CENTER_BIAS;
        for (const std::string & other : { key, PREFIX + "center.scale", PREFIX + "center.first", PREFIX + "center.hash" }) {
            if (gguf_find_key(gguf, other.c_str()) >= 0) {
                refuse(other, "not allowed, since " + PREFIX + "center.kind is '" + kind + "'");
            }
        }
        return;
    }
    tq.center_kind = LLAMA_TQ_CENTER_MEAN;
    size_t want = 0;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        want += hparams.n_embd_k_gqa(il);
    }
    uint64_t hash = TQ_HASH_START;
    const auto load = [&](const std::string & key) {
        return load_numbers(gguf, key, want, "not finite, or not below 1e6", hash, [](float m) { return std::fabs(m) < 1e6f; });
    };
    tq.centers = load(key);
    tq.scales = load_numbers(gguf, PREFIX + "center.scale", want, "not from 1/1024 to 1024", hash, [](float s) {
        return s >= 1.0f/1024.0f && s <= 1024.0f;
    });
    if (gguf_find_key(gguf, (PREFIX + "center.first").c_str()) >= 0) {
        tq.firsts = load(PREFIX + "center.first");
    }
    if (*get<uint64_t>(gguf, PREFIX + "center.hash", GGUF_TYPE_UINT64) != hash) {
        refuse(PREFIX + "center.hash", "not that of the centers, which were changed or damaged");
    }
    tq.center_hash = hash;
}

std::shared_ptr<const llama_tq_model> llama_tq_load(const llama_model_loader & ml, const llama_hparams & hparams) {
    for (const auto & [name, weight] : ml.weights_map) { // they would change with the parameters in use
        if (ggml_tq_is_type(weight.tensor->type) || weight.tensor->type == GGML_TYPE_TQ_QUERY) {
            throw std::runtime_error("weight '" + name + "' is of type " + ggml_type_name(weight.tensor->type) +
                ", which is for caches only");
        }
    }
    const gguf_context * gguf = ml.metadata;
    if (!has_metadata(gguf)) {
        return nullptr;
    }
    // the version first: what another one means by the other keys is not known here
    const uint32_t version = *get<uint32_t>(gguf, PREFIX + "version", GGUF_TYPE_UINT32);
    if (version != TQ_FORMAT_VERSION) {
        refuse(PREFIX + "version", "unknown version " + std::to_string(version) + ", this program knows " + std::to_string(TQ_FORMAT_VERSION));
    }
    check_keys(gguf);
    const std::string kind = get_string(gguf, PREFIX + "rotation.kind");
    if (kind != "rht64") {
        refuse(PREFIX + "rotation.kind", "unknown rotation '" + kind + "', want 'rht64'");
    }

    auto model = std::make_shared<llama_tq_model>();
    tq_params * params = &model->params;
    *params = *tq_params_default();
    tq_params_set_seeds(params,
        *get<uint64_t>(gguf, PREFIX + "rotation.seed", GGUF_TYPE_UINT64),
        *get<uint64_t>(gguf, PREFIX + "sketch.seed",   GGUF_TYPE_UINT64));
    for (int t = 0; t < TQ_QUANTIZER_COUNT; ++t) {
        const tq_type_info * info = tq_get_type_info((tq_type) t);
        const std::string codebook = PREFIX + info->name + ".codebook";
        size_t n = 0;
        const float * centroids = get<float>(gguf, codebook, GGUF_TYPE_FLOAT32, &n);
        if (const char * problem = tq_params_set_codebook(params, (tq_type) t, centroids, n)) {
            refuse(codebook, problem);
        }
        if (info->kind == TQ_KIND_QJL) {
            const std::string kappa = PREFIX + info->name + ".kappa";
            if (const char * problem = tq_params_set_kappa(params, (tq_type) t, *get<float>(gguf, kappa, GGUF_TYPE_FLOAT32))) {
                refuse(kappa, problem);
            }
        }
    }
    if (*get<uint64_t>(gguf, PREFIX + "hash", GGUF_TYPE_UINT64) != params->hash) {
        refuse(PREFIX + "hash", "not that of the parameters, which were changed or damaged");
    }
    if (!hparams.vocab_only) { // without it the layers are not known
        load_centers(gguf, hparams, *model);
    }
    return model;
}

// who uses the process's parameters
static struct {
    std::mutex  mutex;
    int         n_users = 0;
    std::string owner; // the model that they came with
} in_use;

static std::string describe(const std::string & name, uint64_t hash) {
    char buf[32];
    snprintf(buf, sizeof(buf), "%016" PRIx64, hash);
    return hash == tq_params_default()->hash ? "the built-in ones" : "those of model '" + name + "' (hash " + buf + ")";
}

std::shared_ptr<const void> llama_tq_acquire(const llama_model & model, const llama_context_params & params) {
    if (!ggml_tq_is_type(params.type_k) && !ggml_tq_is_type(params.type_v)) {
        return nullptr;
    }
    std::lock_guard<std::mutex> lock(in_use.mutex);
    const uint64_t wanted = model.tq ? model.tq->params.hash : tq_params_default()->hash;
    if (in_use.n_users == 0) {
        ggml_tq_set_params(model.tq ? &model.tq->params : nullptr);
        in_use.owner = model.name;
    }
    const uint64_t active = ggml_tq_params()->hash;
    if (wanted != active && model.tq) {
        throw std::runtime_error("one process has one set of TurboQuant parameters: this model wants " +
            describe(model.name, wanted) + ", in use are " + describe(in_use.owner, active));
    }
    LLAMA_LOG_WARN("%s: TurboQuant parameters: %s%s\n", __func__, describe(in_use.owner, active).c_str(),
        wanted != active ? ", which this model, as it brings none, shares" : "");
    if (ggml_tq_is_type(params.type_k)) {
        LLAMA_LOG_WARN("%s: keys are %s\n", __func__, llama_tq_center_describe(model).c_str());
    }
    in_use.n_users++;
    return std::shared_ptr<const void>(&in_use, [](const void *) {
        std::lock_guard<std::mutex> lock(in_use.mutex);
        in_use.n_users--;
    });
}

//
// checks
//

static bool check_head_dims(const llama_model & model, ggml_type type, char role) {
    const auto & hparams = model.hparams;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il)) {
            continue;
        }
        const uint32_t n_head_kv = hparams.n_head_kv(il);
        const uint32_t head_dim  = role == 'K' ? hparams.n_embd_head_k(il) : hparams.n_embd_head_v(il);
        if (n_head_kv > 0 && head_dim % TQ_BLOCK_SIZE != 0) {
            LLAMA_LOG_ERROR("%s: cache type %s does not support this model's %c head dim of %u (layer %u): supported are "
                "multiples of %d (64, 128, 192, 256, 512, 576, ...); use another type for %c, such as q8_0\n",
                __func__, ggml_type_name(type), role, head_dim, il, TQ_BLOCK_SIZE, role);
            return false;
        }
    }
    return true;
}

bool llama_tq_check(const llama_model & model, llama_context_params & params) {
    const bool one_tensor = model.hparams.is_mla() || model.arch == LLM_ARCH_DEEPSEEK4; // upstream wants one type for both
    const bool by_role    = ggml_tq_is_type(params.type_k) && ggml_tq_is_type(params.type_v) &&
        params.type_k - GGML_TYPE_TQ2_QJL == params.type_v - GGML_TYPE_TQ2_MSE;
    if (one_tensor && by_role) {
        LLAMA_LOG_WARN("%s: this model (MLA) caches keys and values in one tensor, of the type for K: %s\n",
            __func__, ggml_type_name(params.type_k));
        params.type_v = params.type_k;
    }
    if (ggml_tq_is_type(params.type_k) && !check_head_dims(model, params.type_k, 'K')) {
        return false;
    }
    if (ggml_tq_is_type(params.type_v) && !check_head_dims(model, params.type_v, 'V')) {
        return false;
    }
    // as a warning, because the programs do not show the library's other messages by default
    if (ggml_tq_is_type(params.type_k) || ggml_tq_is_type(params.type_v)) {
        LLAMA_LOG_WARN("%s: cache types: %s\n", __func__, ggml_tq_describe(params.type_k, params.type_v).c_str());
    }
    return true;
}

// whether a device can do what a layer's cache needs; it is asked itself, with ops of the layer's shape
static bool can_store(ggml_backend_dev_t dev, ggml_context * ctx, ggml_type type) {
    return ggml_backend_dev_supports_op(dev, ggml_set_rows(ctx,
        ggml_new_tensor_2d(ctx, type,          TQ_BLOCK_SIZE, 1),
        ggml_new_tensor_2d(ctx, GGML_TYPE_F32, TQ_BLOCK_SIZE, 1),
        ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1)));
}

static bool can_attend(ggml_backend_dev_t dev, ggml_context * ctx, const llama_hparams & hparams, uint32_t il, bool flash_attn,
        ggml_type type_k, ggml_type type_v) {
    const int64_t n_kv = 256;
    for (const int64_t n_tokens : { 1, 64 }) {
        ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hparams.n_embd_head_k(il), n_tokens, hparams.n_head(il));
        ggml_tensor * k    = ggml_new_tensor_3d(ctx, type_k,        hparams.n_embd_head_k(il), n_kv,     hparams.n_head_kv(il));
        ggml_tensor * v    = ggml_new_tensor_3d(ctx, type_v,        hparams.n_embd_head_v(il), n_kv,     hparams.n_head_kv(il));
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_tokens);
        ggml_tensor * op   = flash_attn ? ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, hparams.f_max_alibi_bias,
            hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f) : ggml_mul_mat(ctx, k, q);
        if (!ggml_backend_dev_supports_op(dev, op)) {
            return false;
        }
    }
    return true;
}

void llama_tq_require_device(ggml_backend_dev_t dev, const llama_hparams & hparams, uint32_t il, bool flash_attn, ggml_type type_k, ggml_type type_v) {
    if (!ggml_tq_is_type(type_k) && !ggml_tq_is_type(type_v)) {
        return;
    }
    ggml_context_ptr ctx { ggml_init({ 32*ggml_tensor_overhead(), nullptr, true }) };
    const auto refuse = [&](const std::string & what) {
        throw std::runtime_error(what + " not supported on device " + ggml_backend_dev_name(dev) +
            "; supported: the CPU (--no-kv-offload, or -ngl 0)");
    };
    for (const ggml_type type : { type_k, type_v }) {
        if (ggml_tq_is_type(type) && !can_store(dev, ctx.get(), type)) {
            refuse(std::string("cache type ") + ggml_type_name(type) + " is");
        }
    }
    // in MLA models values are a part of keys: their one tensor is of a type that the device stores, or not
    if (!hparams.is_mla() && !can_attend(dev, ctx.get(), hparams, il, flash_attn, type_k, type_v)) {
        refuse(std::string("attention ") + (flash_attn ? "" : "without flash attention ") + "over K " + ggml_type_name(type_k) +
            " and V " + ggml_type_name(type_v) + " with head dims " + std::to_string(hparams.n_embd_head_k(il)) + " and " +
            std::to_string(hparams.n_embd_head_v(il)) + " is");
    }
    // A device in another process has the built-in parameters. One made of several belongs to no registry, and is named after them.
    const bool several = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_META;
    const std::string where = several ? ggml_backend_dev_name(dev) : ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev));
    if (where.find("RPC") != std::string::npos && ggml_tq_params()->hash != tq_params_default()->hash) {
        throw std::runtime_error(std::string("device ") + ggml_backend_dev_name(dev) + " cannot use a model's own TurboQuant "
            "parameters; supported: the CPU (--no-kv-offload, or -ngl 0), or a model without (ggml-tq strip)");
    }
}

class llm_graph_input_tq_shift : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch *) override {
        const auto set = [](ggml_tensor * t, const void * data) {
            if (t && t->buffer) { // not if no layer's keys are centered
                ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
            }
        };
        set(moved.cells,   index.data());
        set(moved.leaves,  leaves.data());
        set(moved.arrives, arrives.data());
    }

    llama_tq_moved       moved;
    std::vector<int32_t> index;
    std::vector<float>   leaves;
    std::vector<float>   arrives;
};

llama_tq_moved llama_tq_shift_cells(llm_graph_result * res, ggml_type type_k, ggml_tensor * k_shift,
        const std::vector<llama_kv_cells> & streams) {
    if (!ggml_tq_is_type(type_k) && type_k != GGML_TYPE_COUNT) {
        return {};
    }
    auto inp = std::make_unique<llm_graph_input_tq_shift>();
    int32_t first = 0;
    for (const auto & cells : streams) {
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (!cells.is_empty(i) && cells.get_shift(i) != 0) {
                inp->index  .push_back(first + (int32_t) i);
                inp->leaves .push_back(cells.pos_get(i) - cells.get_shift(i) == 0 ? 1.0f : 0.0f);
                inp->arrives.push_back(cells.pos_get(i) == 0 ? 1.0f : 0.0f);
            }
        }
        first += (int32_t) cells.size();
    }
    if (inp->index.empty() || type_k == GGML_TYPE_COUNT) {
        // shifts that cancel, or no layers: upstream still fills k_shift, so something in the graph has to own it
        ggml_build_forward_expand(res->get_gf(), ggml_dup(res->get_ctx(), k_shift));
        return {};
    }
    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ggml_new_tensor_2d(res->get_ctx(), type, ne0, ne1);
        ggml_set_input(t);
        return t;
    };
    const int64_t n = (int64_t) inp->index.size();
    const auto any = [](const std::vector<float> & v) { return std::find(v.begin(), v.end(), 1.0f) != v.end(); };
    const llama_tq_moved moved = {
        input(GGML_TYPE_I32, n, 1),
        any(inp->leaves)  ? input(GGML_TYPE_F32, 1, n) : nullptr,
        any(inp->arrives) ? input(GGML_TYPE_F32, 1, n) : nullptr,
    };
    inp->moved = moved;
    res->add_input(std::move(inp));
    return moved;
}

void llama_tq_shift(llm_graph_result * res, ggml_tensor * k, const llama_tq_moved & moved, ggml_tensor * center, ggml_tensor * k_shift,
        int64_t n_embd_head, int64_t n_nope, const std::function<ggml_tensor * (ggml_tensor * cur, ggml_tensor * shift)> & rope) {
    if (!moved.cells) {
        return;
    }
    ggml_context * ctx = res->get_ctx();
    const int64_t n_cells = moved.cells->ne[0];
    const int64_t n_row   = k->ne[0];

    ggml_tensor * shift = ggml_get_rows(ctx, ggml_reshape_2d(ctx, k_shift, 1, ggml_nelements(k_shift)), moved.cells);
    shift = ggml_reshape_1d(ctx, shift, n_cells);

    ggml_tensor * rows = ggml_view_2d(ctx, k, n_row, k->ne[1]*k->ne[2], k->nb[1], 0); // all streams
    ggml_tensor * cur  = ggml_get_rows(ctx, rows, moved.cells);                       // F32

    // what a row at position 0 lacks of one with the center of the other positions, both scaled, in the cells of `which`
    const auto difference = [&](ggml_tensor * which) {
        const auto plane = [&](int i) { return ggml_view_1d(ctx, center, n_row, i*center->nb[2]); };
        ggml_tensor * d = ggml_mul(ctx, ggml_sub(ctx, plane(0), plane(3)), plane(1));
        return ggml_mul(ctx, ggml_repeat_4d(ctx, d, n_row, n_cells, 1, 1), which);
    };
    if (center && moved.leaves) {
        cur = ggml_sub(ctx, cur, difference(moved.leaves));
    }
    cur = ggml_reshape_3d(ctx, cur, n_embd_head, n_row/n_embd_head, n_cells);
    if (n_nope > 0) {
        ggml_tensor * nope = ggml_view_3d(ctx, cur, n_nope, cur->ne[1], n_cells, cur->nb[1], cur->nb[2], 0);
        ggml_tensor * part = ggml_view_3d(ctx, cur, n_embd_head - n_nope, cur->ne[1], n_cells, cur->nb[1], cur->nb[2],
            n_nope*cur->nb[0]);
        cur = ggml_concat(ctx, nope, rope(ggml_cont(ctx, part), shift), 0);
    } else {
        cur = rope(cur, shift); // leaves what lies behind the roped coordinates
    }
    cur = ggml_reshape_2d(ctx, cur, n_row, n_cells);
    if (center && moved.arrives) {
        cur = ggml_add(ctx, cur, difference(moved.arrives));
    }
    ggml_build_forward_expand(res->get_gf(), ggml_set_rows(ctx, rows, cur, moved.cells));
}

static std::string describe_state(int32_t state_type) {
    const uint32_t tag  = (uint32_t) state_type;
    const uint32_t type = tag & 0xff;
    const bool     ours = ggml_tq_is_type((ggml_type) type);
    if (type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0 || (tag != type && !ours)) {
        return "an unknown type (" + std::to_string(state_type) + ")";
    }
    const std::string name = ggml_type_name((ggml_type) type);
    if (!ours) {
        return name;
    }
    if (tag == type) {
        return name + ", without a format version";
    }
    char buf[64];
    snprintf(buf, sizeof(buf), ", format version %u, parameters %05x", (tag >> 8 & 0xf) - 1, tag >> 12);
    return name + buf;
}

std::string llama_tq_state_mismatch(int32_t expected, int32_t found) {
    return "the file holds " + describe_state(found) + "; this context uses " + describe_state(expected);
}
