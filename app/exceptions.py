"""Every error that a user can meet.

EspalierError
├── RecipeError            422  the recipe, or the model that it names, can't be run
├── KeyReuseError          422  an Idempotency-Key that came with another request
├── UploadError            422  the checkpoint, or the part of it, can't be taken
├── LengthError            411  a body that does not tell its length
├── AddressError           422  a URL that the service may not call
├── AuthenticationError    401
├── ScopeError             403
├── NotFoundError          404  also for another tenant's id
├── ConflictError          409  the job is not in a state that allows this
├── GoneError              410  what was asked for has been deleted
├── CursorError            400  a page cursor that this list did not make
├── RangeError             416  a byte range outside the file
├── RateError              429  the key, its tenant or its address calls too often; try again later
├── QuotaError             429  the tenant has as much as it may have; try again later
└── UnavailableError       503  a database or store that doesn't answer; try again
"""

from __future__ import annotations

from typing import ClassVar


class EspalierError(Exception):
    """An error that is told to the user: what was wrong, a stable code, and a hint what to do."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, message: str, *, code: str, hint: str = "", pointer: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.pointer = pointer  # JSON pointer into the request body, e.g. "/method/mode"
        self.headers: dict[str, str] = {}  # of the HTTP response


class RecipeError(EspalierError):
    status = 422
    title = "The recipe can't be run"


class UploadError(EspalierError):
    status = 422
    title = "The checkpoint can't be taken"


class LengthError(EspalierError):
    status = 411
    title = "Length required"


class KeyReuseError(EspalierError):
    status = 422
    title = "The Idempotency-Key was used before"


class AddressError(EspalierError):
    status = 422
    title = "The address can't be called"


class AuthenticationError(EspalierError):
    status = 401
    title = "No valid API key"


class ScopeError(EspalierError):
    status = 403
    title = "The API key lacks a scope"


class NotFoundError(EspalierError):
    status = 404
    title = "Not found"


class ConflictError(EspalierError):
    status = 409
    title = "Not possible in this state"


class GoneError(EspalierError):
    status = 410
    title = "No longer there"


class CursorError(EspalierError):
    status = 400
    title = "Invalid cursor"


class RangeError(EspalierError):
    status = 416
    title = "Range not satisfiable"


class QuotaError(EspalierError):
    status = 429
    title = "Too much at once"


class RateError(EspalierError):
    status = 429
    title = "Too many requests"


class UnavailableError(EspalierError):
    status = 503
    title = "Temporarily unavailable"
