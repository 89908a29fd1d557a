#include "llama-tq-center.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"
#include "llama-tq.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-tq-ops.h"

#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <tuple>

//
// where centers come from
//

// Not: models whose graphs write keys of their own accord, past llama_tq_store; whose one cached tensor is key and value, or
// whose RoPE turns the last coordinates of a head; whose attention has a bias, which keeps it from flash attention.
static bool supported(const llama_model & model) {
    switch (model.arch) {
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_QWEN4EXP:
        case LLM_ARCH_T5:
            return false;
        default:
            return !model.hparams.is_mla() && model.hparams.n_lora_kv == 0 && model.hparams.rope_type != LLAMA_ROPE_TYPE_VISION;
    }
}

static llama_tq_center_kind kind_of(const llama_model & model) {
    return !supported(model) ? LLAMA_TQ_CENTER_NONE : model.tq ? model.tq->center_kind : LLAMA_TQ_CENTER_BIAS;
}

static std::vector<float> to_host(const ggml_tensor * t, int64_t first, int64_t n) {
    std::vector<float> v(n);
    if (t->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(t, v.data(), first*sizeof(float), n*sizeof(float));
    } else {
        std::vector<uint8_t> raw(ggml_nbytes(t));
        std::vector<float>   all(ggml_nelements(t));
        ggml_backend_tensor_get(t, raw.data(), 0, raw.size());
        ggml_get_type_traits(t->type)->to_float(raw.data(), all.data(), ggml_nelements(t));
        std::copy(all.begin() + first, all.begin() + first + n, v.begin());
    }
    return v;
}

// the bias of the layer's key projection as n_embd_k_gqa numbers of a tensor from `first` on; nullptr if there is none or if
// keys are normalized after it
static const ggml_tensor * key_bias(const llama_model & model, uint32_t il, int64_t & first) {
    const int64_t n = model.hparams.n_embd_k_gqa(il);
    const llama_layer & layer = model.layers[il];
    if (layer.attn_k_norm) {
        return nullptr;
    }
    if (const ggml_tensor * b = layer.wk_b) {
        first = 0;
        return ggml_nelements(b) == n ? b : nullptr;
    }
    if (const ggml_tensor * b = layer.wqkv_b) {
        first = ggml_nelements(b) - n - model.hparams.n_embd_v_gqa(il);
        return first > 0 ? b : nullptr;
    }
    return nullptr;
}

static bool has_key_bias(const llama_model & model) {
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        int64_t first;
        if (key_bias(model, il, first)) {
            return true;
        }
    }
    return false;
}

// [head_dim*n_head_kv] of a layer, from an array of all layers
static std::vector<float> part_of(const llama_model & model, const std::vector<float> & all, uint32_t il) {
    int64_t first = 0;
    for (uint32_t i = 0; i < il; ++i) {
        first += model.hparams.n_embd_k_gqa(i);
    }
    return std::vector<float>(all.begin() + first, all.begin() + first + model.hparams.n_embd_k_gqa(il));
}

// scales of a layer's keys
static std::vector<float> scale_of(const llama_model & model, uint32_t il) {
    return kind_of(model) == LLAMA_TQ_CENTER_MEAN ? part_of(model, model.tq->scales, il)
                                                  : std::vector<float>(model.hparams.n_embd_k_gqa(il), 1.0f);
}

// centers of a layer's keys at position 0, where `center` is that of the others
static std::vector<float> first_of(const llama_model & model, uint32_t il, const std::vector<float> & center) {
    return kind_of(model) == LLAMA_TQ_CENTER_MEAN && !model.tq->firsts.empty() ? part_of(model, model.tq->firsts, il) : center;
}

// [head_dim*n_head_kv] before RoPE, empty if the layer's keys are not centered
static std::vector<float> center_of(const llama_model & model, uint32_t il) {
    switch (kind_of(model)) {
        case LLAMA_TQ_CENTER_NONE: return {};
        case LLAMA_TQ_CENTER_BIAS: {
            int64_t first;
            const ggml_tensor * bias = key_bias(model, il, first);
            return bias ? to_host(bias, first, model.hparams.n_embd_k_gqa(il)) : std::vector<float>();
        }
        case LLAMA_TQ_CENTER_MEAN: break;
    }
    return part_of(model, model.tq->centers, il);
}

uint64_t llama_tq_center_hash(const llama_model & model) {
    switch (kind_of(model)) {
        case LLAMA_TQ_CENTER_NONE: return 0;
        case LLAMA_TQ_CENTER_BIAS: return has_key_bias(model) ? 0x62696173 : 0;
        case LLAMA_TQ_CENTER_MEAN: break;
    }
    return model.tq->center_hash;
}

