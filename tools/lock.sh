#!/usr/bin/env bash
# Resolves pyproject.toml into the two lock files: versions and hashes, no download addresses.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=$(tools/setup.sh --print-uv)
options=(--universal --python-version 3.11 --generate-hashes --no-annotate --quiet)
"$UV" pip compile pyproject.toml --group build "${options[@]}" -o requirements.lock
"$UV" pip compile --group dev -c requirements.lock "${options[@]}" -o requirements-dev.lock
