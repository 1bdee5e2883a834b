"""What a client raises.

ClientError
├── ApiError            the service refused: the fields of its problem+json
├── UnreachableError    no answer from the service
├── UploadError         the service could not use what was uploaded
└── DownloadError       a file that came is not the file that the manifest names
"""

from __future__ import annotations

from typing import Any

import httpx


class ClientError(Exception):
    """An error of a client; its text says what was wrong."""


class UnreachableError(ClientError):
    """The service did not answer."""


class UploadError(ClientError):
    """An uploaded checkpoint is not what was sent, or can't be pruned."""


class DownloadError(ClientError):
    """A file could not be fetched whole and right."""


class ApiError(ClientError):
    """An RFC 9457 answer of the service."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.problem = problem
        self.code = str(problem.get("code") or "")
        self.title = str(problem.get("title") or "")
        self.detail = str(problem.get("detail") or "")
        self.hint = str(problem.get("hint") or "")
        self.request_id = str(problem.get("request_id") or "")
        self.errors: list[dict[str, Any]] = problem.get("errors") or []
        super().__init__(self._sentence())

    @classmethod
    def of(cls, response: httpx.Response) -> ApiError:
        """response: one that was read."""
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            problem = {"title": response.reason_phrase, "detail": f"{response.url} answered {response.status_code} without a problem document."}
        return cls(response.status_code, problem)

    def _sentence(self) -> str:
        lines = [self.detail or self.title or f"HTTP {self.status}"]
        lines += [f"  {error.get('pointer') or error.get('parameter') or 'request'}: {error.get('message', '')}" for error in self.errors[1:]]
        lines += [self.hint] if self.hint else []
        return "\n".join(lines)
