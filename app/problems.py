"""Every error as `application/problem+json` (RFC 9457): what was wrong, where, and what to do, never how the service is built."""

from __future__ import annotations

import http
import json
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.exceptions import AuthenticationError, EspalierError, UnavailableError

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5
MAX_MESSAGE_LENGTH = 500  # a message may quote what was sent
MAX_ERRORS = 50
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
HTTP_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}

logger = structlog.get_logger(__name__)


class ProblemItem(BaseModel):
    """One fault of a request."""

    pointer: str | None = Field(None, description="JSON pointer into the request body.", examples=["/sparsity"])
    parameter: str | None = Field(None, description="Name of the query parameter or header.", examples=["limit"])
    message: str = Field(description="What is wrong there.", examples=["Input should be less than 1"])


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="A stable URI for this kind of error.", examples=["urn:espalier:problem:job_not_found"])
    title: str = Field(description="The class of error in words.", examples=["Not found"])
    status: int = Field(description="The HTTP status.", examples=[404])
    detail: str = Field(description="What was wrong with this request.", examples=["There is no job job_0193d5f0."])
    code: str = Field(description="A stable name for programs.", examples=["job_not_found"])
    instance: str = Field(description="The path that was called.", examples=["/v1/jobs/job_0193d5f0"])
    request_id: str = Field(description="Names this request in the service's logs.", examples=["0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    hint: str | None = Field(None, description="What to do about it.", examples=["List jobs with GET /v1/jobs."])
    errors: list[ProblemItem] | None = Field(None, description="Each fault of a request that is not valid.")


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an endpoint declares in OpenAPI beside its success: these errors, and the two that are always possible."""
    return {status: {"model": Problem, "description": http.HTTPStatus(status).phrase} for status in sorted({*statuses, 500, 503})}


def install(app: FastAPI) -> None:
    app.add_exception_handler(EspalierError, _espalier_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(SQLAlchemyError, _database_error)


def respond(
    scope: Mapping[str, Any],
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    hint: str = "",
    errors: list[ProblemItem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    problem = Problem(
        type=f"urn:espalier:problem:{code}",
        title=title,
        status=status,
        detail=detail[:MAX_MESSAGE_LENGTH],
        code=code,
        instance=scope["path"],
        request_id=scope.get("state", {}).get("request_id", ""),
        hint=hint or None,
        errors=errors,
    )
    body = json.dumps(problem.model_dump(exclude_none=True))  # in ASCII, so what was sent is quoted whatever it is
    extra = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}
    return Response(body, status, {**extra, **(headers or {})}, MEDIA_TYPE)


def internal(scope: Mapping[str, Any]) -> Response:
    return respond(scope, 500, "internal", "Internal error", "The service failed; the error is in its log.", hint="Tell the operator the request_id.")


async def _espalier_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EspalierError)
    if isinstance(error, UnavailableError):
        logger.warning("unavailable", code=error.code, cause=repr(error.__cause__))
    errors = [ProblemItem(pointer=error.pointer, message=error.message)] if error.pointer is not None else None
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, AuthenticationError) else error.headers
    return respond(request.scope, error.status, error.code, error.title, error.message, hint=error.hint, errors=errors, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    allowed = _methods_here(request) if status == 405 else ""
    code = HTTP_CODES.get(status, "http_error")
    detail = f"There is no {request.scope['path']}." if status == 404 else f"{error.detail}."
    hint = {404: "See /docs for what there is.", 405: f"Allowed here: {allowed}."}.get(status, "")
    headers = {"Allow": allowed} if allowed else error.headers
    return respond(request.scope, status, code, http.HTTPStatus(status).phrase, detail, hint=hint, headers=headers)


def _methods_here(request: Request) -> str:
    """What the path can be called with; FastAPI itself tells the methods of the first endpoint alone."""
    routes = request.app.routes
    return ", ".join(method for method in METHODS if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes))


async def _database_error(request: Request, error: Exception) -> Response:
    if isinstance(error, OperationalError | InterfaceError | PoolTimeoutError):
        logger.warning("database_unavailable", cause=repr(error))
        return respond(request.scope, 503, "database_unavailable", UnavailableError.title, "The database does not answer.", hint="Try again in a while.")
    raise error


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    if faults[0]["type"] == "json_invalid":
        detail = f"The body is not JSON: {faults[0]['ctx']['error']} at character {faults[0]['loc'][-1]}."
        return respond(request.scope, 400, "invalid_json", "The body is not JSON", detail)
    if isinstance(error.body, bytes):
        hint = "Send the header 'Content-Type: application/json'."
        return respond(request.scope, 415, "not_json", "Unsupported media type", "The body is not declared as JSON.", hint=hint)
    items = [_item(fault, error.body) for fault in faults[:MAX_ERRORS]]
    where = items[0].pointer or items[0].parameter or ""
    detail = f"{where}: {items[0].message}" if where else items[0].message
    if len(faults) > 1:
        detail += f" (and {len(faults) - 1} more)"
    return respond(request.scope, 422, "invalid_request", "The request is not valid", detail, errors=items)


def _item(fault: Mapping[str, Any], body: Any) -> ProblemItem:
    place, *path = fault["loc"]
    message = _message(fault)[:MAX_MESSAGE_LENGTH]
    if place != "body":
        return ProblemItem(parameter=".".join(str(part) for part in path), message=message)
    return ProblemItem(pointer=json_pointer(path, body), message=message)


def _message(fault: Mapping[str, Any]) -> str:
    context = fault.get("ctx", {})
    match fault["type"]:
        case "union_tag_invalid":
            return f"'{context['tag']}' is not one of {context['expected_tags']}"
        case "extra_forbidden":
            return f"There is no field '{fault['loc'][-1]}' here"
        case "missing":
            return f"The field '{fault['loc'][-1]}' is missing"
        case _:
            return str(fault["msg"]).removeprefix("Value error, ")


def json_pointer(path: list[str | int], body: Any) -> str:
    """The JSON pointer (RFC 6901) of a pydantic location, without the tags that pydantic puts there for the members of a union."""
    pointer, value = "", body
    for position, part in enumerate(path):
        is_there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_there:
            value = value[part]
        elif not isinstance(value, dict) or position < len(path) - 1 or part == value.get("name"):  # only the last part may name a field that is missing
            continue
        pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer
