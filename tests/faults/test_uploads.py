"""A worker whose upload is killed."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from app.models import Artifact
from app.storage import open_store
from tests import jobs
from tests.faults.conftest import LASTING_LEASE, SERVICES, Service, command, family


@pytest.mark.parametrize("servers", SERVICES[:1], indirect=True)
@pytest.mark.parametrize("lease", [LASTING_LEASE], ids=["lasting lease"])
def test_an_upload_that_is_killed_goes_on_in_the_same_attempt(service: Service) -> None:
    job_id = service.submit(model=service.model(stuck=True))
    worker = service.start_worker()
    jobs.wait_until(lambda: jobs.get(service.database, job_id).phase == "upload" and service.stored(), 60, "the upload")
    blocking = service.settings.work_dir / job_id / "out" / "checkpoint" / "never-written"
    blocking.unlink()  # the process that waits for it does not notice
    blocking.write_bytes(b"written")
    [upload] = [process for process in family(worker) if "worker.upload" in command(process)]
    upload.kill()

    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 1
    assert job.artifact_prefix is not None
    assert (job.progress["fraction"], job.progress["bytes_done"]) == (1.0, job.progress["bytes_total"])
    with service.database.reading() as session:
        artifacts = session.scalars(select(Artifact).where(Artifact.job_id == job_id)).all()
    assert {artifact.path for artifact in artifacts} == {"report.json", "checkpoint/model.safetensors", "checkpoint/never-written"}
    store = open_store(service.settings)
    assert {artifact.path: artifact.bytes for artifact in artifacts} == {
        entry.key.removeprefix(job.artifact_prefix): entry.bytes for entry in store.entries(job.artifact_prefix)
    }
    assert job.stored_bytes == sum(artifact.bytes for artifact in artifacts)
