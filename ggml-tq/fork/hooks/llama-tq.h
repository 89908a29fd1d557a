#pragma once

// What upstream's llama library asks about the cache types, one call a hook.

#include "ggml-backend.h"
#include "ggml-tq-names.h"

struct llama_model;
struct llama_context_params;

// llama_init_from_model: refuses (with a message, before anything is allocated) a model whose head dims the types do not
// support; for MLA models, whose one tensor is key and value, gives V the K type if both were asked for by role; prints
// the effective types and their bits a value
bool llama_tq_check(const llama_model & model, llama_context_params & params);

// llama_kv_cache: throws if the device that holds a layer's cache cannot store the types; there is no silent fallback
void llama_tq_require_device(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v);

// state restore: "the file holds tq3_qjl, format version 0; this context uses q8_0"
std::string llama_tq_state_mismatch(int32_t expected, int32_t found);
