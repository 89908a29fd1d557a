#pragma once

// Names and ids of the cache types, for upstream's command lines and for llama.cpp's state files (C++, header only).

#include "ggml-tq-traits.h"

#include <cstdio>
#include <string>

// the stored types as a comma-separated list, for initializers
#define GGML_TQ_TYPE_LIST \
    GGML_TYPE_TQ2_MSE, GGML_TYPE_TQ3_MSE, GGML_TYPE_TQ4_MSE, \
    GGML_TYPE_TQ2_QJL, GGML_TYPE_TQ3_QJL, GGML_TYPE_TQ4_QJL, \
    GGML_TYPE_TQ2_TCQ, GGML_TYPE_TQ3_TCQ, GGML_TYPE_TQ4_TCQ

// "tq3" -> "tq3_qjl" for role 'k', "tq3_mse" for role 'v'; any other name as it is
static inline std::string ggml_tq_resolve_name(const std::string & name, char role) {
    const tq_type_info * info = tq_get_type_info(tq_type_from_name(name.c_str(), role));
    return info ? info->name : name;
}

// the end of upstream's list of allowed values
static inline const char * ggml_tq_names_help() {
    return ", tq2, tq3, tq4 (by role: tqN_qjl for K, tqN_mse for V)";
}

// llama-bench hides the library's messages; those that say why something is refused must pass
static inline void ggml_tq_log_errors(ggml_log_level level, const char * text) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

// llama-bench's list of cache types, and its refusal of others
static inline std::string ggml_tq_bench_types() {
    std::string allowed = "f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl";
    for (const ggml_type type : { GGML_TQ_TYPE_LIST }) {
        allowed += std::string(", ") + ggml_type_name(type);
    }
    return allowed + ggml_tq_names_help();
}

static inline std::string ggml_tq_unknown_name(const std::string & name) {
    return "unsupported cache type: " + name + " (allowed: " + ggml_tq_bench_types() + ")";
}

// what a state file stores as the type of a cached tensor: for our types the format version and the parameters' hash
// ride along (for keys with that of their centers), so that a file of others is refused as one of another type
// (docs/format.md section 7)
static inline int32_t ggml_tq_state_type(ggml_type type, uint64_t center_hash = 0) {
    const uint32_t hash = (uint32_t) (ggml_tq_params()->hash ^ center_hash);
    return ggml_tq_is_type(type)
        ? (int32_t) ((uint32_t) type | (TQ_FORMAT_VERSION + 1) << 8 | hash << 12) : (int32_t) type;
}

// bounds for upstream's test-quantize-fns: 1.25 times what its fixed data (4096 values, rms 1.42) give
static inline float ggml_tq_max_test_error(ggml_type type) {
    static const float max[] = { 0.0092f, 0.0050f, 0.0027f, 0.0105f, 0.0055f, 0.0030f, 0.0076f, 0.0037f, 0.0019f };
    return max[type - GGML_TYPE_TQ2_MSE];
}

static inline float ggml_tq_max_dot_error(ggml_type type) {
    static const float max[] = { 0.144f, 0.048f, 0.015f, 0.030f, 0.0030f, 0.0045f, 0.0032f, 0.0069f, 0.0013f };
    return max[type - GGML_TYPE_TQ2_MSE];
}

// "K = tq3_qjl (3.25 bits per value), V = f16 (16.00 bits per value)"
static inline std::string ggml_tq_describe(ggml_type type_k, ggml_type type_v) {
    char buf[160];
    snprintf(buf, sizeof(buf), "K = %s (%.2f bits per value), V = %s (%.2f bits per value)",
        ggml_type_name(type_k), 8.0*(double) ggml_type_size(type_k)/(double) ggml_blck_size(type_k),
        ggml_type_name(type_v), 8.0*(double) ggml_type_size(type_v)/(double) ggml_blck_size(type_v));
    return buf;
}

// a line for llama-cli's banner, which hides the library's messages; empty if neither type is ours
static inline std::string ggml_tq_banner(ggml_type type_k, ggml_type type_v) {
    return ggml_tq_is_type(type_k) || ggml_tq_is_type(type_v)
        ? "cache      : " + ggml_tq_describe(type_k, type_v) + "\n" : "";
}
