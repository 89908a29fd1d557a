#!/bin/sh
# Says what `make` needs and this machine lacks, before anything is fetched or built.
PYTHON=${PYTHON:-python3}
missing=
need() { missing="$missing
  $1"; }

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    need "Python 3.10 or newer (Debian: python3)"
elif ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
    need "Python's venv module (Debian: python3-venv)"
fi
if ! cmake --version >/dev/null 2>&1; then
    need "CMake 3.21 or newer (Debian: cmake)"
elif [ "$(printf '3.21\n%s\n' "$(cmake --version | sed -n 's/.*version \([0-9.]*\).*/\1/p')" | sort -V | head -n 1)" != 3.21 ]; then
    need "CMake 3.21 or newer (found $(cmake --version | head -n 1))"
fi
if ! "${CXX:-c++}" --version >/dev/null 2>&1 || ! "${CC:-cc}" --version >/dev/null 2>&1; then
    need "a C and a C++ compiler (Debian: g++)"
fi

if [ -n "$missing" ]; then
    echo "error: this machine lacks:$missing" >&2
    exit 1
fi
