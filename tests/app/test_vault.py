"""Secrets at rest are sealed, with keys that can be changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from app.exceptions import UnavailableError
from app.settings import Settings
from app.vault import Vault

SECRET = {"token": "hf_Tulip", "nested": ["é", 1]}


def vault(home: Path, *keys: str) -> Vault:
    return Vault(Settings(home=home, secret_keys=SecretStr(",".join(keys))))


def test_what_is_sealed_is_opened_again_and_not_to_be_read(tmp_path: Path) -> None:
    sealed = vault(tmp_path).seal(SECRET)
    assert "Tulip" not in sealed
    assert vault(tmp_path).open(sealed) == SECRET  # a second process finds the same key
    kept = tmp_path / "secret.key"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_a_key_can_be_changed(tmp_path: Path) -> None:
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    sealed = vault(tmp_path, old).seal(SECRET)
    assert vault(tmp_path, new, old).open(sealed) == SECRET
    assert vault(tmp_path, new).open(vault(tmp_path, new, old).seal(SECRET)) == SECRET
    with pytest.raises(UnavailableError, match="can't be read") as refused:
        vault(tmp_path, new).open(sealed)
    assert refused.value.code == "secret_unreadable"


def test_the_command_makes_a_key() -> None:
    made = subprocess.run([sys.executable, "-m", "app.vault"], capture_output=True, text=True, check=True).stdout.strip()
    assert Settings(secret_keys=SecretStr(made)).secret_keys.get_secret_value() == made
