# Two images: `app` answers HTTP, migrates and dispatches, and has no torch; `worker` runs jobs.
#   docker build --target app -t espalier-app:0.1.0 .
#   docker build --target worker -t espalier-worker:0.1.0 .
# A build that can be repeated to the byte names the base by its digest: --build-arg PYTHON_IMAGE=python@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Espalier" \
    org.opencontainers.image.description="Pruning as a service: a language model goes in over REST, a smaller one comes out." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
ENV PYTHONUNBUFFERED=1 PIP_ROOT_USER_ACTION=ignore ESPALIER_HOME=/var/lib/espalier
RUN useradd --uid 10001 --create-home --home-dir /var/lib/espalier espalier
WORKDIR /srv/espalier
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY app app
COPY espalier espalier
COPY migrations migrations
COPY worker worker

FROM base AS app
RUN --mount=type=cache,target=/root/.cache/pip python -m pip install --constraint constraints.txt --editable '.[api]'
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/readyz', timeout=4).raise_for_status()"]
CMD ["python", "-m", "uvicorn", "app.main:create_app", "--factory", "--http", "app.protocol:BoundedProtocol", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-graceful-shutdown", "30"]

FROM base AS worker
# What a container runtime with GPUs is to bring in: CUDA and nvidia-smi.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The second install is data: the texts that the recipe names `c4` and `wiki`.
RUN --mount=type=cache,target=/root/.cache/pip python -m pip install --constraint constraints.txt --editable '.[worker]' \
    && python -m pip install --no-deps exllamav2==0.3.2
USER 10001:10001
# The first beat comes when the GPUs were looked at.
HEALTHCHECK --interval=60s --timeout=20s --start-period=180s --retries=3 CMD ["python", "-m", "worker.health"]
CMD ["python", "-m", "celery", "--quiet", "-A", "worker.celery", "worker", "-c", "1", "--loglevel", "warning", "--without-mingle", "--without-gossip", "--without-heartbeat"]
