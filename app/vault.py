"""Secrets of users at rest: encrypted (Fernet) with the first key of ESPALIER_SECRET_KEYS, read with any of them, so that a key can be changed.

Without that setting a key is made once and kept in the home directory, which suits one machine; production demands the setting.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from uuid_utils import uuid7

from app.exceptions import UnavailableError
from app.settings import Settings

FILE = "secret.key"


class Vault:
    """Seals what JSON can hold into text, and opens it again."""

    def __init__(self, settings: Settings) -> None:
        keys = settings.secret_keys.get_secret_value() or _kept_key(settings.home / FILE)
        self._fernet = MultiFernet([Fernet(key) for key in keys.split(",")])

    def seal(self, secret: Any) -> str:
        return self._fernet.encrypt(json.dumps(secret).encode()).decode()

    def open(self, sealed: str) -> Any:
        """Raises UnavailableError where none of the keys sealed it."""
        try:
            return json.loads(self._fernet.decrypt(sealed))
        except InvalidToken as error:
            hint = "Tell the operator: the key that encrypted it is missing from ESPALIER_SECRET_KEYS."
            raise UnavailableError("A stored secret can't be read.", code="secret_unreadable", hint=hint) from error


def _kept_key(path: Path) -> str:
    """The key in the file, which is made if there is none; processes and threads that start together agree on one."""
    if path.exists():
        return path.read_text(encoding="ascii")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{FILE}.{uuid7().hex}")
    fresh.touch(mode=0o600)
    fresh.write_bytes(Fernet.generate_key())
    try:
        os.link(fresh, path)  # fails where another was faster
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text(encoding="ascii")


if __name__ == "__main__":
    sys.stdout.write(f"{Fernet.generate_key().decode()}\n")
