#pragma once

// What upstream's llama library asks about the cache types, one call a hook.

#include "ggml-backend.h"
#include "ggml-tq-names.h"

#include <functional>
#include <memory>
#include <vector>

struct llama_model;
struct llama_model_loader;
struct llama_hparams;
struct llama_context_params;
class  llama_kv_cells;
class  llm_graph_result;

enum llama_tq_center_kind { LLAMA_TQ_CENTER_NONE, LLAMA_TQ_CENTER_BIAS, LLAMA_TQ_CENTER_MEAN };

// what a file's turboquant.* metadata says (docs/format.md section 8)
struct llama_tq_model {
    tq_params            params;
    llama_tq_center_kind center_kind = LLAMA_TQ_CENTER_NONE;
    std::vector<float>   centers; // for LLAMA_TQ_CENTER_MEAN: of all layers' key heads, before RoPE
    std::vector<float>   scales;  // of their coordinates
    std::vector<float>   firsts;  // centers at position 0; empty: the same
    uint64_t             center_hash = 0;
};

// model load: that metadata, nullptr if the file has none; throws, naming the key, if it is not valid, and if a weight is
// of a cache type
std::shared_ptr<const llama_tq_model> llama_tq_load(const llama_model_loader & ml, const llama_hparams & hparams);

// llama_context: makes the model's parameters those of the process for as long as the result lives (nullptr: no cache of
// these types). A model that brings none uses the built-in ones, or shares those in use; throws if others are in use.
std::shared_ptr<const void> llama_tq_acquire(const llama_model & model, const llama_context_params & params);

// llama_init_from_model: refuses (with a message, before anything is allocated) a model whose head dims the types do not
// support; for MLA models, whose one tensor is key and value, gives V the K type if both were asked for by role; prints
// the effective types and their bits a value
bool llama_tq_check(const llama_model & model, llama_context_params & params);

// llama_kv_cache: throws if the device that holds layer il's cache cannot store the types or attend to them, or works in
// another process while the model brings parameters of its own; there is no silent fallback
void llama_tq_require_device(ggml_backend_dev_t dev, const llama_hparams & hparams, uint32_t il, bool flash_attn,
    ggml_type type_k, ggml_type type_v);

// K-shift. Only cells whose position changes are decoded, roped and encoded again, whole heads at a time: encoding is
// lossy, and neither sinks nor other sequences may pay for a shift that does not move them.
// llama_tq_shift_cells returns those cells as graph inputs (none if there are none, or the type is not ours;
// GGML_TYPE_COUNT stands for a cache without layers); llama_tq_shift adds one layer's ops. center: of llama_tq_layer.
// rope(cur, shift) turns the coordinates of cur in place; n_nope is how many coordinates of a head precede the roped ones (MLA).
struct llama_tq_moved {
    ggml_tensor * cells   = nullptr; // I32 [n]: indices
    ggml_tensor * leaves  = nullptr; // F32 [1, n]: 1 for a cell that was at position 0, whose center is another; nullptr if none
    ggml_tensor * arrives = nullptr; // the same of a cell that is there now
};

llama_tq_moved llama_tq_shift_cells(llm_graph_result * res, ggml_type type_k, ggml_tensor * k_shift,
    const std::vector<llama_kv_cells> & streams);
void llama_tq_shift(llm_graph_result * res, ggml_tensor * k, const llama_tq_moved & moved, ggml_tensor * center, ggml_tensor * k_shift,
    int64_t n_embd_head, int64_t n_nope, const std::function<ggml_tensor * (ggml_tensor * cur, ggml_tensor * shift)> & rope);

// state restore: "the file holds tq3_qjl, format version 0, parameters 5752e; this context uses q8_0"
std::string llama_tq_state_mismatch(int32_t expected, int32_t found);
