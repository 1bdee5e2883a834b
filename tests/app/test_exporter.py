"""Results brought to an S3 server, an MLflow server and a stand-in for the hub, by real processes that are killed at bad moments."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import obstore
import psutil
import pytest
from obstore.store import S3Store
from sqlalchemy import update

from app import totals
from app.auth import Caller
from app.database import Database, db_now
from app.jobs.lease import StoredFile, claim, finish
from app.jobs.repository import insert_job
from app.models import Job, SinkRun
from app.processes import dies_with
from app.recipe import Recipe
from app.report import LayerReport, Parameters, Report, Sparsities
from app.settings import Settings, get_settings
from app.sinks import service
from app.sinks.mlflow import register
from app.sinks.repository import insert_runs
from app.sinks.results import Result, ResultFile
from app.sinks.schemas import SINK, Mlflow
from app.storage import Store, open_store
from app.vault import Vault
from tests.hub_uploads import TOKEN, HubUploads, running_hub_uploads
from tests.jobs import TENANT, events, get, open_database, wait_until
from tests.mlflow_server import mlflow_server
from tests.servers import S3, free_port, fresh_database

RECIPE = {"model": "owner/dense", "method": "cfsp", "sparsity": 0.3}
WEIGHTS = os.urandom(1_000_000) * 20  # more than two parts of an upload
QUICK = {"SWEEP_SECONDS": "0.1", "LEASE_SECONDS": "120", "BEAT_SECONDS": "0.5", "SINK_RETRY_SECONDS": "0.2", "SINK_TRIES": "3"}


def make_report() -> dict[str, Any]:
    counts = Parameters(all=100, non_embedding=80, decoder=70, ffn=40, ffn_channels=10, decoder_zeros=0, ffn_zeros=0)
    layer = {"dropped": False, "ffn_channels_before": 10, "kv_groups": 2, "kv_groups_before": 2, "experts": None, "experts_before": None, "importance": 0.5}
    return Report(
        recipe=Recipe.model_validate(RECIPE),
        model_type="llama",
        model_fingerprint="f" * 64,
        before=None,
        after=None,
        parameters_before=counts,
        parameters_after=counts.model_copy(update={"all": 70}),
        sparsity=Sparsities(ffn=0.3, decoder=0.2, non_embedding=0.15, all=0.125),
        layers=[LayerReport(index=index, ffn_channels=7 + index, weights=100, zeros=25 * index, **layer) for index in range(2)],
        calibration=None,
        loads_with=[],
        seconds={"prune": 1.5},
        resumed_at_block=None,
        peak_memory_bytes=1,
        notes=[],
        versions={},
    ).model_dump(mode="json")


@dataclass
class Service:
    """A database and a store, and what tells a process of them."""

    database: Database
    settings: Settings
    environment: dict[str, str]
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = open_store(self.settings)

    def succeed(self, folder: Path, *sinks: dict[str, Any], files: dict[str, bytes] | None = None) -> str:
        """A job that has succeeded, with sinks that were submitted with it."""
        report = make_report()
        files = files or {"report.json": json.dumps(report).encode(), "checkpoint/config.json": b"{}", "checkpoint/model.safetensors": WEIGHTS}
        with self.database.writing() as session:
            job_id = insert_job(session, TENANT, Recipe.model_validate(RECIPE)).id
            insert_runs(session, TENANT, job_id, [SINK.validate_python(sink) for sink in sinks], Vault(self.settings), "pending")
        with self.database.writing() as session:
            lease = claim(session, job_id, "test", 45)
        assert lease is not None
        stored = []
        for name, content in files.items():
            (folder / "file").write_bytes(content)
            size, sha256 = self.store.put_file(f"{lease.artifact_prefix}{name}", folder / "file")
            stored.append(StoredFile(name, name.partition("/")[0].removesuffix(".json"), size, sha256))
        with self.database.writing() as session:
            finish(session, lease, "succeeded", report=report, files=stored)
        return job_id

    def add(self, job_id: str, sink: dict[str, Any]) -> None:
        with self.database.writing() as session:
            service.add(session, Caller(TENANT, "key_test", frozenset()), job_id, SINK.validate_python(sink), self.settings)

    def sink(self, job_id: str, number: int = 0) -> SinkRun:
        with self.database.reading() as session:
            return session.get_one(SinkRun, (job_id, number))

    def wait(self, job_id: str, state: str, number: int = 0) -> SinkRun:
        """The sink once it has ended, as it is to have."""
        wait_until(lambda: self.sink(job_id, number).state not in ("pending", "waiting"), 60, "the sink's end")
        run = self.sink(job_id, number)
        assert run.state == state, run.error
        return run


@contextmanager
def exporting(service: Service, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "app.exporter"]
    with (service.settings.home / "exporter.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=service.environment | changes,
            stderr=log,
            preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGKILL)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubUploads]:
    with running_hub_uploads() as hub:
        yield hub


@pytest.fixture(scope="module")
def service_(postgres_url: str, hub: HubUploads, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("exporter")
    with fresh_database(postgres_url) as url:
        given = {"HOME": str(home), "DATABASE_URL": url, "SINK_NETWORKS": '["127.0.0.0/8"]', "PUBLIC_URL": "https://espalier.example.org", **QUICK}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ESPALIER_", "HF_", "AWS_"))}
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_of_the_operator",
            "AWS_SESSION_TOKEN": "of the operator",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        environment = kept | own | {f"ESPALIER_{name}": value for name, value in given.items()}
        settings = Settings.model_validate({"home": home, "database_url": url, "sink_networks": ["127.0.0.0/8"]})
        database = open_database(url)
        yield Service(database, settings, environment)
        database.dispose()


@pytest.fixture
def exported(service_: Service) -> Iterator[Service]:
    """With an exporter that runs."""
    with exporting(service_):
        yield service_


def to_hub(repository: str = "owner/pruned", token: str = TOKEN) -> dict[str, Any]:
    return {"name": "hub", "repository": repository, "token": token}


def to_s3(s3: S3, prefix: str, **changes: str) -> dict[str, Any]:
    keys = {"access_key": s3.access_key, "secret_key": s3.secret_key}
    return {"name": "s3", "url": f"{s3.url}/{prefix}", "endpoint": s3.endpoint, **keys, **changes}


def bucket_of(s3: S3, prefix: str) -> S3Store:
    keys = {"access_key_id": s3.access_key, "secret_access_key": s3.secret_key}
    return S3Store(
        s3.bucket,
        prefix=prefix,
        endpoint=s3.endpoint,
        region=s3.region,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
        **keys,  # type: ignore[arg-type]
    )


def objects(bucket: S3Store) -> dict[str, bytes]:
    return {found["path"]: obstore.get(bucket, found["path"]).bytes().to_bytes() for page in obstore.list(bucket) for found in page}


def test_a_result_is_copied_to_the_caller_s_bucket(exported: Service, s3: S3, tmp_path: Path) -> None:
    job_id = exported.succeed(tmp_path, to_s3(s3, "one/copy"))
    run = exported.wait(job_id, "succeeded")
    assert run.result == {"url": f"{s3.url}/one/copy", "manifest": f"{s3.url}/one/copy/manifest.json"}
    assert (run.tries, run.secrets, run.error) == (1, None, None)
    found = objects(bucket_of(s3, "one/copy"))
    manifest = json.loads(found.pop("manifest.json"))
    assert found.keys() == {"report.json", "checkpoint/config.json", "checkpoint/model.safetensors"}
    assert found["checkpoint/model.safetensors"] == WEIGHTS
    assert {file["path"]: file["sha256"] for file in manifest["files"]} == {path: hashlib.sha256(content).hexdigest() for path, content in found.items()}
    assert events(exported.database, job_id)[-2:] == ["succeeded", "sink_succeeded"]
    assert get(exported.database, job_id).sinks[0].state == "succeeded"


def counts(service: Service) -> Counter[str]:
    """The tries at buckets, by what came of them, and how many were timed."""
    found: Counter[str] = Counter()
    with service.database.reading() as session:
        for name, labels, value in totals.read(session):
            if labels.get("sink") == "s3" and name in (totals.SINK_TRIES, f"{totals.SINK_SECONDS}_bucket"):
                found[labels.get("outcome", totals.SINK_SECONDS)] += int(value)
    return found


def test_a_wrong_key_is_told_at_once_and_a_server_that_is_away_is_tried_again(exported: Service, s3: S3, tmp_path: Path) -> None:
    wrong, away = to_s3(s3, "wrong", secret_key="wrong"), to_s3(s3, "away", endpoint=f"http://127.0.0.1:{free_port()}")
    before = counts(exported)
    job_id = exported.succeed(tmp_path, wrong, away, files={"report.json": b"{}"})
    denied, unreachable = exported.wait(job_id, "failed"), exported.wait(job_id, "failed", 1)
    assert (denied.error["code"], denied.tries, denied.secrets) == ("sink_denied", 1, None)  # type: ignore[index]
    assert (unreachable.error["code"], unreachable.tries) == ("sink_unreachable", 3)  # type: ignore[index]
    assert events(exported.database, job_id).count("sink_failed") == 2
    assert get(exported.database, job_id).state == "succeeded"
    assert counts(exported) - before == {"failed": 2, "retried": 2, totals.SINK_SECONDS: 4}


def test_what_is_damaged_or_deleted_in_our_store_is_not_brought_anywhere(exported: Service, s3: S3, tmp_path: Path) -> None:
    job_id = exported.succeed(tmp_path)
    prefix = get(exported.database, job_id).artifact_prefix
    (tmp_path / "damaged").write_bytes(WEIGHTS[:-1] + b"!")
    exported.store.put_file(f"{prefix}checkpoint/model.safetensors", tmp_path / "damaged")
    exported.add(job_id, to_s3(s3, "damaged"))
    assert exported.wait(job_id, "failed").error["code"] == "artifact_damaged"  # type: ignore[index]
    assert objects(bucket_of(s3, "damaged")).keys() == {"checkpoint/config.json"}
    exported.store.delete_prefix(str(prefix))
    exported.add(job_id, to_s3(s3, "deleted"))
    assert exported.wait(job_id, "failed", 1).error["code"] == "artifacts_expired"  # type: ignore[index]
    with exported.database.writing() as session:
        session.execute(update(SinkRun).where(SinkRun.job_id == job_id, SinkRun.number == 1).values(state="waiting", next_at=db_now(), tries=0))
        session.execute(update(Job).where(Job.id == job_id).values(artifact_prefix=None))
    assert exported.wait(job_id, "failed", 1).error["code"] == "artifacts_expired"  # type: ignore[index]


def test_a_private_address_is_not_called(service_: Service, s3: S3, tmp_path: Path) -> None:
    job_id = service_.succeed(tmp_path, to_s3(s3, "private"), {"name": "mlflow", "tracking_uri": s3.endpoint, "experiment": "e"}, files={"report.json": b"{}"})
    with exporting(service_, ESPALIER_SINK_NETWORKS="[]"):
        for number in (0, 1):
            run = service_.wait(job_id, "failed", number)
            assert (run.error["code"], run.tries) == ("address_not_public", 1)  # type: ignore[index]


def test_a_checkpoint_is_pushed_to_the_hub_and_no_commit_is_made_twice(exported: Service, hub: HubUploads, tmp_path: Path) -> None:
    job_id = exported.succeed(tmp_path, to_hub(), to_hub(token="hf_wrong"))
    run = exported.wait(job_id, "succeeded")
    repository = hub.repositories["owner/pruned"]
    assert run.result == {"url": f"{hub.url}/owner/pruned", "commit": f"{1:040x}"}
    assert repository.private
    assert repository.files.keys() == {"config.json", "model.safetensors", "report.json"}
    assert repository.files["model.safetensors"] == WEIGHTS
    assert repository.commits == [f"Pruned by Espalier, {job_id}"]
    denied = exported.wait(job_id, "failed", 1)
    assert (denied.error["code"], denied.tries) == ("sink_denied", 1)  # type: ignore[index]
    exported.add(job_id, to_hub())
    assert exported.wait(job_id, "succeeded", 2).result == run.result
    assert len(repository.commits) == 1
    assert not list((exported.settings.home / "exports").iterdir())


def test_an_exporter_that_is_killed_in_the_middle_of_an_upload_is_followed_by_another(service_: Service, hub: HubUploads, tmp_path: Path) -> None:
    hub.objects.clear()
    hub.receiving.clear()
    hub.pause = 0.05
    try:
        with exporting(service_) as process:
            job_id = service_.succeed(tmp_path, to_hub("owner/killed"))
            assert hub.receiving.wait(60)
            (child,) = psutil.Process(process.pid).children()
            process.kill()
            psutil.wait_procs([child], 60)
            assert not child.is_running()
    finally:
        hub.pause = 0
    assert service_.sink(job_id).state == "waiting"
    with service_.database.writing() as session:  # its lease runs out
        session.execute(update(SinkRun).where(SinkRun.job_id == job_id).values(next_at=db_now(-1)))
    with exporting(service_):
        assert service_.wait(job_id, "succeeded").tries == 2
    assert hub.repositories["owner/killed"].commits == [f"Pruned by Espalier, {job_id}"]
    assert events(service_.database, job_id).count("sink_succeeded") == 1


def test_sigterm_gives_the_sink_back_uncounted_and_a_deleted_job_ends_it(service_: Service, hub: HubUploads, tmp_path: Path) -> None:
    hub.objects.clear()
    hub.receiving.clear()
    hub.pause = 0.05
    try:
        with exporting(service_):
            job_id = service_.succeed(tmp_path, to_hub("owner/stopped"))
            assert hub.receiving.wait(60)
        run = service_.sink(job_id)
        assert (run.state, run.tries) == ("waiting", 0)
        hub.receiving.clear()
        with exporting(service_) as process:
            assert hub.receiving.wait(60)
            (child,) = psutil.Process(process.pid).children()
            with service_.database.writing() as session:
                session.delete(session.get_one(Job, job_id))
            psutil.wait_procs([child], 60)
            assert not child.is_running()
    finally:
        hub.pause = 0
    assert not hub.repositories["owner/stopped"].commits


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        yield client


def ask(mlflow: httpx.Client, path: str, **query: str) -> Any:
    return mlflow.get(f"/api/2.0/mlflow/{path}", params=query).raise_for_status().json()


def test_a_result_is_registered_in_mlflow_once(exported: Service, mlflow: httpx.Client, tmp_path: Path) -> None:
    sink = {"name": "mlflow", "tracking_uri": str(mlflow.base_url), "experiment": "pruning", "registered_model": "pruned", "username": "u", "password": "p"}
    job_id = exported.succeed(tmp_path, sink)
    told = exported.wait(job_id, "succeeded").result
    assert told is not None
    run = ask(mlflow, "runs/get", run_id=told["run_id"])["run"]
    assert run["info"]["status"] == "FINISHED"
    parameters = {entry["key"]: entry["value"] for entry in run["data"]["params"]}
    assert (parameters["method.name"], parameters["output.layout"]) == ("cfsp", "uniform")
    metrics = {entry["key"]: entry["value"] for entry in run["data"]["metrics"]}
    assert (metrics["sparsity.ffn"], metrics["parameters_after.all"], metrics["seconds.prune"]) == (0.3, 70, 1.5)
    history = ask(mlflow, "metrics/get-history", run_id=told["run_id"], metric_key="layers.sparsity")["metrics"]
    assert [(entry["step"], entry["value"]) for entry in history] == [(0, 0), (1, 0.25)]
    tags = {entry["key"]: entry["value"] for entry in run["data"]["tags"]}
    assert (tags["espalier.job_id"], tags["espalier.model"], tags["espalier.method"]) == (job_id, "owner/dense", "cfsp")
    report = mlflow.get(f"/api/2.0/mlflow-artifacts/artifacts/{run['info']['artifact_uri'].partition(':/')[2]}/report.json").raise_for_status()
    assert report.json() == make_report()
    version = ask(mlflow, "model-versions/get", name="pruned", version=told["version"])["model_version"]
    assert (version["run_id"], version["source"]) == (told["run_id"], run["info"]["artifact_uri"])
    assert {"key": "espalier.result", "value": f"https://espalier.example.org/v1/jobs/{job_id}/checkpoint"} in version["tags"]

    exported.add(job_id, sink)
    assert exported.wait(job_id, "succeeded", 1).result == told
    assert len(ask(mlflow, "model-versions/search", filter="name = 'pruned'")["model_versions"]) == 1
    again = ask(mlflow, "metrics/get-history", run_id=told["run_id"], metric_key="layers.sparsity")["metrics"]
    assert again == history


def test_a_version_of_a_model_names_the_bucket_in_which_the_result_lies(mlflow: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_SINK_NETWORKS", '["127.0.0.0/8"]')
    get_settings.cache_clear()
    stored, content = open_store(Settings.model_validate({"home": tmp_path})), json.dumps(make_report()).encode()
    (tmp_path / "file").write_bytes(content)
    stored.put_file("one/a1/report.json", tmp_path / "file")
    files = [ResultFile("report.json", "report", len(content), hashlib.sha256(content).hexdigest())]
    result = Result("job_1", "owner/dense", "cfsp", 1_000, "one/a1/", "s3://espalier/one/a1/checkpoint", files, RECIPE, make_report())
    sink = Mlflow.model_validate({"name": "mlflow", "tracking_uri": str(mlflow.base_url), "experiment": "buckets", "registered_model": "in-a-bucket"})
    told = register(sink, result, stored, tmp_path)
    get_settings.cache_clear()
    version = ask(mlflow, "model-versions/get", name="in-a-bucket", version=told["version"])["model_version"]
    assert version["source"] == "s3://espalier/one/a1/checkpoint"


def test_a_server_that_is_no_mlflow_is_told(exported: Service, hub: HubUploads, tmp_path: Path) -> None:
    job_id = exported.succeed(tmp_path, {"name": "mlflow", "tracking_uri": f"{hub.url}/nothing", "experiment": "e"})
    assert exported.wait(job_id, "failed").error["code"] == "sink_refused"  # type: ignore[index]
