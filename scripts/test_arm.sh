#!/bin/sh
# The C library and its tests for 64-bit Arm, built here and run under an emulator: with NEON, and with its dot products.
# What an emulator needs says nothing about speed.
# usage: scripts/test_arm.sh [SEED]
# CC: the cross compiler, QEMU: the emulator, if they have other names than below.
set -e

CC=${CC:-aarch64-linux-gnu-gcc}
QEMU=${QEMU:-qemu-aarch64-static}
cd "$(dirname "$0")/.."

for tool in "$CC" "$QEMU"; do
    if ! command -v "$tool" > /dev/null; then
        echo "not run: there is no $tool (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user-static)" >&2
        exit 1
    fi
done

out=build/arm
mkdir -p $out
# flags of CMakeLists.txt
"$CC" -std=gnu11 -O3 -ffp-contract=off -Wall -Wextra -Wpedantic -static -Iggml-tq/include -o $out/test-tq \
    tests/c/test-tq.c ggml-tq/src/*.c -lm

seed=${1:-$(date +%s)}
echo "== without dot products"
"$QEMU" -cpu cortex-a72 $out/test-tq "$seed" tiles
echo "== with dot products (some minutes)"
"$QEMU" -cpu max $out/test-tq "$seed"
