"""GET and POST of `/v1/jobs` as one writes them first, for comparison: ORM sessions, the key looked up at each call, the message sent from the endpoint.

They take, write and answer the same as the service does, but for what a first version leaves out: limits, logs, metrics, ETags, idempotency, the outbox.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils import uuid7

from app import models, queue
from app.jobs.schemas import Job, Submission
from app.recipe import Recipe
from app.settings import Settings

settings = Settings()
new_session = sessionmaker(create_engine(os.environ["ESPALIER_DATABASE_URL"], pool_size=20))
app = FastAPI()


def get_db() -> Iterator[Session]:
    with new_session() as session:
        yield session


Db = Annotated[Session, Depends(get_db)]


def get_key(db: Db, authorization: Annotated[str, Header()]) -> models.ApiKey:
    _, key_id, secret = authorization.removeprefix("Bearer ").split("_", 2)
    key = db.scalar(select(models.ApiKey).where(models.ApiKey.id == f"key_{key_id}"))
    if key is None or key.secret_sha256 != hashlib.sha256(secret.encode()).hexdigest():
        raise HTTPException(401)
    return key


Key = Annotated[models.ApiKey, Depends(get_key)]


@app.get("/v1/jobs/{job_id}")
def get_job(job_id: str, key: Key, db: Db) -> Job:
    job = db.scalar(select(models.Job).where(models.Job.id == job_id, models.Job.tenant_id == key.tenant_id))
    if job is None:
        raise HTTPException(404)
    return Job.of(job)


@app.post("/v1/jobs", status_code=202)
def submit_job(recipe: Submission, key: Key, db: Db) -> Job:
    job = models.Job(
        id=f"job_{uuid7().hex}",
        tenant_id=key.tenant_id,
        model=recipe.model,
        method=recipe.method.name,
        recipe=recipe.model_dump(mode="json", include=set(Recipe.model_fields)),
        queue=recipe.queue,
        priority=recipe.priority,
        labels=recipe.metadata,
        max_attempts=recipe.limits.max_attempts,
        max_runtime=recipe.limits.max_runtime,
        last_event=1,
    )
    db.add(job)
    db.flush()
    db.add(models.JobEvent(job_id=job.id, sequence=1, tenant_id=key.tenant_id, kind="queued", message="Queued."))
    db.add(models.AuditEntry(tenant_id=key.tenant_id, key_id=key.id, action="job.submit", target=job.id, request_id=uuid7().hex))
    db.commit()
    queue.publish(settings, job.id)
    db.refresh(job)
    return Job.of(job)
