"""What the webhook endpoints take and give."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StringConstraints, field_validator

from app import models
from app.queues.schemas import Out
from app.strict import Strict

Kind = Literal["job.started", "job.succeeded", "job.failed", "job.cancelled", "job.requeued", "artifacts.deleted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
State = Literal["waiting", "delivered", "failed"]
WEBHOOK_ID = r"^wh_[0-9a-f]{32}$"


class NewWebhook(Strict):
    """An address that is to hear of jobs."""

    url: Annotated[str, StringConstraints(max_length=2000, pattern=r"^https?://[!-~]+$")] = Field(
        description="Where news is posted: an https address that is public, without user, password and fragment.",
        examples=["https://ci.example.com/hooks/espalier"],
    )
    description: str = Field("", max_length=200, pattern=r"^[^\x00]*$", description="What it is for.", examples=["CI"])
    kinds: tuple[Kind, ...] = Field(
        KINDS, min_length=1, max_length=len(KINDS), strict=False, description="The news that it hears of; default: all.", examples=[["job.succeeded"]]
    )
    every_job: bool = Field(True, description="Whether it hears of every job; else only of those that name it as their `webhook`.")

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(kinds))


class Webhook(Out):
    """An address that hears of jobs."""

    id: str = Field(description="Its id.", examples=["wh_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    url: str = Field(description="Where news is posted.", examples=["https://ci.example.com/hooks/espalier"])
    description: str = Field(description="What it is for.", examples=["CI"])
    kinds: list[Kind] = Field(description="The news that it hears of.", examples=[["job.succeeded"]])
    every_job: bool = Field(description="Whether it hears of every job, or only of those that name it.")
    disabled_at: datetime | None = Field(description="Since when nothing is sent there (UTC); null while it is enabled.", examples=[None])
    disabled_reason: str | None = Field(description="Why nothing is sent there.", examples=[None])
    failing_since: datetime | None = Field(description="The first try that failed since one succeeded (UTC); after five days it is disabled.", examples=[None])
    created_at: datetime = Field(description="When it was made (UTC).", examples=["2026-11-22T01:02:03.456Z"])


class WebhookWithSecret(Webhook):
    """A webhook with its secret, which is shown this once."""

    secret: str = Field(description="By which each message is signed (Standard Webhooks, HMAC-SHA256).", examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])

    @classmethod
    def of(cls, webhook: models.Webhook, secret: str) -> Self:
        return cls.model_validate({**Webhook.model_validate(webhook).model_dump(), "secret": secret})


class WebhookList(Out):
    """The webhooks of a tenant."""

    items: list[Webhook] = Field(description="Oldest first.")


class Delivery(Out):
    """A message to a webhook. Receivers verify its signature, answer with a 2xx status, then GET what it names."""

    id: str = Field(description="The header `webhook-id`, the same at every try.", examples=["dlv_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    job_id: str | None = Field(description="The job that it tells of; null for a ping.", examples=["job_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    kind: str = Field(description="One of the webhook's kinds, or `ping`.", examples=["job.succeeded"])
    payload: dict[str, Any] = Field(
        description="What is sent, with `timestamp`.",
        examples=[{"type": "job.succeeded", "data": {"job_id": "job_0193d5f0", "state": "succeeded", "sequence": 42, "url": "/v1/jobs/job_0193d5f0"}}],
    )
    state: State = Field(description="`waiting` for its next try, `delivered`, or `failed`: it is tried no more.", examples=["delivered"])
    tries: int = Field(description="How often it was sent.", examples=[1])
    next_at: datetime | None = Field(description="When it is tried next (UTC).", examples=[None])
    last_status: int | None = Field(description="HTTP status of the last answer; null where there was none.", examples=[204])
    last_error: str | None = Field(description="Why the last try did not count as taken.", examples=[None])
    created_at: datetime = Field(description="When it happened (UTC).", examples=["2026-11-22T01:02:03.456Z"])
    delivered_at: datetime | None = Field(description="When it was taken (UTC).", examples=["2026-11-22T01:02:03.956Z"])


class DeliveryPage(Out):
    """Messages to a webhook, newest first; those of the last 30 days."""

    items: list[Delivery] = Field(description="The messages of this page.")
    next: str | None = Field(description="Give it as `cursor`, with the same `job_id`, for the next page; null on the last one.")
