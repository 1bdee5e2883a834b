"""The HTTP service: `uvicorn --factory app.main:create_app`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from app import health, logging, methods, metrics, problems, telemetry, usage
from app.audit import endpoints as audit
from app.auth import KnownKeys
from app.checkpoints import endpoints as checkpoints
from app.database import Database
from app.dispatcher import Dispatcher
from app.jobs import endpoints as jobs
from app.jobs.news import News
from app.jobs.told import ToldJobs
from app.keys import endpoints as keys
from app.middleware import MAX_BODY_BYTES, RequestContext
from app.queues import endpoints as queues
from app.rates import Rates
from app.settings import Settings, get_settings
from app.sinks import endpoints as sinks
from app.storage import open_store
from app.webhooks import endpoints as webhooks

DESCRIPTION = """A pruning job goes in; a smaller language model that loads with plain transformers comes out, with measured proof of what it lost and gained.

Errors are `application/problem+json` (RFC 9457) with a stable `code`. Times are UTC (RFC 3339)."""

RETRY_AFTER = {"description": "Seconds after which to call again.", "schema": {"type": "integer"}}
RATE_HEADERS = {
    "RateLimit-Policy": {"description": "Calls (`q`) in so many seconds (`w`) that the key and its tenant may make.", "schema": {"type": "string"}},
    "RateLimit": {"description": "Calls that are left (`r`), and seconds (`t`) until there are more again.", "schema": {"type": "string"}},
}


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or get_settings()
    logging.configure()
    telemetry.configure("espalier-api")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.settings = settings
        app.state.database = database = Database(settings.database_url.get_secret_value())
        app.state.store = store = open_store(settings)
        app.state.checks = health.make_checks(database, store, settings)
        app.state.metrics = metrics.make_probe(database, settings)
        app.state.keys = known_keys = KnownKeys(database, settings.key_cache_seconds)
        app.state.rates = rates = Rates(settings)
        noting_use = asyncio.create_task(known_keys.keep_noting_use())
        app.state.news = news = News(database, settings.max_streams)
        app.state.told = ToldJobs(database)
        dispatcher = Dispatcher(database, settings)
        dispatcher.start()
        try:
            async with news.told():
                yield
        finally:
            dispatcher.stop()
            noting_use.cancel()
            known_keys.note_use()
            await rates.close()
            database.dispose()
            telemetry.flush()  # uvicorn ends by the signal that stopped it, so no exit handler runs

    app = FastAPI(
        title="Espalier",
        version=version("espalier"),
        description=DESCRIPTION,
        lifespan=lifespan,
        separate_input_output_schemas=False,
        generate_unique_id_function=lambda route: route.name,
        docs_url="/docs" if settings.docs else None,
        openapi_url="/openapi.json" if settings.docs else None,
        redoc_url=None,
        telemetry=telemetry.OF_REQUESTS,
    )
    problems.install(app)
    for router in (
        jobs.router,
        sinks.router,
        checkpoints.router,
        queues.router,
        methods.router,
        keys.router,
        audit.router,
        usage.router,
        webhooks.router,
        health.router,
        metrics.router,
    ):
        app.include_router(router)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)
    app.add_middleware(RequestContext)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description of the service, with errors under their own media type."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = FastAPI.openapi(app)
    for path in schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                _drop_null(parameter["schema"])
            if operation.get("security"):
                _describe_limits(operation)
            for status, response in operation["responses"].items():
                if status >= "400" and "content" in response:
                    response["content"] = {problems.MEDIA_TYPE: response["content"].pop("application/json")}
    return schema


def _drop_null(schema: dict[str, Any]) -> None:
    """A parameter may be left out, but there is no text that means null."""
    match schema.get("anyOf"):
        case [kind, {"type": "null"}]:
            del schema["anyOf"]
            schema |= kind


def _describe_limits(operation: dict[str, Any]) -> None:
    """What every call with a key may meet: it came too often."""
    reference = {"$ref": "#/components/schemas/Problem"}
    operation["responses"].setdefault("429", {"description": "Too Many Requests", "content": {"application/json": {"schema": reference}}})
    for status, response in operation["responses"].items():
        headers = RATE_HEADERS if status < "400" or status == "429" else {}
        headers |= {"Retry-After": RETRY_AFTER} if status in ("429", "503") else {}
        if headers:
            response["headers"] = response.get("headers", {}) | headers
