#!/bin/sh
# The C library and its tests for 64-bit Arm, built here and run under an emulator: with NEON, and with its dot products.
# What an emulator needs says nothing about speed.
# usage: scripts/test_arm.sh [SEED]
# CC, CXX: the cross compilers, QEMU: the emulator, if they have other names than below.
set -e

CC=${CC:-aarch64-linux-gnu-gcc}
CXX=${CXX:-aarch64-linux-gnu-g++}
QEMU=${QEMU:-qemu-aarch64-static}
cd "$(dirname "$0")/.."

for tool in "$CC" "$CXX" "$QEMU"; do
    if ! command -v "$tool" > /dev/null; then
        echo "not run: there is no $tool (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)" >&2
        exit 1
    fi
done

out=build/arm
cmake -S . -B $out -DGGML_TQ_FORK=OFF -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER="$CC" -DCMAKE_CXX_COMPILER="$CXX"
cmake --build $out --target test-tq
root=$(dirname "$(dirname "$("$CC" -print-file-name=libc.so.6)")") # the target's /

seed=${1:-$(date +%s)}
echo "== without dot products"
"$QEMU" -L "$root" -cpu cortex-a72 $out/bin/test-tq "$seed" tiles
echo "== with dot products (some minutes)"
"$QEMU" -L "$root" -cpu max $out/bin/test-tq "$seed"
