#pragma once

// What upstream's common.cuh names of cuBLAS, for compiling our sources where only nvcc is (scripts/gpu/compile.sh).

#include <cuda_runtime.h>

typedef struct cublasContext * cublasHandle_t;
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS };
enum cublasMath_t   { CUBLAS_TF32_TENSOR_OP_MATH };

const char *   cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate         (cublasHandle_t *);
cublasStatus_t cublasDestroy        (cublasHandle_t);
cublasStatus_t cublasSetMathMode    (cublasHandle_t, cublasMath_t);
cublasStatus_t cublasSetStream      (cublasHandle_t, cudaStream_t);
cublasStatus_t cublasSetWorkspace   (cublasHandle_t, void *, size_t);
