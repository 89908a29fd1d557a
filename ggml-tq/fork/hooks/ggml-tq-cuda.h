#pragma once

// What the hooks in ggml-cuda include. Upstream builds those files for AMD (HIP) and Moore Threads (MUSA) too, for which
// there are no kernels: such a device says that it supports no op on the cache types, and a cache on it is refused.

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

#include "convert.cuh"
#include "ggml-tq-traits.h"

#define GGML_TQ_CUDA_CASES

template <typename T> static to_t_cuda_t<T>    ggml_tq_cuda_get_to   (ggml_type) { return nullptr; }
template <typename T> static to_t_nc_cuda_t<T> ggml_tq_cuda_get_to_nc(ggml_type) { return nullptr; }

static inline bool ggml_tq_cuda_set_rows_supported (const ggml_tensor *)                      { return false; }
static inline bool ggml_tq_cuda_cpy_supported      (const ggml_tensor *, const ggml_tensor *) { return false; }
static inline bool ggml_tq_cuda_attention_supported(int, const ggml_tensor *)                 { return false; }
static inline bool ggml_tq_cuda_center_supported   (const ggml_tensor * dst, const ggml_tensor * k, int) {
    return !ggml_tq_is_type(k->type) && !ggml_tq_is_type(dst->src[2]->type);
}

static inline int  ggml_tq_cuda_fuse(ggml_backend_cuda_context &, const ggml_cgraph *, int)                { return 0; }
static inline void ggml_tq_cuda_graph_optimize(ggml_cgraph *)                                              {}
static inline void ggml_tq_cuda_set_rows (ggml_backend_cuda_context &, ggml_tensor *)                      { GGML_ABORT("not supported"); }
static inline void ggml_tq_cuda_get_rows (ggml_backend_cuda_context &, ggml_tensor *)                      { GGML_ABORT("not supported"); }
static inline void ggml_tq_cuda_attention(ggml_backend_cuda_context &, ggml_tensor *)                      { GGML_ABORT("not supported"); }
static inline void ggml_tq_cuda_cpy(ggml_backend_cuda_context &, const ggml_tensor *, ggml_tensor *)       { GGML_ABORT("not supported"); }
static inline const char * ggml_tq_cuda_keys_to_f16(const ggml_tensor *, half *, size_t &, size_t &, size_t &, cudaStream_t) {
    GGML_ABORT("not supported");
}

#else

#include "tq-cuda.cuh"

#define GGML_TQ_CUDA_CASES GGML_TQ_CASES

#endif
