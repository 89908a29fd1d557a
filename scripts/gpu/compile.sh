#!/bin/sh
# Whether the CUDA sources of the cache types compile, on a machine with nvcc but without a GPU or cuBLAS.
#
#   scripts/gpu/compile.sh UPSTREAM [ARCH...]
#
# UPSTREAM is the patched copy, build/llama.cpp; ARCH are 75 and 90 unless named. One of the nine files of attention's
# instances stands for all.
#   NVCC  nvcc
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
ggml=$1/ggml
shift
cuda=$root/ggml-tq/cuda
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

compile() {
    echo "sm_$arch: $1"
    "${NVCC:-nvcc}" -std=c++17 -O3 -arch="sm_$arch" -extended-lambda -use_fast_math $2 \
        -I"$root/tests/cuda/stub" -I"$ggml/src/ggml-cuda" -I"$ggml/include" -I"$ggml/src" -I"$cuda" \
        -I"$root/ggml-tq/fork/hooks" -I"$root/ggml-tq/include" -I"$root/ggml-tq/src" \
        -c "$cuda/$1" -o "$out/object.o"
}

for arch in ${*:-75 90}; do
    for source in tq-encode tq-decode tq-fuse tq-ops; do
        compile $source.cu "-fmad=false -ftz=false -prec-div=true -prec-sqrt=true" # as cmake/fork.cmake
    done
    compile tq-attention.cu ""
    compile template-instances/tq-attention-tq3_tcq.cu ""
done
