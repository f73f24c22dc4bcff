#!/usr/bin/env bash
# Builds the container image with docker, or with buildah if docker is not available.
#   BASE=debian:12.12-slim IMAGE=convoy:dev tools/image.sh
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGE="${IMAGE:-convoy:dev}"
COMMIT=$(git rev-parse HEAD 2>/dev/null || echo unknown)
arguments=(--build-arg "GIT_COMMIT=$COMMIT" ${BASE:+--build-arg "BASE=$BASE"} -t "$IMAGE")
if docker info >/dev/null 2>&1; then
    exec docker build "${arguments[@]}" .
elif command -v buildah >/dev/null; then
    exec buildah build --layers --format oci "${arguments[@]}" .
fi
echo "image: needs a running docker, or buildah (Debian: apt-get install buildah)" >&2
exit 2
