"""Where a job's result is to go once it has succeeded, and what became of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, SecretStr, TypeAdapter, model_validator

from app.queues.schemas import Out
from app.strict import Strict

MAX_SINKS = 4  # of one submission
SinkName = Literal["hub", "mlflow", "s3"]
SINK_NAMES: tuple[str, ...] = get_args(SinkName)
PLAIN_URL = r"^https?://[^\s/?#@\\]+(/[^\s?#@\\]*)?$"  # no user, no query: what stands in it is shown
PRINTABLE = r"^[\x21-\x7e]+$"


def _printable(secret: SecretStr) -> SecretStr:
    """It travels in HTTP headers."""
    value = secret.get_secret_value()
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise ValueError("a secret has printable ASCII characters and no spaces")
    return secret


Secret = Annotated[SecretStr, Field(min_length=1, max_length=1000, json_schema_extra={"pattern": PRINTABLE}), AfterValidator(_printable)]


class Hub(Strict):
    """Push the checkpoint, with its model card and the report, to a model repository of the Hugging Face Hub. It is made if it is missing."""

    name: Literal["hub"] = Field(description="Which kind of sink.")
    repository: str = Field(
        max_length=96, pattern=r"^[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*/[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*$", description="Its name.", examples=["owner/name-pruned"]
    )
    private: bool = Field(True, description="Whether a repository that is made is private; one that exists stays as it is.")
    token: Secret = Field(description="An access token that may write there.", examples=["hf_xxx"])


class Mlflow(Strict):
    """Register the result in an MLflow server: a run with parameters, metrics and tags, and, with `registered_model`, a version of a model."""

    name: Literal["mlflow"] = Field(description="Which kind of sink.")
    tracking_uri: str = Field(max_length=1000, pattern=PLAIN_URL, description="The server's URL.", examples=["https://mlflow.example.org"])
    experiment: str = Field(
        min_length=1, max_length=250, pattern=r"^[^\x00-\x1f]+$", description="The run's experiment, made if it is missing.", examples=["pruning"]
    )
    registered_model: str | None = Field(
        None,
        min_length=1,
        max_length=250,
        pattern=r"^[^\x00-\x1f/:]+$",
        description="The model that gets a version, made if it is missing.",
        examples=["smol-pruned"],
    )
    token: Secret | None = Field(None, description="Bearer token, where the server asks for one.")
    username: Secret | None = Field(None, description="User name, where the server asks for one; with `password`, without `token`.")
    password: Secret | None = Field(None, description="The user's password.")

    @model_validator(mode="after")
    def _one_way_to_sign_in(self) -> Mlflow:
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password go together; give both, or none")
        if self.token is not None and self.username is not None:
            raise ValueError("give a token, or a username with its password, not both")
        return self


class S3(Strict):
    """Copy all files of the result to a bucket; `manifest.json`, with their sha256s, is written last."""

    name: Literal["s3"] = Field(description="Which kind of sink.")
    url: str = Field(
        max_length=900,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$",
        description="Bucket and prefix. Objects of the same names are overwritten.",
        examples=["s3://models/smol-pruned"],
    )
    endpoint: str | None = Field(None, max_length=1000, pattern=PLAIN_URL, description="URL of the S3 server; null: AWS.", examples=["https://s3.example.org"])
    region: str = Field("us-east-1", pattern=r"^[a-z0-9-]{1,40}$", description="Region that requests are signed for.")
    access_key: Secret = Field(description="Access key that may write there.", examples=["AKIAXXX"])
    secret_key: Secret = Field(description="Secret of the access key.", examples=["xxx"])


Sink = Annotated[Hub | Mlflow | S3, Field(discriminator="name")]
SINK: TypeAdapter[Hub | Mlflow | S3] = TypeAdapter(Sink)


class SinkSecrets(Strict):
    """The secrets of a sink once more: they are forgotten when it ends. Those of the other kinds stay out."""

    token: Secret | None = Field(None, description="Of `hub` and `mlflow`.", examples=["hf_xxx"])
    username: Secret | None = Field(None, description="Of `mlflow`.")
    password: Secret | None = Field(None, description="Of `mlflow`.")
    access_key: Secret | None = Field(None, description="Of `s3`.")
    secret_key: Secret | None = Field(None, description="Of `s3`.")


def secrets_of(sink: Hub | Mlflow | S3 | SinkSecrets) -> dict[str, str]:
    return {name: value.get_secret_value() for name, value in sink if isinstance(value, SecretStr)}


def target_of(sink: Hub | Mlflow | S3) -> dict[str, Any]:
    """All of it but the secrets."""
    return sink.model_dump(mode="json", exclude=set(SinkSecrets.model_fields))


class SinkError(Out):
    """Why the latest try failed."""

    code: str = Field(description="A stable name for programs.", examples=["sink_denied"])
    message: str = Field(description="What was wrong.", examples=["The hub refused the token (401)."])
    hint: str = Field("", description="What to do about it.", examples=["Try again with a token that may write to the repository."])


class SinkRun(Out):
    """What becomes of a sink."""

    number: int = Field(description="0, 1, … within the job.", examples=[0])
    name: SinkName = Field(description="Which kind of sink.", examples=["hub"])
    target: dict[str, Any] = Field(description="As submitted, without secrets.", examples=[{"name": "hub", "repository": "owner/name-pruned", "private": True}])
    state: Literal["pending", "waiting", "succeeded", "failed", "skipped"] = Field(
        description="`pending` until the job has succeeded, then `waiting` until it is done: `succeeded` or `failed`. `skipped`: the job did not succeed.",
        examples=["succeeded"],
    )
    tries: int = Field(description="How often it was tried.", examples=[1])
    result: dict[str, Any] | None = Field(
        description="Where the result lies now, once it succeeded.", examples=[{"url": "https://hub.example.org/owner/name-pruned"}]
    )
    error: SinkError | None = Field(description="Why the latest try failed; null otherwise.")
    updated_at: datetime = Field(description="When it last changed (UTC).", examples=["2026-11-22T01:03:03.456Z"])
