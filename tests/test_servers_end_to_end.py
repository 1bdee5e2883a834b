"""One job, end to end, on Postgres, Valkey and SeaweedFS: uvicorn and Celery as processes, everything over HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
import torch
from obstore.store import S3Store
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.auth import create_key
from app.processes import dies_with
from tests import jobs
from tests.models import make_checkpoint, make_text
from tests.servers import S3, free_port


@pytest.fixture
def client(tmp_path: Path, postgres_database: str, redis_database: str, s3: S3) -> Iterator[httpx.Client]:
    """A client with a key, of a service whose processes have started."""
    make_checkpoint(tmp_path / "models" / "tiny", "llama")
    make_text(tmp_path / "texts", words=2000)
    port = free_port()
    settings = s3.environment | {
        "ESPALIER_STORE_URL": f"{s3.url}/end-to-end",
        "ESPALIER_HOME": str(tmp_path / "home"),
        "ESPALIER_DATABASE_URL": postgres_database,
        "ESPALIER_BROKER_URL": redis_database,
        "ESPALIER_MODEL_ROOTS": json.dumps([str(tmp_path / "models")]),
        "ESPALIER_TEXT_ROOTS": json.dumps([str(tmp_path / "texts")]),
        "ESPALIER_HUB": "false",
        "OMP_NUM_THREADS": "1",
    }
    environment = os.environ | settings
    database = jobs.open_database(postgres_database)
    with database.writing() as session:
        key = create_key(session, "tenant")
    database.dispose()
    commands = [
        ["uvicorn", "--factory", "app.main:create_app", "--port", str(port)],
        ["celery", "-A", "worker.celery", "worker", "-Q", "prune", "-c", "1", "-l", "INFO"],
    ]
    with (tmp_path / "log").open("wb") as log:
        processes = [
            subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=log, stderr=log, preexec_fn=dies_with(os.getpid()))  # noqa: PLW1509
            for command in commands
        ]
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=30) as opened:
                jobs.wait_until(lambda: ready(opened), 120, "the API")
                yield opened
        finally:
            for process in processes:
                process.terminate()
            ended = [process.wait(60) for process in processes]
            sys.stdout.write((tmp_path / "log").read_text(errors="replace")[-8000:])
    assert ended == [-signal.SIGTERM, 0]  # uvicorn shuts down in order, then ends by the signal itself


def ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").is_success
    except httpx.TransportError:
        return False


def wait(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    def finished() -> bool:
        job.update(client.get(f"/v1/jobs/{job['id']}").raise_for_status().json())
        return job["state"] in ("succeeded", "failed", "cancelled")

    jobs.wait_until(finished, 120, "the job's end")
    return job


def test_a_job_end_to_end_on_servers(client: httpx.Client, s3: S3, tmp_path: Path) -> None:
    recipe = {
        "model": "tiny",
        "method": "cfsp",
        "sparsity": 0.25,
        "calibration": {"source": "text-0.txt", "samples": 4, "sequence_length": 64},
        "evaluation": None,
    }
    submitted = client.post("/v1/jobs", json=recipe)
    assert submitted.status_code == 202, submitted.text
    job = wait(client, submitted.json())
    assert (job["state"], job["error"], job["attempt"], job["progress"]["fraction"]) == ("succeeded", None, 1, 1.0)
    kinds = [event["kind"] for event in client.get(f"/v1/jobs/{job['id']}/events").json()["items"]]
    assert (kinds[:2], kinds[-1]) == (["queued", "claimed"], "succeeded")

    files = client.get(f"/v1/jobs/{job['id']}/artifacts").raise_for_status().json()["items"]
    folder = tmp_path / "downloaded"
    for file in files:
        answer = client.get(f"/v1/jobs/{job['id']}/artifacts/{file['path']}", follow_redirects=False)
        assert answer.status_code == 307
        assert answer.headers["Location"].startswith(s3.endpoint)
        content = httpx.get(answer.headers["Location"], trust_env=False).raise_for_status().content  # without a key
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        (folder / file["path"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / file["path"]).write_bytes(content)

    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    tokens = AutoTokenizer.from_pretrained(folder / "checkpoint")("A tree on a wall", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
    assert model.config.intermediate_size == 36  # of 48
    report = client.get(f"/v1/jobs/{job['id']}/report").raise_for_status().json()
    assert report["sparsity"]["ffn"] == pytest.approx(0.25)
    assert report == json.loads((folder / "report.json").read_text())

    refused = client.post("/v1/jobs", json=recipe | {"calibration": {"source": "text-0.txt", "samples": 4, "sequence_length": 100_000}})
    failed = wait(client, refused.json())
    assert (failed["state"], failed["error"]["code"]) == ("failed", "calibration_text_too_short")
    assert failed["error"]["hint"]
    assert str(tmp_path) not in json.dumps([failed, report])  # the operator's directories are not the users' business

    bucket = S3Store(
        s3.bucket,
        endpoint=s3.endpoint,
        access_key_id=s3.access_key,
        secret_access_key=s3.secret_key,
        region=s3.region,
        client_options={"allow_http": True},
    )
    stored = [found["path"] for page in obstore.list(bucket, "end-to-end") for found in page]
    assert len(stored) == len(files)
    assert all(f"/{job['id']}/a1/" in path for path in stored)
    # The work of the failed job is kept, as it may be retried.
    jobs.wait_until(lambda: [path.name for path in (tmp_path / "home" / "work").glob("job_*")] == [failed["id"]], 60, "the clean-up")
