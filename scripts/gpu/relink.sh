#!/bin/sh
# New programs for a GPU machine, on a machine that has nvcc but not the hour to compile upstream's CUDA code.
#
#   scripts/gpu/relink.sh DIR [SOURCE.cu...]
#
# From an earlier build there: its programs in build/gpu/programs.tar.xz, which are replaced, and the objects of ggml-cuda
# in build/gpu-objects/objects.tar.xz (its upstream/ggml/src/ggml-cuda). Compiled are ggml-tq/cuda, the SOURCEs of upstream
# that are named (those that a patch has changed since), and everything that is not CUDA. DIR keeps what was compiled.
#   CMAKE_ARGS  as for build.sh; where the toolkit is: -DCMAKE_CUDA_COMPILER=... -DCUDAToolkit_ROOT=...
#   LINK_DIRS   where the linker finds libcudart, libcublas and libcuda: -L...
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
dir=$1
shift
export FROM_SOURCE=1

"$root/scripts/gpu/build.sh" "$dir/cuda" help > /dev/null
for source in $(cd "$root/ggml-tq/cuda" && ls ./*.cu template-instances/*.cu | sed 's|.*/||') "$@"; do
    ninja -C "$dir/cuda" -t targets all | sed -n "s|^\(.*/ggml-cuda.dir/.*/\{0,1\}$source\.o\): .*|\1|p"
done > "$dir/compiled"
xargs ninja -C "$dir/cuda" < "$dir/compiled"

rm -rf "$dir/objects" "$dir/programs"
mkdir -p "$dir/objects" "$dir/programs"
tar -xJf "$root/build/gpu-objects/objects.tar.xz" -C "$dir/objects"
while read -r object; do
    rm -f "$dir/objects/$object"
done < "$dir/compiled"

# the programs: upstream's backend registry, which knows of CUDA, is the earlier build's
tar -xJf "$root/build/gpu/programs.tar.xz" -C "$dir/programs"
CMAKE_ARGS="${CMAKE_ARGS:-} -DGGML_CUDA=OFF" "$root/scripts/gpu/build.sh" "$dir/cpu"
for file in "$dir/programs"/*; do
    name=${file##*/}
    case $name in
        libggml.so* | libggml-cuda.so*) ;;
        *) cp -P "$dir/cpu/bin/$name" "$dir/programs/" ;;
    esac
done
cp -P "$dir/cpu/bin"/bench-* "$dir/programs/" # which earlier builds may lack
library=$(cd "$dir/programs" && echo libggml-cuda.so.*.*.*)
# shellcheck disable=SC2046,SC2086
g++ -shared -Wl,-soname,libggml-cuda.so.0 -Wl,-rpath,"\$ORIGIN" -o "$dir/programs/$library" \
    $(find "$dir/objects" -name '*.o') $(sed "s|^|$dir/cuda/|" "$dir/compiled") "$dir/programs/libggml-base.so" \
    ${LINK_DIRS:-} -lcudart -lcublas -lcuda -lpthread -ldl

tar -cJf "$root/build/gpu/programs.new" -C "$dir/programs" .
mv "$root/build/gpu/programs.new" "$root/build/gpu/programs.tar.xz"
ls -l "$root/build/gpu/programs.tar.xz"