std::string llama_tq_center_describe(const llama_model & model) {
    if (!supported(model)) {
        return "not centered (this architecture's cannot be)";
    }
    switch (kind_of(model)) {
        case LLAMA_TQ_CENTER_NONE: return "not centered (the file says so)";
        case LLAMA_TQ_CENTER_MEAN:
            return std::string("centered and scaled by the calibration in the file") + (model.tq->firsts.empty() ? "" : ", position 0 apart");
        case LLAMA_TQ_CENTER_BIAS: break;
    }
    return has_key_bias(model) ? "centered by the biases of the key projections"
                               : "not centered (no means in the file, see ggml-tq calibrate, and no key biases)";
}

//
// RoPE as upstream applies it to a layer, as angles a position
//

struct layer_rope {
    int32_t             neox;
    std::vector<double> freqs; // n_rot/2
    float               magnitude;

    bool operator<(const layer_rope & other) const {
        return std::tie(neox, freqs) < std::tie(other.neox, other.freqs);
    }
};

static layer_rope rope_of(const llama_model & model, const llama_cparams & cparams, uint32_t il) {
    const auto & hparams = model.hparams;
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return { 0, {}, 1.0f };
    }
    const int32_t n_rot = std::min(hparams.n_rot(il), hparams.n_embd_head_k(il));
    const float   base  = model.get_rope_freq_base (cparams, il);
    const float   scale = model.get_rope_freq_scale(cparams, il);

    const ggml_tensor * factors = model.get_rope_factors(cparams, il);
    const std::vector<float> factor = factors ? to_host(factors, 0, n_rot/2) : std::vector<float>(n_rot/2, 1.0f);

    float corr_dims[2];
    ggml_rope_yarn_corr_dims(n_rot, cparams.n_ctx_orig_yarn, base, cparams.yarn_beta_fast, cparams.yarn_beta_slow, corr_dims);

    layer_rope rope = { hparams.rope_type != LLAMA_ROPE_TYPE_NORM, {}, cparams.yarn_attn_factor };
    if (cparams.yarn_ext_factor != 0.0f) {
        rope.magnitude *= 1.0f + 0.1f*logf(1.0f/scale);
    }
    for (int32_t i = 0; i < n_rot/2; ++i) {
        const double extrapolated = std::pow((double) base, -2.0*i/n_rot)/factor[i];
        const double y   = (i - corr_dims[0])/std::max(0.001f, corr_dims[1] - corr_dims[0]);
        const double mix = (1.0 - std::min(1.0, std::max(0.0, y)))*cparams.yarn_ext_factor;
        rope.freqs.push_back(extrapolated*(scale*(1.0 - mix) + mix));
    }
    return rope;
}

// a K-shift turns rows as they are stored, scaled: that is right only if both coordinates of a pair have one scale
static void check_pairs(const std::vector<float> & scale, const layer_rope & rope, int64_t head_dim, uint32_t il) {
    const int64_t n_pairs = (int64_t) rope.freqs.size();
    for (int64_t first = 0; first < (int64_t) scale.size(); first += head_dim) {
        for (int64_t i = 0; i < n_pairs; ++i) {
            const int64_t a = rope.neox ? i           : 2*i;
            const int64_t b = rope.neox ? i + n_pairs : 2*i + 1;
            if (scale[first + a] != scale[first + b]) {
                throw std::runtime_error("turboquant.center.scale: in layer " + std::to_string(il) + " coordinates " +
                    std::to_string(a) + " and " + std::to_string(b) + ", which RoPE turns together, have different scales");
            }
        }
    }
}

//
// tensors
//

// begins and ends as names of a cache's tensors do: what splits tensors among devices reads the layer from it
#define CENTER_NAME "cache_tq_center_l"

bool llama_tq_is_center(const ggml_tensor * t) {
    return strncmp(t->name, CENTER_NAME, strlen(CENTER_NAME)) == 0;
}

struct llama_tq_centers::impl {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> contexts;
    std::vector<ggml_backend_buffer_ptr>                   buffers;
    std::map<const ggml_tensor *, llama_tq_layer>          layers; // by cached keys
};

llama_tq_centers::~llama_tq_centers() = default;

llama_tq_layer llama_tq_centers::get(const ggml_tensor * k) const {
    const auto it = pimpl->layers.find(k);
    return it == pimpl->layers.end() ? llama_tq_layer() : it->second;
}

