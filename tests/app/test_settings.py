"""Production does not start on the defaults of development."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings

PRODUCTION = {
    "environment": "production",
    "database_url": "postgresql://espalier:kV3vT9@db/espalier",
    "broker_url": "redis://:pQ7wX2@broker:6379/0",
    "store_url": "s3://models",
    "s3_endpoint": "http://store:8333",
    "s3_access_key": "AKR83",
    "s3_secret_key": "mZ5nB4",
    "secret_keys": 43 * "q" + "=",
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_defaults_need_no_server(tmp_path: Path) -> None:
    settings = Settings()
    assert settings.database_url.get_secret_value() == f"sqlite:///{tmp_path}/var/espalier.db"
    assert settings.broker_url.get_secret_value() == "filesystem://"
    assert settings.store_url == f"file://{tmp_path}/var/objects"


def test_production_with_secrets_of_its_own() -> None:
    assert Settings.model_validate(PRODUCTION).environment == "production"
    by_role = PRODUCTION | {"s3_endpoint": "", "s3_access_key": "", "s3_secret_key": ""}
    assert Settings.model_validate(by_role).s3_access_key.get_secret_value() == ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"database_url": ""}, "ESPALIER_DATABASE_URL"),
        ({"secret_keys": ""}, "ESPALIER_SECRET_KEYS"),
        ({"secret_keys": 43 * "q" + "=,short"}, "number 2 in ESPALIER_SECRET_KEYS"),
        ({"database_url": "sqlite:///x.db"}, "ESPALIER_DATABASE_URL"),
        ({"database_url": "postgresql://espalier@db/espalier"}, "ESPALIER_DATABASE_URL"),
        ({"database_url": "postgresql://espalier:espalier@db/espalier"}, "ESPALIER_DATABASE_URL"),
        ({"database_url": "postgresql://espalier:change-me@db/espalier"}, "ESPALIER_DATABASE_URL"),
        ({"broker_url": ""}, "ESPALIER_BROKER_URL"),
        ({"broker_url": "filesystem://"}, "ESPALIER_BROKER_URL"),
        ({"broker_url": "redis://broker:6379/0"}, "ESPALIER_BROKER_URL"),
        ({"broker_url": "redis://:Development-only@broker:6379/0"}, "ESPALIER_BROKER_URL"),
        ({"s3_access_key": ""}, "ESPALIER_S3_ACCESS_KEY"),
        ({"s3_secret_key": ""}, "ESPALIER_S3_SECRET_KEY"),
        ({"s3_secret_key": "minioadmin"}, "ESPALIER_S3_SECRET_KEY"),
    ],
)
def test_production_refuses(changes: dict[str, str], named: str) -> None:
    with pytest.raises(ValidationError, match=named) as refused:
        Settings.model_validate(PRODUCTION | changes)
    told = str(refused.value)
    for secret in ("kV3vT9", "pQ7wX2", "mZ5nB4", "change-me", "minioadmin", "Development-only"):
        assert secret not in told


def test_a_lease_outlives_a_late_beat() -> None:
    with pytest.raises(ValidationError, match="ESPALIER_BEAT_SECONDS"):
        Settings(lease_seconds=10, beat_seconds=6)


def test_secrets_are_not_printed() -> None:
    shown = repr(Settings.model_validate(PRODUCTION))
    for secret in ("kV3vT9", "pQ7wX2", "mZ5nB4"):
        assert secret not in shown
