"""Cursors of lists: where a page ended, and by which filters it was made. Opaque to clients."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json

from app.exceptions import CursorError


def make_cursor(position: str, wanted: object = None) -> str:
    """The cursor after `position` of a list with these filters, whose `repr` tells them apart."""
    return base64.urlsafe_b64encode(json.dumps([_fingerprint(wanted), position]).encode()).decode().rstrip("=")


def read_cursor(cursor: str, wanted: object = None) -> str:
    """The position that a cursor was made of. Raises CursorError for one of another list or made up."""
    try:
        fingerprint, position = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        valid = isinstance(position, str) and "\0" not in position and position.isprintable()
    except (ValueError, TypeError, binascii.Error):
        valid = False
    if not valid:
        raise no_cursor()
    if fingerprint != _fingerprint(wanted):
        raise CursorError("The cursor belongs to a list with other filters.", code="cursor_of_other_filters", hint="Keep the filters, or start anew.")
    return str(position)


def no_cursor() -> CursorError:
    return CursorError("The cursor is not one that this list gave.", code="cursor_invalid", hint="Give `next` of the page before, or no cursor.")


def _fingerprint(wanted: object) -> str:
    return hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]