llama_tq_centers::llama_tq_centers(const llama_model & model, const llama_cparams & cparams, const std::vector<cached> & layers) :
        pimpl(std::make_unique<impl>()) {
    std::map<ggml_tensor *, std::vector<float>> data;
    std::map<std::pair<ggml_backend_buffer_type_t, layer_rope>, ggml_tensor *> tables;

    for (const auto & layer : layers) {
        std::vector<float> m = center_of(model, layer.il);
        if (m.empty()) {
            continue;
        }
        const layer_rope rope     = rope_of(model, cparams, layer.il);
        const int64_t    n_rot    = 2*(int64_t) rope.freqs.size();
        const int64_t    head_dim = model.hparams.n_embd_head_k(layer.il);
        std::vector<float> first = n_rot > 0 ? first_of(model, layer.il, m) : m; // keys that do not turn stay as they are in a K-shift
        for (std::vector<float> * center : { &m, &first }) {
            for (size_t i = 0; i < center->size(); ++i) {
                (*center)[i] *= (int64_t) i % head_dim < n_rot ? rope.magnitude : 1.0f;
            }
        }

        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layer.k->buffer);
        ggml_context_ptr & ctx = pimpl->contexts[buft];
        if (!ctx) {
            ctx.reset(ggml_init({ 2*layers.size()*ggml_tensor_overhead(), nullptr, true }));
        }
        ggml_tensor *& table = tables[{ buft, rope }];
        if (!table) {
            std::vector<float> rows(std::max<int64_t>(1, n_rot)*TQ_CENTER_ROWS);
            tq_center_make_table(rope.freqs.data(), (int32_t) n_rot, rows.data());
            table = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, std::max<int64_t>(1, n_rot), TQ_CENTER_ROWS);
            table->op_params[0] = rope.neox;
            table->op_params[1] = (int32_t) n_rot;
            ggml_set_name(table, "tq_center_table");
            data[table] = std::move(rows);
        }
        ggml_tensor * center = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, head_dim, (int64_t) m.size()/head_dim, 4);
        const std::vector<float> scale = scale_of(model, layer.il);
        check_pairs(scale, rope, head_dim, layer.il);
        m.insert(m.end(), scale.begin(), scale.end());
        for (const float s : scale) {
            m.push_back(1.0f/s);
        }
        m.insert(m.end(), first.begin(), first.end());
        ggml_format_name(center, CENTER_NAME "%u", layer.il);
        data[center] = std::move(m);
        pimpl->layers[layer.k] = { center, table };
    }
    for (const auto & [buft, ctx] : pimpl->contexts) {
        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("failed to allocate a buffer for the centers of keys");
        }
        pimpl->buffers.push_back(std::move(buf));
    }
    for (const auto & [tensor, values] : data) {
        ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
    }
}

llama_tq_layer llama_kv_cache::tq_layer(const llama_cparams & cparams, int32_t il) const {
    const auto & layer = layers[map_layer_ids.at(il)];
    if (other) { // keys that this cache shares are centered as their owner stores them
        for (const auto & theirs : other->layers) {
            if (theirs.k == layer.k) {
                return other->tq_layer(cparams, theirs.il);
            }
        }
    }
    if (!ggml_tq_is_type(layer.k->type) || hparams.no_alloc) {
        return {};
    }
    if (!tq_centers) {
        std::vector<llama_tq_centers::cached> cached;
        for (const auto & l : layers) {
            cached.push_back({ l.il, l.k });
        }
        tq_centers = std::make_shared<llama_tq_centers>(model, cparams, cached);
    }
    return tq_centers->get(layer.k);
}

void llama_kv_cache::tq_set_pos(ggml_tensor * dst, const slot_info & sinfo) const {
    std::vector<int32_t> pos(ggml_nelements(dst), 0);
    for (int64_t s = 0; s < dst->ne[1]; ++s) {
        const auto & cells = v_cells[sinfo.s0 + s];
        for (int64_t i = 0; i < dst->ne[0]; ++i) {
            if (!cells.is_empty(i)) {
                pos[s*dst->ne[0] + i] = cells.pos_get(i);
            }
        }
    }
    ggml_backend_tensor_set(dst, pos.data(), 0, ggml_nbytes(dst));
}

llama_tq_layer llama_kv_cache_context::tq_layer(const llama_cparams & cparams, int32_t il) const {
    return kv->tq_layer(cparams, il);
}

void llama_kv_cache_context::tq_set_pos(ggml_tensor * dst) const {
    kv->tq_set_pos(dst, sinfos[i_cur]);
}

//
// graphs
//

// the attention cache in a memory context; nullptr if there is none of a known kind
static const llama_kv_cache_context * cache_of(const llama_memory_context_i * mctx, bool swa) {
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        return hybrid->get_attn();
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) {
        mctx = hybrid->get_attn();
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        return swa ? iswa->get_swa() : iswa->get_base();
    }
    return dynamic_cast<const llama_kv_cache_context *>(mctx);
}

