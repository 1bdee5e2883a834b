"""Settings of the service, from the environment (`ESPALIER_…`) or a `.env` file. The defaults need no server; three URLs make it a production set-up."""

from __future__ import annotations

import base64
import json
import sys
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

QUEUE = r"^[a-z0-9][a-z0-9-]{0,47}$"  # a class of workers
RATE = r"^([1-9][0-9]{0,8}/(second|minute|hour|day))?$"  # a notation of the `limits` library
MAX_PART_BYTES = 2**30  # of an uploaded checkpoint
DEVELOPMENT_SECRETS = frozenset({"admin", "changeme", "espalier", "minioadmin", "password", "postgres", "redis", "secret", "test"})


class Settings(BaseSettings):
    # Inputs stay out of error messages: they hold passwords.
    model_config = SettingsConfigDict(env_prefix="ESPALIER_", env_file=".env", extra="ignore", hide_input_in_errors=True)

    environment: Literal["development", "production"] = Field(
        "development", description="`production` refuses SQLite, messages in a directory, and passwords of development."
    )
    home: Path = Field(Path("var"), description="Directory of the worker's files; the embedded default also keeps database, objects and messages there.")

    # The three URLs. Empty means embedded: SQLite, a local directory, messages in a directory.
    database_url: SecretStr = Field(SecretStr(""), description="`postgresql://user:password@host/name`. Empty: SQLite below the home directory.")
    broker_url: SecretStr = Field(SecretStr(""), description="`redis://:password@host:6379/0`. Empty: messages in a directory below the home directory.")
    store_url: str = Field("", description="`s3://bucket/prefix`, or `file:///directory`. Empty: a directory below the home directory.")

    s3_endpoint: str = Field("", description="URL of the S3 server. Empty: AWS.")
    s3_public_endpoint: str = Field("", description="URL at which clients reach the S3 server, where it is another.")
    s3_region: str = Field("us-east-1", description="Region that requests to S3 are signed for.")
    s3_access_key: SecretStr = Field(SecretStr(""), description="Access key of the bucket. May be empty on AWS, where a role gives access.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="Secret of the access key.")
    presign_seconds: int = Field(600, ge=1, le=86400, description="Seconds for which a download link to S3 is good.")

    host: str = Field("127.0.0.1", description="Address on which `espalier serve` listens.")
    port: int = Field(8000, ge=0, le=65535, description="Port on which `espalier serve` listens; 0: a free one.")
    public_url: str = Field("", description="URL at which clients reach the API, which model registries are told. Empty: the address on which it listens.")
    secret_keys: SecretStr = Field(
        SecretStr(""), description="Fernet keys, by commas, for the secrets of users: the first one encrypts, all decrypt. Empty: one in the home directory."
    )
    metrics_token: SecretStr = Field(SecretStr(""), description="Bearer token of `/metrics`, which tells of all tenants. Empty: there is no `/metrics`.")
    key_cache_seconds: float = Field(5, ge=0, le=300, description="Seconds for which an API process goes on accepting a key that was revoked elsewhere.")
    rate_read: str = Field(
        "6000/minute", pattern=RATE, description="Calls that only read, of one key: `number/second`, `/minute`, `/hour` or `/day`. Empty: no limit."
    )
    rate_write: str = Field("3000/minute", pattern=RATE, description="Calls that change something, of one key. Empty: no limit.")
    rate_read_tenant: str = Field("24000/minute", pattern=RATE, description="Calls that only read, of all keys of a tenant together. Empty: no limit.")
    rate_write_tenant: str = Field("12000/minute", pattern=RATE, description="Calls that change something, of all keys of a tenant together. Empty: no limit.")
    rate_refused: str = Field("300/minute", pattern=RATE, description="Calls of one client address with a key that is refused. Empty: no limit.")
    header_seconds: float = Field(10, gt=0, description="Seconds that a client may take to send the head of a request.")
    body_seconds: float = Field(300, gt=0, description="Seconds that a client may take to send the body of a request.")
    docs: bool = Field(True, description="Whether the API's pages `/docs` and `/openapi.json` are served.")
    cors_origins: tuple[str, ...] = Field((), description="Origins of web pages that may call the API, as a JSON list.")

    model_roots: tuple[Path, ...] = Field((), description="Directories, as a JSON list; jobs may name the checkpoints below them by path.")
    model_urls: tuple[str, ...] = Field((), description="`s3://bucket/prefix`, as a JSON list; jobs may name the checkpoints below them by URL.")
    text_roots: tuple[Path, ...] = Field((), description="Directories, as a JSON list; jobs may name the texts below them by path.")
    hub: bool = Field(True, description="Whether models may be fetched from the Hugging Face Hub.")

    model_cache_bytes: int = Field(0, ge=0, description="Bytes of the models that a worker keeps on its disk; 0: as many as fit.")
    resume_push_seconds: float = Field(60, ge=0, description="Least seconds between two times that the state of a job with durable resume is stored.")

    store_patience_seconds: float = Field(300, ge=1, description="Seconds for which the upload of a result waits for an S3 server that does not answer.")
    retention_days: int = Field(0, ge=0, description="Days after which the files of a result are deleted; its report stays. 0: never.")
    max_stored_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of one tenant's results above which the files of the oldest are deleted, where the tenant has no bound of its own; 0: no bound. "
        "The newest result stays, whatever its size.",
    )
    retention_seconds: float = Field(600, gt=0, description="Seconds between two rounds that delete results past these bounds, and stored files of no job.")
    orphan_seconds: float = Field(3600, ge=0, description="Age, in seconds, below which a stored file that belongs to no job is left alone.")

    audit_days: int = Field(365, ge=0, description="Days after which entries of the audit log are deleted. 0: never.")

    upload_part_bytes: int = Field(
        64 * 2**20,
        ge=2**16,
        le=MAX_PART_BYTES,
        description="Bytes of the parts in which checkpoints are uploaded. Uploads that have begun keep the size of before.",
    )
    upload_days: float = Field(2, gt=0, description="Days without a new part after which an upload is given up and what came of it is deleted.")
    max_checkpoint_bytes: int = Field(500_000_000_000, ge=1, description="Bytes that one uploaded checkpoint may have.")

    keep_work_seconds: float = Field(
        24 * 3600,
        ge=0,
        description="Seconds for which the work of a failed or cancelled job is kept for a retry: its work directory, if the worker's disk allows, and the state "
        "that a job with durable resume has stored.",
    )

    queue: str = Field("default", pattern=QUEUE, description="Class of GPUs that a worker belongs to; it runs the jobs that are submitted with this `queue`.")
    max_queued: int = Field(10_000, ge=1, description="Jobs of one tenant that may wait at once, where the tenant has no bound of its own.")

    max_streams: int = Field(1000, ge=1, description="Event streams and long polls that one process of the API keeps open at once.")

    webhook_networks: tuple[IPv4Network | IPv6Network, ...] = Field(
        (), description="Networks (CIDR), as a JSON list, in which webhooks may lie though they are not public."
    )
    webhook_timeout_seconds: float = Field(15, gt=0, description="Seconds that a webhook's receiver has to answer, from the look-up of its name on.")
    webhook_retry_seconds: tuple[NonNegativeFloat, ...] = Field(
        (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400),
        description="Seconds, as a JSON list, after which news that a webhook did not take is sent again; after the last of them it is given up.",
    )

    sink_networks: tuple[IPv4Network | IPv6Network, ...] = Field(
        (), description="Networks (CIDR), as a JSON list, in which the servers of sinks may lie though they are not public, and be reached by plain http."
    )
    sinks_at_once: int = Field(2, ge=1, le=100, description="Sinks that one exporter brings results to at once.")
    sink_tries: int = Field(5, ge=1, description="Tries at a sink, after which it has failed.")
    sink_retry_seconds: float = Field(30, ge=0, description="Seconds between the first and the second try at a sink; doubles with each further one.")
    sink_max_seconds: float = Field(6 * 3600, gt=0, description="Seconds that one try at a sink may take.")

    lease_seconds: float = Field(45, gt=0, description="Seconds after its worker's last beat at which a job is given to another worker.")
    beat_seconds: float = Field(15, gt=0, description="Seconds between two beats of a worker; at most half of the lease.")
    sweep_seconds: float = Field(2, gt=0, description="Seconds between two rounds in which the dispatcher publishes, publishes again and reaps.")
    republish_seconds: float = Field(30, gt=0, description="Seconds after which a job that still waits gets another message, if the broker lost its own.")
    cancel_grace_seconds: float = Field(5, ge=0, description="Seconds between the SIGTERM and the SIGKILL of an engine that is cancelled or drained.")
    engine_memory_bytes: int = Field(0, ge=0, description="Anonymous memory, in bytes, above which an engine is ended; 0: no limit.")

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
        self.public_url = self.public_url.rstrip("/") or f"http://{self.host}:{self.port}"
        if self.queue == "auto":
            raise ValueError("ESPALIER_QUEUE can't be 'auto', by which a job leaves its class to the service")
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
        if not self.secret_keys:
            raise ValueError("production needs a key in ESPALIER_SECRET_KEYS; `python -m app.vault` makes one")
        return self

    @field_validator("secret_keys")
    @classmethod
    def _are_keys(cls, keys: SecretStr) -> SecretStr:
        for position, key in enumerate(keys.get_secret_value().split(",") if keys else ()):
            try:
                right = len(base64.urlsafe_b64decode(key)) == 32
            except ValueError:
                right = False
            if not right:
                raise ValueError(f"number {position + 1} in ESPALIER_SECRET_KEYS is not 32 bytes in URL-safe base64; `python -m app.vault` makes one")
        return keys

    @property
    def messages_dir(self) -> Path:
        return self.home / "messages"

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def exports_dir(self) -> Path:
        return self.home / "exports"

    @property
    def work_dir(self) -> Path:
        return self.home / "work"


@lru_cache
def get_settings() -> Settings:
    return Settings()


def table() -> str:
    """Every setting with its default, the values it may have and what it means, as a Markdown table."""
    rows = []
    for name, field in Settings.model_json_schema()["properties"].items():
        default = field["default"]
        values = [f"`{value}`" for value in field.get("enum", ())]
        values += [f"{sign} {field[bound]}" for bound, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("maximum", "≤")) if bound in field]
        shown = f"`{default if isinstance(default, str) else json.dumps(default)}`" if default not in ("", []) else ""
        rows.append(f"| `{Settings.model_config['env_prefix']}{name.upper()}` | {shown} | {', '.join(values)} | {field['description']} |\n")
    return "| variable | default | values | meaning |\n|---|---|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table())
