# Two images: `app` answers HTTP and has no torch; `worker` runs jobs.
#   docker build --target app -t espalier-app .
#   docker build --target worker -t espalier-worker .
FROM python:3.11-slim AS base
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
USER espalier
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/readyz', timeout=4).raise_for_status()"]
CMD ["python", "-m", "uvicorn", "app.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-graceful-shutdown", "30"]

FROM base AS worker
# The second install is data: the texts that the recipe names `c4` and `wiki`.
RUN --mount=type=cache,target=/root/.cache/pip python -m pip install --constraint constraints.txt --editable '.[worker]' \
    && python -m pip install --no-deps exllamav2==0.3.2
USER espalier
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from app.queue import depth; from app.settings import get_settings; depth(get_settings())"]
CMD ["python", "-m", "celery", "-A", "worker.celery", "worker", "-Q", "prune", "-c", "1", "--loglevel", "warning"]
