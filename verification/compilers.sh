#!/usr/bin/env bash
# Build the compiled loops with gcc and clang, without optimization and with the sanitizers, and run the
# tests of the loops with each build. Arguments choose some of the builds; the default is all of them.
# It needs gcc, clang with its sanitizers (on Debian clang and libclang-rt-dev), and .venv, or another
# interpreter in PYTHON with the packages of requirements.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(realpath -s "${PYTHON:-.venv/bin/python}")"
tests="tests/arithmetic/compiler tests/arithmetic/operators tests/tracing/test_fingerprint.py"

# float-cast-overflow is not part of undefined. -fwrapv, which Python's own flags contain, would hide
# signed overflow.
sanitize="-O1 -g -fno-wrapv -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
declare -A builds=(
    [gcc]="gcc -O3"
    [clang]="clang -O3"
    [gcc-O0]="gcc -O0"
    [clang-O0]="clang -O0"
    [gcc-sanitized]="gcc $sanitize"
    [clang-sanitized]="clang $sanitize -shared-libasan"
)

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/reports"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp -P --parents -t "$work"
cd "$work"

# All compilers run as `cc`, also those that the tests start; our flags come last.
export CC=cc LDSHARED="cc -shared" PATH="$work/bin:$PATH"
export PYTHONPATH="$work" PYTHONDONTWRITEBYTECODE=1
export ASAN_OPTIONS="detect_leaks=0:log_path=$work/reports/address"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$work/reports/undefined"

[ $# -gt 0 ] || set -- gcc clang gcc-O0 clang-O0 gcc-sanitized clang-sanitized
for name in "$@"; do
    if [ -z "${builds[$name]:-}" ]; then
        echo "compilers: no build is named $name; choose from ${!builds[*]}" >&2
        exit 2
    fi
    read -r compiler flags <<< "${builds[$name]}"
    printf '\n=== %s: %s\n' "$name" "$("$compiler" --version | head -n 1) $flags"
    printf '#!/bin/sh\n' > bin/cc
    echo "exec $compiler \"\$@\" -Wall -Wextra -Werror $flags" >> bin/cc
    chmod +x bin/cc
    rm -rf build reproml/arithmetic/_kernels*
    "$python" setup.py --quiet build_ext --inplace
    if [ "$(uname -m)" = x86_64 ]; then # there is a choice for each of these functions
        loops="$(cat reproml/arithmetic/csrc/*.c | grep -c '^VECTORISED')"
        if [ "$(nm reproml/arithmetic/_kernels* | grep -oE '[a-z0-9_]+\.resolver' | sort -u | wc -l)" != "$loops" ]; then
            echo "compilers: $compiler did not compile all $loops loops for several instruction sets" >&2
            exit 1
        fi
    fi
    preload="" # the sanitizer, and what it needs to intercept the exceptions of PyTorch
    case "$name" in
        gcc-sanitized) preload="$(gcc -print-file-name=libasan.so)" ;;
        clang-sanitized) preload="$(clang -print-file-name="libclang_rt.asan-$(uname -m).so")" ;;
    esac
    preload="${preload:+$preload $(gcc -print-file-name=libstdc++.so.6)}"
    failed=""
    LD_PRELOAD="$preload" "$python" -m pytest -q -p no:cacheprovider --capture=sys $tests || failed=yes
    if [ -n "$failed$(ls reports)" ]; then
        find reports -type f -exec head -n 30 {} + >&2
        echo "compilers: the tests fail, or a sanitizer reports an error, with the build $name" >&2
        exit 1
    fi
done