// one a graph and cache: positions of the tokens and of the cells
class llm_graph_input_tq_center : public llm_graph_input_i {
public:
    llm_graph_input_tq_center(const llama_kv_cache_context * cache, bool swa) : cache(cache), swa(swa) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (pos && pos->buffer) {
            ggml_backend_tensor_set(pos, ubatch->pos, 0, ggml_nbytes(pos));
        }
        if (k_pos && k_pos->buffer) {
            cache->tq_set_pos(k_pos);
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        cache = cache_of(params.mctx, swa);
        return cache && pos->ne[0] == params.ubatch.n_tokens && (!k_pos || k_pos->ne[0] == cache->get_n_kv());
    }

    const llama_kv_cache_context * cache;
    const bool    swa;
    ggml_tensor * pos   = nullptr; // I32 [n_tokens]
    ggml_tensor * k_pos = nullptr; // I32 [n_kv, n_stream]
    std::map<const ggml_tensor *, llama_tq_layer> layers; // by cached keys
};

static llm_graph_input_tq_center * find_input(const llm_graph_context & graph, const llama_kv_cache_context * cache, bool swa) {
    for (const auto & input : graph.res->inputs) {
        auto * found = dynamic_cast<llm_graph_input_tq_center *>(input.get());
        if (found && found->cache == cache && found->swa == swa) {
            return found;
        }
    }
    auto input = std::make_unique<llm_graph_input_tq_center>(cache, swa);
    input->pos = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, graph.ubatch.n_tokens);
    ggml_set_input(input->pos);
    return (llm_graph_input_tq_center *) graph.res->add_input(std::move(input));
}

static void require_flash_attn(const llm_graph_context & graph) {
    if (!graph.cparams.flash_attn) {
        throw std::runtime_error("centered keys need flash attention (-fa on, or -fa auto on a device that has it); "
            "supported without: another type for K, or a model of center kind 'none' (ggml-tq stamp --center none)");
    }
}

ggml_tensor * llama_tq_store(const llm_graph_context & graph, ggml_tensor * set_rows, int il) {
    const bool swa = graph.hparams.is_swa(il);
    const llama_kv_cache_context * cache = ggml_tq_is_type(set_rows->type) ? cache_of(graph.mctx, swa) : nullptr;
    const llama_tq_layer layer = cache ? cache->tq_layer(graph.cparams, il) : llama_tq_layer();
    if (!layer.center) {
        return set_rows;
    }
    require_flash_attn(graph);
    auto * input = find_input(graph, cache, swa);
    set_rows->src[GGML_TQ_SRC_SET_ROWS + 0] = input->pos;
    set_rows->src[GGML_TQ_SRC_SET_ROWS + 1] = layer.center;
    set_rows->src[GGML_TQ_SRC_SET_ROWS + 2] = layer.table;
    input->layers[set_rows->view_src] = layer;
    return set_rows;
}

void llama_tq_share(const llm_graph_context & graph, int il) {
    const bool swa = graph.hparams.is_swa(il);
    const llama_kv_cache_context * cache = cache_of(graph.mctx, swa);
    if (!cache || !ggml_tq_is_type(cache->type_k())) {
        return;
    }
    const llama_tq_layer layer = cache->tq_layer(graph.cparams, il);
    if (layer.center) {
        require_flash_attn(graph);
        find_input(graph, cache, swa)->layers[cache->get_k(graph.ctx0, il)->view_src] = layer;
    }
}

void llama_tq_attend(const llm_graph_context & graph, ggml_tensor * flash_attn) {
    const ggml_tensor * k = flash_attn->src[1];
    if (!ggml_tq_is_type(k->type)) {
        return;
    }
    for (const auto & i : graph.res->inputs) {
        auto * input = dynamic_cast<llm_graph_input_tq_center *>(i.get());
        if (!input || input->layers.count(k->view_src) == 0) {
            continue;
        }
        const llama_tq_layer & layer = input->layers[k->view_src];
        if (!input->k_pos) {
            input->k_pos = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, k->ne[1], k->ne[3]);
            ggml_set_input(input->k_pos);
        }
        flash_attn->src[GGML_TQ_SRC_FLASH_ATTN + 0] = input->k_pos;
        flash_attn->src[GGML_TQ_SRC_FLASH_ATTN + 1] = layer.center;
        flash_attn->src[GGML_TQ_SRC_FLASH_ATTN + 2] = layer.table;
        return;
    }
}
