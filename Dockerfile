# syntax=docker/dockerfile:1
# Two stages: wheels are built where there is a compiler, and run where there is none.
FROM python:3.12-slim-trixie AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/veneer
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY adapters_registry adapters_registry
COPY server server
COPY clients clients
COPY loadtest loadtest
COPY training training
RUN /opt/veneer/bin/pip install --no-cache-dir '.[server,gateway]'

FROM python:3.12-slim-trixie
# A C library for OpenMP is all that torch and bitsandbytes need beside Python.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --create-home --home-dir /var/lib/veneer veneer
COPY --from=build /opt/veneer /opt/veneer
ENV PATH=/opt/veneer/bin:$PATH \
    VENEER_DATA_DIR=/var/lib/veneer/data \
    VENEER_CACHE_DIR=/var/lib/veneer/cache \
    VENEER_LOG_FORMAT=json
USER 10001
WORKDIR /var/lib/veneer
VOLUME ["/var/lib/veneer"]
EXPOSE 50051 8000 9095
# The health rpc answers SERVING only while the step loop advances.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["veneer", "--server", "127.0.0.1:50051", "health"]
STOPSIGNAL SIGTERM
# Without authentication (not in this version) the server listens on loopback only:
# publish ports with `--network host`, or pass `--listen 0.0.0.0:50051 --insecure`
# behind a proxy that authenticates.
ENTRYPOINT ["veneer-server"]
