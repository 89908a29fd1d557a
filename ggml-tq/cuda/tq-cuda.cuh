#pragma once

// The TurboQuant cache types on CUDA: what the hooks in ggml-cuda call. docs/format.md is the specification.
//
// Rows are encoded (SET_ROWS, CPY) a warp a block of 64 coordinates; _tcq also searches for paths of codes, a warp or a thread a
// path. They are decoded (GET_ROWS, CPY, the f16 keys and values of FLASH_ATTN_EXT) four lanes a block. FLASH_ATTN_EXT of few
// queries reads packed rows. Positions, frequency factors, and centers and tables of centered keys are read while earlier kernels
// may still run: they are inputs of a graph. Every kernel takes the parameters in use (seeds, codebooks) as an argument, so nothing has to be
// uploaded and nothing can be stale.

#include "convert.cuh"
#include "ggml-tq-traits.h"

// tables of ggml_get_to_{fp16,bf16,fp32}_cuda and their _nc variants; T is half, nv_bfloat16 or float
template <typename T> to_t_cuda_t<T>    ggml_tq_cuda_get_to   (ggml_type type);
template <typename T> to_t_nc_cuda_t<T> ggml_tq_cuda_get_to_nc(ggml_type type);

// SET_ROWS from F32; src[3..5], if set, center the rows (section 10): positions I32 [n_rows], centers F32 [head_dim,
// n_head_kv, 4], table F32 [n_rot, TQ_CENTER_ROWS], of which 768 rows are read
void ggml_tq_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool ggml_tq_cuda_set_rows_supported(const ggml_tensor * dst);

// What a layer does between its projections and attention, in one launch: RoPE of queries (of few tokens) and of keys, where
// the next nodes from i on are those, and SET_ROWS of keys and values. Returns how many nodes to skip after node i; 0: nothing
// was done.
int ggml_tq_cuda_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);

// puts RoPE of queries next to that of keys, so that the above finds both; before tensors have places
void ggml_tq_cuda_graph_optimize(ggml_cgraph * cgraph);

// GET_ROWS to F32, F16 or BF16
void ggml_tq_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// CPY and DUP between F32 and one of the types
void ggml_tq_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst);
bool ggml_tq_cuda_cpy_supported(const ggml_tensor * src, const ggml_tensor * dst);

// FLASH_ATTN_EXT: decodes all of K = dst->src[1] to k_f16[head_dim, n_kv, n_head_kv, n_stream], contiguous, and returns it;
// nb1..nb3 become its strides in bytes. dst->src[5..7], if set, are the centers that are added back: positions of the cells
// I32 [n_kv, n_stream], centers and table as above.
const char * ggml_tq_cuda_keys_to_f16(const ggml_tensor * dst, half * k_f16, size_t & nb1, size_t & nb2, size_t & nb3, cudaStream_t stream);

// FLASH_ATTN_EXT of few queries over packed keys and values, both of the types: true where there is a kernel, which
// ggml_tq_cuda_attention runs
bool ggml_tq_cuda_attention_supported(int device, const ggml_tensor * dst);
void ggml_tq_cuda_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// whether dst->src[first .. first+2] are no centers, or centers that rows of the type and head dim of k can have
bool ggml_tq_cuda_center_supported(const ggml_tensor * dst, const ggml_tensor * k, int first);
