#!/usr/bin/env bash
# Creates .venv from the lock files; does nothing if it already matches them. Needs only
# Python >= 3.11.
#   tools/setup.sh [--no-dev] [--no-project]
#                    --no-project: only the dependencies, for a layer of an image
#   tools/setup.sh --print-uv
#                    prints the path of the pinned uv; installs it if it is missing
#   tools/setup.sh --baselines
#                    creates .venv-baselines: the baselines of benchmarks/data.py, in addition to the
#                    packages of .venv
#   tools/setup.sh --native-tools
#                    installs the compiler for the native decoder; needs apt-get and root
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
CACHE="${CONVOY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/convoy}"
LOCKS=(requirements.lock requirements-dev.lock)
PROJECT=1 PRINT_UV=0 NATIVE_TOOLS=0 BASELINES=0
for argument; do
    case "$argument" in
        --no-dev) LOCKS=(requirements.lock) ;;
        --no-project) PROJECT=0 ;;
        --print-uv) PRINT_UV=1 ;;
        --native-tools) NATIVE_TOOLS=1 ;;
        --baselines) BASELINES=1 ;;
        *) echo "setup: unknown argument $argument" >&2; exit 2 ;;
    esac
done
VENV="${CONVOY_VENV:-.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
STAMP=""
if [ "$PRINT_UV$NATIVE_TOOLS$BASELINES" = 000 ]; then
    SOURCES=("${LOCKS[@]}" pyproject.toml tools/setup.sh)
    [ "$PROJECT" = 0 ] || SOURCES+=(setup.py trainer/data/_native.c)
    STAMP="$VENV/.convoy-$(cat "${SOURCES[@]}" | sha256sum | cut -c1-16)"
    [ -e "$STAMP" ] && exit 0
fi

log() { echo "setup: $*" >&2; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

if ! PYTHON=$(find_python); then
    [ "$(id -u)" = 0 ] || { log "no Python >= 3.11 on PATH; install it"; exit 2; }
    log "installing Python with apt-get"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends python3 >&2
    PYTHON=$(find_python) || { log "python3 of this Debian is older than 3.11"; exit 2; }
fi

install_native_tools() {  # never fails: without them, the project works but decodes more slowly
    local missing=()
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    [ -e "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] \
        || missing+=(python3-dev)
    echo '#include <stdio.h>
#include <jpeglib.h>' | gcc -E - >/dev/null 2>&1 || missing+=(libjpeg-dev)
    if [ ${#missing[@]} != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        log "installing ${missing[*]} with apt-get, for the native decoder"
        { apt-get update -qq \
            && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 \
            || log "they cannot be installed; the native decoder may be missing"
    fi
}

without() {  # prints a lock file without the lines of a package
    "$PYTHON" -c 'import re, sys
text = open(sys.argv[2]).read()
print(re.sub(rf"(?m)^{sys.argv[1]}==(.*\\\n)*.*\n", "", text), end="")' "$1" "$2"
}

install_ffcv() {  # never fails; its build looks for OpenCV under a name that Debian does not use
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null \
        && ! pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
        log "installing the development files of OpenCV with apt-get, for FFCV"
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
            g++ pkg-config libopencv-dev libturbojpeg0-dev; } >/dev/null 2>&1 || true
    fi
    local named; named=$(mktemp -d)
    ln -s "$(pkg-config --variable=pcfiledir opencv4 2>/dev/null)/opencv4.pc" "$named/opencv.pc"
    "$UV" pip install --quiet setuptools wheel
    PKG_CONFIG_PATH="$named" "$UV" pip install --quiet --require-hashes --no-deps \
        --no-build-isolation-package ffcv -r benchmarks/baselines.lock \
        || log "FFCV cannot be built; benchmarks/data.py skips it"
    rm -rf "$named"
}

if [ "$NATIVE_TOOLS" = 1 ]; then
    install_native_tools
    exit
fi

UV=$(command -v uv || true)
if [ -z "$UV" ] || [ "$("$UV" --version | cut -d' ' -f2)" != "$UV_VERSION" ]; then
    UV="$CACHE/uv-$UV_VERSION/bin/uv"
    if [ ! -x "$UV" ]; then
        log "installing uv $UV_VERSION into $CACHE"
        if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
            [ "$(id -u)" = 0 ] || {
                log "pip is needed once to install uv; install python3-pip, or put uv on PATH"
                exit 2
            }
            apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-pip >&2
        fi
        rm -rf "$CACHE/uv-$UV_VERSION.part"
        "$PYTHON" -m pip install --quiet --root-user-action ignore \
            --target "$CACHE/uv-$UV_VERSION.part" "uv==$UV_VERSION" >&2
        mv -T "$CACHE/uv-$UV_VERSION.part" "$CACHE/uv-$UV_VERSION"
    fi
fi

if [ "$PRINT_UV" = 1 ]; then
    echo "$UV"
    exit
fi

export UV_LINK_MODE="${UV_LINK_MODE:-hardlink}" UV_NO_PROGRESS=1
if [ "$BASELINES" = 1 ]; then
    log "installing the baselines of the benchmarks into .venv-baselines"
    "$UV" venv --quiet --clear --python "$VENV/bin/python" .venv-baselines
    export VIRTUAL_ENV="$PWD/.venv-baselines"
    locked=$(mktemp); trap 'rm -f "$locked"' EXIT
    without ffcv benchmarks/baselines.lock >"$locked"
    "$UV" pip install --quiet --require-hashes --no-deps -r "$locked"
    install_ffcv
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$VENV/bin/python" -c "$purelib" >"$(.venv-baselines/bin/python -c "$purelib")/convoy.pth"
    exit
fi

log "installing the locked environment into $VENV"
REQUIRES=(); for lock in "${LOCKS[@]}"; do REQUIRES+=(-r "$lock"); done
NO_DEEPSPEED=$(mktemp); trap 'rm -f "$NO_DEEPSPEED"' EXIT
# DeepSpeed's build imports torch, so everything else is installed first.
without deepspeed requirements.lock >"$NO_DEEPSPEED"
export VIRTUAL_ENV="$VENV" DS_BUILD_OPS=0
rm -f "$VENV"/.convoy-*
[ -x "$VENV/bin/python" ] || "$UV" venv --quiet --python "$PYTHON" "$VENV"
# Bytecode halves the time to import torch. An image compiles it in its own build, without tests.
COMPILE=()
[ "$PROJECT" = 0 ] || COMPILE=(--compile-bytecode)
"$UV" pip install --quiet "${COMPILE[@]}" --require-hashes -r "$NO_DEEPSPEED" "${REQUIRES[@]:2}"
"$UV" pip install --quiet "${COMPILE[@]}" --require-hashes --no-deps \
    --no-build-isolation-package deepspeed "${REQUIRES[@]}"
if [ "$PROJECT" = 1 ]; then
    install_native_tools
    rm -f trainer/data/_native.*.so  # an outdated one must not remain if the build fails
    "$UV" pip install --quiet --no-deps --no-build-isolation -e .
    decoder='from trainer.data.decode.decoder import decoder_in_use; print(decoder_in_use())'
    log "JPEG decoder: $("$VENV/bin/python" -c "$decoder")"
fi
touch "$STAMP"
log "done"
