#!/bin/sh
# Time of attention on a GPU, the op alone, with the programs in DIR/bin; lines of JSON go to standard output.
#
#   scripts/gpu/bench.sh DIR [DEVICE]
#
# Shapes: 8B models (32 heads, 8 key heads, head dim 128), groups of 8, head dims 64 and 256; keys centered and not; few queries
# and batches of 512.
set -eu

bin=$1/bin
device=${2:-CUDA0}
. "$(dirname "$0")/env.sh"

bench() {
    "$bin/bench-attention" -d "$device" -r 9 -c "$@" 2>/dev/null
}

types="f16 tq4_mse tq3_mse tq4_tcq tq3_tcq"
# shellcheck disable=SC2086
{
    bench -n 256,1024,8192,32768,131072 $types q8_0 q4_0 tq2_tcq tq3_qjl/tq3_mse
    bench -n 32768,131072 -b 8 $types
    bench -n 32768 -s 64/8/128,24/8/64,16/8/256 $types
    bench -n 32768 -q 2,4,8 $types
    bench -n 512,1024,8192,32768 -q 512 $types q8_0 q4_0 tq4_qjl/tq4_mse
}
