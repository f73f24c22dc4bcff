# One image for the trainer, the pipelines and the MLflow server. Build it with `make image`.
# It needs buildah, or docker with BuildKit (the default since 23.0): `RUN --mount` keeps the
# installer out of the layers.
ARG BASE=debian:12.12-slim

FROM ${BASE} AS base
RUN command -v python3 >/dev/null \
    || (apt-get update -qq \
        && apt-get install -y -qq --no-install-recommends python3 ca-certificates \
        && rm -rf /var/lib/apt/lists/*)

# The installer, which is not part of the image.
FROM base AS installer
WORKDIR /build
COPY tools/setup.sh tools/setup.sh
RUN CONVOY_CACHE=/opt/installer tools/setup.sh --print-uv

# The dependencies: a separate layer that changes only with the lock file. The image is based on it,
# because a copy of the layer would be read, written and hashed again with each build. The bytecode
# is compiled here, because pods cannot store it: each start of a rank would compile for ten seconds
# of processor time. Tests, and files that do not compile, are skipped.
FROM base AS dependencies
WORKDIR /build
COPY tools/setup.sh tools/setup.sh
COPY pyproject.toml requirements.lock ./
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    CONVOY_CACHE=/opt/installer CONVOY_VENV=/opt/convoy/venv UV_LINK_MODE=copy UV_NO_CACHE=1 \
        tools/setup.sh --no-dev --no-project \
    && { /opt/convoy/venv/bin/python -m compileall -qq -j 0 -x '/tests?/' \
        --invalidation-mode unchecked-hash /opt/convoy/venv/lib || true; }

# The project, in a separate folder. The native decoder is compiled here and contains libjpeg-turbo.
FROM dependencies AS project
RUN tools/setup.sh --native-tools && rm -rf /var/lib/apt/lists/*
COPY README.md LICENSE setup.py ./
COPY trainer trainer
COPY pipelines pipelines
COPY convoy_entry convoy_entry
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    "$(CONVOY_CACHE=/opt/installer tools/setup.sh --print-uv)" pip install --quiet --no-cache \
        --python /opt/convoy/venv/bin/python \
        --no-deps --no-build-isolation --target /opt/convoy/app . \
    && /opt/convoy/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        /opt/convoy/app

FROM dependencies
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin convoy
COPY --from=project /opt/convoy/app /opt/convoy/app
# The commit follows the layers; before them, each commit would rebuild all layers.
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="convoy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
# With a read-only root file system, /tmp is an emptyDir; all default output folders are in it.
ENV PATH=/opt/convoy/app/bin:/opt/convoy/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/convoy/app PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib TRITON_CACHE_DIR=/tmp/triton \
    TORCH_EXTENSIONS_DIR=/tmp/torch_extensions \
    CONVOY_GIT_COMMIT=${GIT_COMMIT}
WORKDIR /tmp
USER 10001:10001
CMD ["convoy", "--help"]
