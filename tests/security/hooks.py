"""What schemathesis is kept from: waiting, ending the key that it calls with, and deleting what it could not make again."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

KEPT = os.environ["SOAK_KEPT"].split()
ENDING = ("DELETE ", "POST /v1/keys/{key_id}/rotate")
WAITS = {str(seconds) for seconds in range(1, 61)}


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    if case.operation.label.startswith(ENDING):
        for name, value in case.path_parameters.items():
            if value in KEPT:
                case.path_parameters[name] = value[:-32] + "0" * 32
    if str((case.query or {}).get("wait", "")) in WAITS:  # else the run spends its time in long polls, which test_news.py looks at
        case.query["wait"] = 0
    if case.operation.label.endswith("/events"):  # a stream of a job that waits has no end; test_news.py looks at those
        case.headers["Accept"] = "application/json"
