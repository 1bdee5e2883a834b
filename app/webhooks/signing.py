"""Signatures by Standard Webhooks (standardwebhooks.com), version `v1`: HMAC-SHA256 over id, time and body."""

from __future__ import annotations

import base64
import hmac
import math
import secrets
import time
from collections.abc import Sequence

PREFIX = "whsec_"
MOST_OLD = 2  # secrets beside the newest

Secret = tuple[str, float | None]  # and until when it signs, in seconds since 1970; None: the newest, which has no end


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def rotate(known: Sequence[Secret], overlap: float) -> list[Secret]:
    """A new secret, then those that go on signing for at most `overlap` seconds, newest first."""
    now = time.time()
    ends = ((secret, min(now + overlap, math.inf if until is None else until)) for secret, until in known)
    return [(new_secret(), None), *[(secret, until) for secret, until in ends if until > now][:MOST_OLD]]


def in_use(known: Sequence[Secret]) -> list[str]:
    return [secret for secret, until in known if until is None or until > time.time()]


def sign(keys: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: a signature by each of the secrets. timestamp: seconds since 1970."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digests = (hmac.digest(base64.b64decode(key.removeprefix(PREFIX)), signed, "sha256") for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
