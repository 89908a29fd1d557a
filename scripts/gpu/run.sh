#!/bin/sh
# Everything on one GPU with one command: build, tests, sanitizers, logits against the CPU's, speed. Records and tables go
# to OUT, to be kept in docs/results/gpu. Needs no network.
#
#   scripts/gpu/run.sh DIR MODEL TEXT OUT
#
# DIR is for the build (build.sh, which says where it takes sources from), MODEL a small one with weights in F32, for
# logits. An hour; half a minute of it needs 5 GB in DIR.
set -eu

here=$(dirname "$0")
dir=$1
model=$2
text=$3
out=$4
mkdir -p "$out"

"$here/build.sh" "$dir"
. "$here/env.sh"
failed=0
"$here/test.sh" "$dir" "$out/logs" || failed=1
python3 "$here/evaluate.py" parity --bin "$dir/bin" --text "$text" --types f16,q8_0,tq4_tcq,tq3_tcq,tq2_tcq,tq4_mse,tq3_mse \
    --tokens 8192 --scratch "$dir/scratch" -o "$out/parity.jsonl" "$model" || failed=1
"$here/bench.sh" "$dir" > "$out/attention.jsonl"
"$dir/bin/bench-set-rows" -r 9 -c 2>/dev/null > "$out/set-rows.jsonl"
[ -f "$dir/random-8B-Q4_0.gguf" ] || python3 "$here/random_model.py" "$dir/random-8B-Q4_0.gguf"
python3 "$here/evaluate.py" bench --bin "$dir/bin" --types f16,q8_0,q4_0,tq4_mse,tq3_mse,tq3_tcq,tq4_tcq/tq3_tcq \
    --generate 32 -o "$out/speed.jsonl" "$dir/random-8B-Q4_0.gguf" || failed=1
python3 "$here/summary.py" "$out" | tee "$out/summary.md"
exit $failed
