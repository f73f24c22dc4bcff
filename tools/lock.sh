#!/usr/bin/env bash
# Resolves pyproject.toml into the two lock files: versions and hashes, without download addresses.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=$(tools/setup.sh --print-uv)
options=(--universal --python-version 3.11 --generate-hashes --no-annotate --quiet)
"$UV" pip compile pyproject.toml --group build "${options[@]}" -o requirements.lock
"$UV" pip compile --group dev -c requirements.lock "${options[@]}" -o requirements-dev.lock

# The baselines of the benchmarks, with this project's versions of shared dependencies, whatever
# versions they require. The exception is huggingface-hub: MosaicML's transformers reject ours.
ours=$(mktemp); trap 'rm -f "$ours"' EXIT
sed -n 's/^\([a-z0-9._-]*==[^ ;]*\).*/\1/p' requirements.lock \
    | grep -v '^huggingface-hub==' | sort -u >"$ours"
mapfile -t hidden < <(sed 's/\(.*\)==.*/--no-emit-package=\1/' "$ours")
hidden+=(--no-emit-package=opencv-python)  # FFCV requires it; the headless package works too
"$UV" pip compile benchmarks/baselines.in --override "$ours" "${hidden[@]}" "${options[@]}" \
    --custom-compile-command tools/lock.sh -o benchmarks/baselines.lock
