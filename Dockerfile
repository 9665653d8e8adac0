# syntax=docker/dockerfile:1
# Two stages: the wheel and its kernels are built where there is a compiler, and run where there
# is none. `make image-replay` runs these steps without Docker. The same for 64-bit ARM, with
# `--platform linux/arm64`: not tried, see docs/cpus.md.
FROM python:3.12-slim-trixie AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/veneer
# Where torch comes from: the one that pip would take by itself brings gigabytes of CUDA. Give the
# index that PyTorch's "Get started" page shows for the CPU; or, with a GPU, for its CUDA, and use
# `docker run --gpus all`.
ARG TORCH_INDEX
# hadolint ignore=DL3013
RUN : "${TORCH_INDEX:?give --build-arg TORCH_INDEX=URL, the index that pytorch.org shows for the CPU}" \
 && /opt/veneer/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch>=2.9'
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY proto proto
COPY adapters_registry adapters_registry
COPY server server
COPY clients clients
COPY loadtest loadtest
COPY training training
COPY examples/adapters examples/adapters
RUN /opt/veneer/bin/pip install --no-cache-dir '.[server,gateway,scale]'

FROM python:3.12-slim-trixie
# A C library for OpenMP is all that torch and bitsandbytes need beside Python.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --create-home --home-dir /var/lib/veneer veneer \
 && install --directory --owner=10001 --mode=0700 /run/secrets
# Owned by root: the server cannot change its own code, the compiled kernels included.
COPY --from=build /opt/veneer /opt/veneer
# Open to the container's network, and therefore with keys and TLS: without these files the server
# does not start. Mount a folder or volume at /run/secrets, not single files, which would not follow
# a renewal. VENEER_SERVER and VENEER_CA are for `veneer` in here, so for the health check too: set
# them to a name of your own certificate, and to its authority's certificate. docs/security.md.
ENV PATH=/opt/veneer/bin:$PATH \
    VENEER_DATA_DIR=/var/lib/veneer/data \
    VENEER_CACHE_DIR=/var/lib/veneer/cache \
    VENEER_LOG_FORMAT=json \
    VENEER_LISTEN=0.0.0.0:50051 \
    VENEER_OPENAI_LISTEN=0.0.0.0:8000 \
    VENEER_METRICS_LISTEN=0.0.0.0:9095 \
    VENEER_KEYS_FILE=/run/secrets/keys.toml \
    VENEER_TLS_CERT=/run/secrets/tls/cert.pem \
    VENEER_TLS_KEY=/run/secrets/tls/key.pem \
    VENEER_SERVER=https://localhost:50051 \
    VENEER_CA=/run/secrets/tls/cert.pem \
    PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /var/lib/veneer
# The one place that is written to, beside /tmp: the root may be read-only.
VOLUME ["/var/lib/veneer"]
EXPOSE 50051 8000 9095
# SERVING only while the step loop advances. The first start fetches and converts the base.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["veneer", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["veneer-server"]
