"""Settings of the service, from the environment (`ESPALIER_…`) or a `.env` file. The defaults need no server; three URLs make it a production set-up."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEVELOPMENT_SECRETS = frozenset({"admin", "changeme", "espalier", "minioadmin", "password", "postgres", "redis", "secret", "test"})


class Settings(BaseSettings):
    # Inputs stay out of error messages: they hold passwords.
    model_config = SettingsConfigDict(env_prefix="ESPALIER_", env_file=".env", extra="ignore", hide_input_in_errors=True)

    environment: Literal["development", "production"] = "development"
    home: Path = Path("var")  # where the embedded default keeps database, objects, messages and work

    # The three URLs. Empty means embedded: SQLite, a local directory, messages in a directory.
    database_url: SecretStr = SecretStr("")  # postgresql://user:password@host/name
    broker_url: SecretStr = SecretStr("")  # redis://:password@host:6379/0
    store_url: str = ""  # s3://bucket/prefix

    s3_endpoint: str = ""  # empty: AWS
    s3_public_endpoint: str = ""  # where clients reach the bucket, if elsewhere
    s3_region: str = "us-east-1"
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    presign_seconds: int = Field(600, ge=1, le=86400)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    cors_origins: tuple[str, ...] = ()

    model_roots: tuple[Path, ...] = ()  # local checkpoints below these may be named by path
    text_roots: tuple[Path, ...] = ()  # local texts below these may be named by path
    hub: bool = True  # whether models may be fetched from the Hugging Face Hub

    lease_seconds: float = Field(45, gt=0)
    beat_seconds: float = Field(15, gt=0)
    sweep_seconds: float = Field(2, gt=0)  # how often the dispatcher publishes, re-publishes and reaps
    republish_seconds: float = Field(30, gt=0)  # a queued job whose last message is older gets another
    cancel_grace_seconds: float = Field(5, ge=0)
    engine_memory_bytes: int = Field(0, ge=0)  # resident memory at which an engine is ended; 0: no limit

    @model_validator(mode="after")
    def _embedded_defaults(self) -> Self:
        home = self.home.absolute()
        self.home = home
        if not self.database_url.get_secret_value():
            self.database_url = SecretStr(f"sqlite:///{home}/espalier.db")
        if not self.broker_url.get_secret_value():
            self.broker_url = SecretStr("filesystem://")
        if not self.store_url:
            self.store_url = (home / "objects").as_uri()
        if self.beat_seconds * 2 > self.lease_seconds:
            raise ValueError("ESPALIER_BEAT_SECONDS must be at most half of ESPALIER_LEASE_SECONDS, or a lease is lost by one late beat")
        return self

    @model_validator(mode="after")
    def _production_needs_servers_and_secrets(self) -> Self:
        if self.environment == "development":
            return self
        database, broker = urlsplit(self.database_url.get_secret_value()), urlsplit(self.broker_url.get_secret_value())
        if not database.scheme.startswith("postgresql"):
            raise ValueError("production needs ESPALIER_DATABASE_URL=postgresql://…")
        if broker.scheme not in ("redis", "rediss"):
            raise ValueError("production needs ESPALIER_BROKER_URL=redis://…")
        secrets = {"database_url": database.password, "broker_url": broker.password}
        if self.s3_endpoint:  # AWS itself also gives access by role, without keys
            secrets |= {"s3_access_key": self.s3_access_key.get_secret_value(), "s3_secret_key": self.s3_secret_key.get_secret_value()}
        for name, secret in secrets.items():
            if not secret:
                raise ValueError(f"production needs a password in ESPALIER_{name.upper()}")
            if secret.lower() in DEVELOPMENT_SECRETS or "change-me" in secret.lower() or "development" in secret.lower():
                raise ValueError(f"ESPALIER_{name.upper()} still holds a development secret; set one of your own")
        return self

    @property
    def messages_dir(self) -> Path:
        return self.home / "messages"

    @property
    def work_dir(self) -> Path:
        return self.home / "work"


@lru_cache
def get_settings() -> Settings:
    return Settings()
