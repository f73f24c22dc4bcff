# Debian's package of Fashion-MNIST, for the job that packs it:
# docker build -f data.Dockerfile -t localhost/convoy-fashion-mnist:dev .
ARG BASE=debian:12.12-slim
FROM ${BASE}
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends dataset-fashion-mnist \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
