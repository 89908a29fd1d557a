#pragma once

// Centered keys (docs/format.md section 10) in upstream's graphs: the keys of the cache types are stored without the
// center of their layer and head, and attention adds what that takes from the scores.

#include "ggml.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_model;
struct llm_graph_context;
class  llama_kv_cache_context;

// what the ops of one layer need; null where keys are not centered
struct llama_tq_layer {
    ggml_tensor * center = nullptr; // F32 [head_dim, n_head_kv, 4]: centers, scales, 1/scales, those of position 0
    ggml_tensor * table  = nullptr; // F32 [n_rot, TQ_CENTER_ROWS]
};

// the tensors of a cache's layers, beside its keys. llama_kv_cache::tq_layer makes them when it is first asked, since
// RoPE's frequencies are the context's.
struct llama_tq_centers {
    struct cached { uint32_t il; ggml_tensor * k; };

    llama_tq_centers(const llama_model & model, const llama_cparams & cparams, const std::vector<cached> & layers);
    ~llama_tq_centers();

    llama_tq_layer get(const ggml_tensor * k) const;

private:
    struct impl;
    std::unique_ptr<impl> pimpl;
};

// whether t is a layer's `center`; a tensor split gives each device those of its heads
bool llama_tq_is_center(const ggml_tensor * t);

// hash of a model's centers; "by the biases of the key projections"
uint64_t    llama_tq_center_hash    (const llama_model & model);
std::string llama_tq_center_describe(const llama_model & model);

// build_attn: completes set_rows, the op that stores layer il's keys
ggml_tensor * llama_tq_store(const llm_graph_context & graph, ggml_tensor * set_rows, int il);

// build_attn of a layer that stores no keys but reads those of another context's layer (a draft model on its target's cache)
void llama_tq_share(const llm_graph_context & graph, int il);

// build_attn_mha: completes the attention op, if the keys that it reads were stored by llama_tq_store in this graph
void llama_tq_attend(const llm_graph_context & graph, ggml_tensor * flash_attn);
