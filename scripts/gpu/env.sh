# To be sourced: programs that were built on another machine find CUDA's libraries.
if ! ldconfig -p | grep -q 'libcublas\.so\.13' || ! ldconfig -p | grep -q 'libcudart\.so\.13'; then
    for lib in libcublas.so.13 libcublasLt.so.13 libcudart.so.13; do
        found=$(find /usr/local /opt -name "$lib" 2>/dev/null | head -n 1)
        [ -z "$found" ] || LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(dirname "$found")"
    done
    export LD_LIBRARY_PATH
fi
