#!/usr/bin/env bash
# Check reproml on a processor that this machine emulates: `doctor`, recipes and examples, with the compiled
# loops and one thread.
#
#     verification/emulated.sh aarch64                  64-bit Arm: another instruction set, another BLAS
#     verification/emulated.sh nehalem                  x86-64 without AVX and without fused multiply-add
#     verification/emulated.sh aarch64 mnist-mlp        the same with more recipes than digits-mlp
#
# It needs Debian with qemu-user-static, for aarch64 also mmdebstrap, gcc-aarch64-linux-gnu and
# libc6-dev-arm64-cross, and .venv (or another interpreter in PYTHON with the packages of requirements.lock).
# Only the emulator runs the other machine's programs, so neither root nor binfmt_misc is needed.
# FOLDER keeps the emulated machine's packages (1.3 GB) for the next time; otherwise they are deleted.
set -euo pipefail
cd "$(dirname "$0")/.."
machine="${1:?usage: verification/emulated.sh aarch64|nehalem [RECIPE...]}"
recipes=(digits-mlp "${@:2}")
examples=(mlp cnn lstm transformer vae)
python="$(realpath -s "${PYTHON:-.venv/bin/python}")"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
folder="$(realpath -m "${FOLDER:-$work/machine}")"
mkdir -p "$folder" "$work/checkout"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp -P --parents -t "$work/checkout"
cd "$work/checkout"

emulated() { "${emulator[@]}" "$python" "$@"; }
case "$machine" in
    aarch64)
        emulator=(qemu-aarch64-static -L "$folder/debian")
        export CC=aarch64-linux-gnu-gcc LDSHARED="aarch64-linux-gnu-gcc -shared"
        "$python" setup.py --quiet build_ext --inplace
        python="$folder/debian/usr/bin/python3"
        if [ ! -d "$folder/packages" ]; then
            sources=/etc/apt/sources.list.d/debian.sources
            [ -e "$sources" ] || sources=/etc/apt/sources.list
            release="$(. /etc/os-release && echo "$VERSION_CODENAME")"
            rm -rf "$folder/debian" "$folder/partial" # of an interrupted run
            mmdebstrap --quiet --variant=extract --architectures=arm64 \
                --include=python3-pip,libgomp1,libstdc++6 \
                --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr "$release" "$folder/debian" "$sources"
            emulated -m pip install --quiet --require-hashes --no-compile --target "$folder/partial" \
                -r requirements.lock
            mv "$folder/partial" "$folder/packages"
        fi
        export PYTHONPATH="$folder/packages:$PWD"
        ;;
    nehalem)
        emulator=(qemu-x86_64-static -cpu Nehalem)
        "$python" setup.py --quiet build_ext --inplace
        export PYTHONPATH="$PWD"
        ;;
    *)
        echo "emulated: no machine is named $machine; choose aarch64 or nehalem" >&2
        exit 2
        ;;
esac

# A setting of this machine's processor is not one of the emulated processor.
unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
emulated -m reproml doctor
for recipe in "${recipes[@]}"; do
    emulated -m reproml verify --recipe "$recipe"
done
emulated -m verification.examples "${examples[@]}"
printf '\nemulated %s: all passed\n' "$machine"
