"""What schemathesis is kept from: waiting, and revoking the key that it calls with."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

OWN_KEY = os.environ["SOAK_KEY_ID"]
NO_KEY = "key_" + "0" * 32


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    if case.operation.label.startswith(("DELETE /v1/keys", "POST /v1/keys/")) and case.path_parameters.get("key_id") == OWN_KEY:
        case.path_parameters["key_id"] = NO_KEY
    if str((case.query or {}).get("wait", "")) in _waits:  # else the run spends its time in long polls, which test_news.py looks at
        case.query["wait"] = 0
    if case.operation.label.endswith("/events"):  # a stream of a job that waits has no end; test_news.py looks at those
        case.headers["Accept"] = "application/json"


_waits = {str(seconds) for seconds in range(1, 61)}
