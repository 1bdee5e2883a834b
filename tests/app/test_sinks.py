"""Sinks in the API: what is taken, what is told of them, and that their secrets are told to nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update

from app.database import db_now
from app.jobs.lease import LeaseLost, finish
from app.models import AuditEntry, SinkRun
from app.sinks import lease
from app.vault import Vault
from tests.app.conftest import RECIPE, Api
from tests.jobs import events

SECRET = "hf_a_secret_that_nobody_may_see"
HUB = {"name": "hub", "repository": "owner/pruned", "token": SECRET}
S3 = {"name": "s3", "url": "s3://bucket/prefix", "access_key": SECRET + "1", "secret_key": SECRET + "2"}
MLFLOW = {"name": "mlflow", "tracking_uri": "https://1.1.1.1/mlflow", "experiment": "pruning", "token": SECRET}
SINKS = [HUB, MLFLOW, S3]


def runs(api: Api, job_id: str) -> list[SinkRun]:
    with api.database.reading() as session:
        return list(session.scalars(select(SinkRun).where(SinkRun.job_id == job_id).order_by(SinkRun.number)))


def states(api: Api, job_id: str) -> list[str]:
    return [sink["state"] for sink in api.get(f"/v1/jobs/{job_id}").json()["sinks"]]


def everything(api: Api) -> str:
    """All that the database holds, but for what is sealed."""
    with api.database.reading() as session:
        rows = [session.execute(text(f"SELECT * FROM {table}")).all() for table in ("jobs", "job_events", "sink_runs", "audit_log", "idempotency_keys")]
    return repr(rows)


def end(api: Api, job_id: str, number: int, state: Any = "failed") -> None:
    """The sink ends, as an exporter would have it end."""
    error = {"code": "sink_denied", "message": "The hub refused the token (401).", "hint": ""}
    with api.database.writing() as session:
        session.execute(update(SinkRun).where(SinkRun.state == "waiting").values(next_at=db_now(3600)))
        session.execute(update(SinkRun).where(SinkRun.job_id == job_id, SinkRun.number == number).values(next_at=db_now(-1)))
    with api.database.writing() as session:
        turn = lease.claim(session, 45, 5)
        assert turn is not None
        assert (turn.job_id, turn.number) == (job_id, number)
        lease.finish(session, turn, state, error=error if state == "failed" else None, result={"url": "x"} if state == "succeeded" else None)


def test_secrets_of_sinks_are_sealed_and_never_shown(api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    answer = api.post("/v1/jobs", json=RECIPE | {"sinks": SINKS})
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    checked = api.post("/v1/jobs?validate_only=true", json=RECIPE | {"sinks": SINKS})
    assert checked.status_code == 200
    said = [
        answer.text,
        checked.text,
        *(api.get(f"/v1/jobs{path}").text for path in ("", f"/{job_id}", f"/{job_id}/events")),
        everything(api),
        *capfd.readouterr(),
    ]
    assert not any(SECRET in part for part in said)
    sinks = answer.json()["sinks"]
    assert [(sink["number"], sink["name"], sink["state"], sink["tries"]) for sink in sinks] == [
        (0, "hub", "pending", 0),
        (1, "mlflow", "pending", 0),
        (2, "s3", "pending", 0),
    ]
    assert sinks[0]["target"] == {"name": "hub", "repository": "owner/pruned", "private": True}
    opened = [Vault(api.settings).open(run.secrets or "") for run in runs(api, job_id)]
    assert opened == [{"token": SECRET}, {"token": SECRET}, {"access_key": SECRET + "1", "secret_key": SECRET + "2"}]


@pytest.mark.parametrize(
    ("sink", "pointer"),
    [
        (HUB | {"repository": "../../etc"}, "/sinks/0/repository"),
        ({"name": "hub", "repository": "owner/pruned"}, "/sinks/0/token"),
        (HUB | {"token": "two words"}, "/sinks/0/token"),
        (HUB | {"token": "a\nX-Header: b"}, "/sinks/0/token"),
        ({"name": "ftp"}, "/sinks/0"),
        (MLFLOW | {"tracking_uri": "https://user:password@1.1.1.1"}, "/sinks/0/tracking_uri"),
        (MLFLOW | {"username": "u"}, "/sinks/0"),
        (MLFLOW | {"tracking_uri": "http://127.0.0.1:5000"}, "/sinks/0/tracking_uri"),
        (MLFLOW | {"tracking_uri": "http://169.254.169.254/latest"}, "/sinks/0/tracking_uri"),
        (S3 | {"endpoint": "http://[::ffff:10.0.0.1]:9000"}, "/sinks/0/endpoint"),
        (S3 | {"url": "s3://bucket/../other"}, "/sinks/0/url"),
        (S3 | {"unknown": 1}, "/sinks/0/unknown"),
    ],
)
def test_what_a_sink_may_not_be(api: Api, sink: dict[str, Any], pointer: str) -> None:
    answer = api.post("/v1/jobs", json=RECIPE | {"sinks": [sink]})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert SECRET not in answer.text


def test_too_many_sinks_are_refused(api: Api) -> None:
    assert api.post("/v1/jobs", json=RECIPE | {"sinks": 5 * [HUB]}).status_code == 422


def test_sinks_follow_their_job(api: Api) -> None:
    job_id = api.submit(sinks=[HUB])
    api.fail(job_id)
    assert states(api, job_id) == ["skipped"]
    assert api.post(f"/v1/jobs/{job_id}/retry").status_code == 202
    assert states(api, job_id) == ["pending"]
    with api.database.writing() as session:
        assert lease.claim(session, 45, 5) is None or runs(api, job_id)[0].tries == 0
    held = api.start(job_id)
    with api.database.writing() as session:
        finish(session, held, "succeeded", report={})
    assert states(api, job_id) == ["waiting"]
    before = api.get(f"/v1/jobs/{job_id}").headers["etag"]
    end(api, job_id, 0, "succeeded")
    job = api.get(f"/v1/jobs/{job_id}")
    assert job.headers["etag"] != before
    assert (job.json()["sinks"][0]["state"], job.json()["sinks"][0]["result"]) == ("succeeded", {"url": "x"})
    assert runs(api, job_id)[0].secrets is None
    assert events(api.database, job_id)[-1] == "sink_succeeded"
    cancelled = api.submit(sinks=[HUB])
    api.post(f"/v1/jobs/{cancelled}/cancel")
    assert states(api, cancelled) == ["skipped"]


def test_a_sink_is_added_to_a_job_that_has_succeeded_and_tried_again_when_it_failed(api: Api, tmp_path: Path) -> None:
    waiting = api.submit()
    refused = api.post(f"/v1/jobs/{waiting}/sinks", json=HUB)
    assert (refused.status_code, refused.json()["code"]) == (409, "job_not_finished")
    job_id = api.succeed(tmp_path, {"checkpoint/config.json": b"{}"})
    added = api.post(f"/v1/jobs/{job_id}/sinks", json=HUB)
    assert (added.status_code, added.json()["sinks"][0]["state"]) == (202, "waiting")
    early = api.post(f"/v1/jobs/{job_id}/sinks/0/retry", json={"token": SECRET})
    assert (early.status_code, early.json()["code"]) == (409, "sink_not_failed")
    end(api, job_id, 0)
    assert api.get(f"/v1/jobs/{job_id}").json()["sinks"][0]["error"]["code"] == "sink_denied"
    assert runs(api, job_id)[0].secrets is None
    for given, pointer in (({}, "/token"), ({"token": SECRET, "access_key": "x"}, "/access_key")):
        wrong = api.post(f"/v1/jobs/{job_id}/sinks/0/retry", json=given)
        assert (wrong.status_code, wrong.json()["code"], wrong.json()["errors"][0]["pointer"]) == (422, "sink_secrets_invalid", pointer)
    again = api.post(f"/v1/jobs/{job_id}/sinks/0/retry", json={"token": SECRET + "new"})
    assert (again.status_code, again.json()["sinks"][0]["state"], again.json()["sinks"][0]["tries"]) == (202, "waiting", 0)
    assert Vault(api.settings).open(runs(api, job_id)[0].secrets or "") == {"token": SECRET + "new"}
    assert api.post(f"/v1/jobs/{job_id}/sinks/1/retry").json()["code"] == "sink_not_found"
    assert events(api.database, job_id)[-3:] == ["sink_added", "sink_failed", "sink_retried"]
    with api.database.reading() as session:
        audited = session.scalars(select(AuditEntry.action).where(AuditEntry.target == job_id).order_by(AuditEntry.id)).all()
    assert audited[-2:] == ["sink.add", "sink.retry"]
    assert SECRET not in everything(api)

    other = api.other_tenant()
    assert other.post(f"/v1/jobs/{job_id}/sinks", json=HUB).status_code == 404
    assert other.post(f"/v1/jobs/{job_id}/sinks/0/retry", json={"token": SECRET}).status_code == 404
    assert api.post(f"/v1/jobs/{job_id}/sinks", json=HUB, key=api.new_key(["jobs:read"])).status_code == 403


def test_a_try_that_lost_its_lease_writes_nothing_and_a_sink_that_is_always_lost_ends(api: Api, tmp_path: Path) -> None:
    job_id = api.succeed(tmp_path, {"checkpoint/config.json": b"{}"})
    api.post(f"/v1/jobs/{job_id}/sinks", json=HUB)
    with api.database.writing() as session:
        session.execute(update(SinkRun).where(SinkRun.job_id != job_id).values(next_at=db_now(3600)))
    turns = []
    for _ in range(2):
        with api.database.writing() as session:
            turns.append(lease.claim(session, -1, 2))
    first, second = turns
    assert first is not None
    assert second is not None
    assert (second.tries, second.token) == (first.tries + 1, first.token + 1)
    with pytest.raises(LeaseLost), api.database.writing() as session:
        lease.beat(session, first, 45)
    with pytest.raises(LeaseLost), api.database.writing() as session:
        lease.finish(session, first, "succeeded")
    with pytest.raises(LeaseLost), api.database.writing() as session:
        lease.retry(session, first, 0, None)
    version = api.get(f"/v1/jobs/{job_id}").headers["etag"]
    with api.database.writing() as session:
        assert lease.claim(session, 45, 2) is None
    assert runs(api, job_id)[0].error == lease.LOST
    assert api.get(f"/v1/jobs/{job_id}").headers["etag"] != version
    with pytest.raises(LeaseLost), api.database.writing() as session:
        lease.beat(session, second, 45)


def test_secrets_of_a_job_that_did_not_succeed_are_dropped_after_a_week(api: Api) -> None:
    old, young = api.submit(sinks=[HUB]), api.submit(sinks=[HUB])
    for job_id in (old, young):
        api.fail(job_id)
    with api.database.writing() as session:
        session.execute(update(SinkRun).where(SinkRun.job_id == old).values(updated_at=db_now(-8 * 24 * 3600)))
    with api.database.writing() as session:
        lease.forget_skipped(session)
    assert (runs(api, old)[0].secrets, runs(api, young)[0].secrets is None) == (None, False)
