#!/bin/sh
# Build the fork with CUDA, or unpack what was built elsewhere. Needs no network.
#
#   scripts/gpu/build.sh DIR [PROGRAM...]
#
# Sources: build/gpu/upstream.tar.xz (scripts/gpu/pack.py source), or what LLAMA_CPP_DIR names. With
# build/gpu/programs.tar.xz (scripts/gpu/pack.py programs, or relink.sh) nothing is built, unless FROM_SOURCE is set.
# Programs end up in DIR/bin. On 16 cores a build for one architecture takes six minutes.
#   CUDA_ARCH   90 (Hopper)
#   CMAKE_ARGS  more arguments for CMake
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
dir=$1
shift
programs=${*:-llama-perplexity llama-bench llama-completion test-backend-ops test-backend bench-attention bench-set-rows}

mkdir -p "$dir"
if [ -z "${FROM_SOURCE:-}" ] && [ -f "$root/build/gpu/programs.tar.xz" ]; then
    mkdir -p "$dir/bin"
    tar -xJf "$root/build/gpu/programs.tar.xz" -C "$dir/bin"
    exit 0
fi

upstream=${LLAMA_CPP_DIR:-}
if [ -z "$upstream" ]; then
    upstream=$dir/upstream-source
    mkdir -p "$upstream"
    tar -xJf "$root/build/gpu/upstream.tar.xz" -C "$upstream" --skip-old-files
fi

# Libraries are shared, so that programs are small. Without native code the programs run on any x86-64 of the last ten
# years. Vector kernels for the types that are compared with.
start=$(date +%s)
cmake -S "$root" -B "$dir" -G Ninja -DLLAMA_CPP_DIR="$upstream" \
    -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON \
    -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCH:-90}" -DGGML_CUDA_NCCL=OFF \
    -DGGML_CUDA_FA_QUANTS="f16-f16;q8_0-q8_0;q4_0-q4_0;bf16-bf16" \
    -DGGML_NATIVE=OFF -DCMAKE_C_FLAGS=-march=x86-64-v3 -DCMAKE_CXX_FLAGS=-march=x86-64-v3 \
    -DGGML_RPC=OFF ${CMAKE_ARGS:-}
# shellcheck disable=SC2086
cmake --build "$dir" --target $programs
echo "built in $(($(date +%s) - start)) s: $programs"
