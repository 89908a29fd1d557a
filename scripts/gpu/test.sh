#!/bin/sh
# The tests of the cache types on a GPU, with the programs in DIR/bin; failures are shown, whole logs go to LOGS.
#
#   scripts/gpu/test.sh DIR LOGS [DEVICE]
set -u

bin=$1/bin
logs=$2
device=${3:-CUDA0}
. "$(dirname "$0")/env.sh"
failed=0

# run NAME COMMAND...: the log's end, or all that failed
run() {
    name=$1
    shift
    start=$(date +%s)
    "$@" > "$logs/$name.log" 2>&1
    rc=$?
    echo "== $name: status $rc, $(($(date +%s) - start)) s, $(grep -c 'not supported' "$logs/$name.log") not supported"
    grep -a 'FAIL' "$logs/$name.log"
    tail -n 3 "$logs/$name.log"
    [ $rc -eq 0 ] || failed=1
}

mkdir -p "$logs"
run test-backend "$bin/test-backend" "$device"
for op in SET_ROWS GET_ROWS CPY FLASH_ATTN_EXT; do
    run "$op" "$bin/test-backend-ops" test -b "$device" -o "$op" -p 'tq[234]_(mse|qjl|tcq)'
done
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do # a CUDA graph that cannot be updated is made anew: no error
        run "$tool" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 "$bin/test-backend" "$device" tq4_tcq few
    done
fi
exit $failed
