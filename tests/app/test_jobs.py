"""The life of a job over HTTP, on SQLite and on Postgres."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from app.jobs import repository
from app.jobs.lease import LeaseLost, beat, finish
from app.models import Artifact, Job, JobEvent, OutboxMessage, Tenant
from app.recipe import Recipe
from app.report import Report
from tests import jobs
from tests.app.conftest import RECIPE, Api, insert_jobs


def test_three_fields_suffice(api: Api) -> None:
    answer = api.post("/v1/jobs", json=RECIPE)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert int(answer.headers["Retry-After"]) > 0
    assert (job["state"], job["attempt"], job["max_attempts"], job["error"]) == ("queued", 0, 3, None)
    assert (job["model"], job["method"]) == ("owner/model", "cfsp")
    assert Recipe.model_validate(job["recipe"]) == Recipe.model_validate(RECIPE)
    assert job["recipe"]["calibration"]["samples"] == 32
    assert job["progress"] == dict.fromkeys(job["progress"]) | {"fraction": 0}
    assert job["links"] == {
        "self": f"/v1/jobs/{job['id']}",
        "events": f"/v1/jobs/{job['id']}/events",
        "cancel": f"/v1/jobs/{job['id']}/cancel",
        "retry": None,
        "report": None,
        "artifacts": None,
        "checkpoint": None,
    }
    created = datetime.fromisoformat(job["created_at"])
    assert job["created_at"].endswith("Z")
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)
    assert api.get(answer.headers["Location"]).json() == job


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "magnitude", "sparsity": "2:4"},
        {"method": {"name": "wanda", "variant": True}, "sparsity": {"fraction": 0.5, "of": "all"}},
        {"method": {"name": "cfsp", "mode": "code", "multiple_of": 64}, "output": {"layout": "per_layer", "padded": True}},
        {"evaluation": None, "limits": {"max_attempts": 1}},
    ],
)
def test_a_recipe_comes_back_with_its_defaults(api: Api, changes: dict[str, Any]) -> None:
    job = api.get(f"/v1/jobs/{api.submit(**changes)}").json()
    assert Recipe.model_validate(job["recipe"]) == Recipe.model_validate(RECIPE | changes)
    assert job["max_attempts"] == job["recipe"]["limits"]["max_attempts"]


def test_etag_follows_every_change(api: Api) -> None:
    job_id = api.submit()
    first = api.get(f"/v1/jobs/{job_id}")
    etag = first.headers["ETag"]
    unchanged = api.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": f'"0", W/{etag}'})
    assert (unchanged.status_code, unchanged.content, unchanged.headers["ETag"]) == (304, b"", etag)
    assert int(unchanged.headers["Retry-After"]) > 0
    lease = api.start(job_id)
    started = api.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": etag})
    assert (started.status_code, started.json()["state"], started.json()["attempt"]) == (200, "running", 1)
    with api.database.writing() as session:
        beat(session, lease, 45, phase="prune", progress={"fraction": 0.5, "blocks_done": 15, "blocks_total": 30, "eta_seconds": 3.5})
    beaten = api.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": started.headers["ETag"]})
    assert (beaten.json()["phase"], beaten.json()["progress"]["blocks_done"]) == ("prune", 15)
    with api.database.writing() as session:
        finish(session, lease, "failed", error={"code": "disk_full", "message": "The disk is full.", "hint": "Free space."})
    ended = api.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": beaten.headers["ETag"]})
    assert ended.json()["error"] == {"code": "disk_full", "message": "The disk is full.", "hint": "Free space."}
    assert ended.json()["links"]["cancel"] is None
    assert "Retry-After" not in ended.headers


# ---------------------------------------------------------------------- list

BAD_TIMES = [f"created_after={value}" for value in ("1", "2026-11-22", "2026-11-22T00:00:00", "2026-13-01T00:00:00Z", "9999-12-31T23:59:59-01:00", "now")]
BAD_LABELS = ["metadata=42", "metadata[]=1", "metadata[a]b=1", "metadata[a b]=1", "metadata[a=1", "metadata[a]=1&metadata[a]=2", f"metadata[a]={'x' * 513}"]
BAD_LABELS.append("&".join(f"metadata[n{number}]=x" for number in range(17)))


def walk(api: Api, query: str, limit: int) -> list[str]:
    found: list[str] = []
    cursor = ""
    while True:
        page = api.get(f"/v1/jobs?limit={limit}{query}{cursor}").json()
        assert len(page["items"]) <= limit
        found += [job["id"] for job in page["items"]]
        if page["next"] is None:
            return found
        cursor = f"&cursor={page['next']}"


def test_pages_hold_every_job_once_newest_first(api: Api) -> None:
    ids = insert_jobs(api.database, api.tenant, 7)
    newest = api.submit()
    for limit in (1, 3, 4, 8, 100):
        assert walk(api, "", limit) == [newest, *ids]


def test_what_is_submitted_meanwhile_changes_no_later_page(api: Api) -> None:
    ids = insert_jobs(api.database, api.tenant, 6)
    first = api.get("/v1/jobs?limit=2").json()
    for _ in range(3):
        api.submit()
    assert [job["id"] for job in first["items"]] == ids[:2]
    second = api.get(f"/v1/jobs?limit=2&cursor={first['next']}").json()
    assert [job["id"] for job in second["items"]] == ids[2:4]
    third = api.get(f"/v1/jobs?limit=2&cursor={second['next']}").json()
    assert [job["id"] for job in third["items"]] == ids[4:]
    assert third["next"] is None


def test_filters(api: Api) -> None:
    wanda, other, plain = api.submit(method="wanda"), api.submit(model="other/model"), api.submit()
    running = api.submit()
    api.start(running)
    assert walk(api, "&method=wanda", 10) == [wanda]
    assert walk(api, "&model=other/model", 10) == [other]
    assert walk(api, "&state=running", 10) == [running]
    assert walk(api, "&state=running&state=queued", 2) == [running, plain, other, wanda]
    assert walk(api, "&state=queued&method=cfsp&model=owner/model", 10) == [plain]
    assert walk(api, "&state=failed", 10) == []


def test_jobs_are_found_by_their_metadata(api: Api) -> None:
    nightly = api.submit(metadata={"run": "42", "team.name": "a b&c=d%"})
    other = api.submit(metadata={"run": "43"})
    assert api.get(f"/v1/jobs/{nightly}").json()["metadata"] == {"run": "42", "team.name": "a b&c=d%"}
    assert api.get(f"/v1/jobs/{api.submit()}").json()["metadata"] == {}
    assert walk(api, "&metadata[run]=42", 10) == [nightly]
    assert walk(api, "&metadata%5Brun%5D=43", 10) == [other]
    assert walk(api, "&metadata[run]=42&metadata[team.name]=a%20b%26c%3Dd%25", 10) == [nightly]
    assert walk(api, "&metadata[run]=42&metadata[team.name]=x", 10) == []
    assert walk(api, "&metadata[team]=42", 10) == []
    assert walk(api.other_tenant(), "&metadata[run]=42", 10) == []


def test_jobs_are_found_by_queue_and_time(api: Api) -> None:
    old, older = insert_jobs(api.database, api.tenant, 2, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    new = api.submit(queue="large")
    assert walk(api, "&queue=large", 10) == [new]
    assert walk(api, "&created_after=2026-01-01T00:00:00Z", 10) == [new]
    assert walk(api, "&created_after=2025-12-31T23:59:59.999Z", 10) == [new, old, older]
    assert walk(api, "&created_before=2026-01-01T02:00:00%2B02:00", 10) == []
    assert walk(api, "&created_before=2026-01-01T02:00:01%2B02:00", 1) == [old, older]
    assert walk(api, "&created_after=2025-01-01T00:00:00Z&created_before=2026-06-01T00:00:00Z&queue=large", 10) == []


@pytest.mark.parametrize(
    "metadata",
    [
        {"": "x"},
        {"a b": "x"},
        {"a" * 65: "x"},
        {"a": "x" * 513},
        {"a": 1},
        {"a": None},
        {"a": "\0"},
        {"ä": "x"},
        ["a"],
        {f"n{number}": "" for number in range(17)},
    ],
)
def test_metadata_have_bounds(api: Api, metadata: Any) -> None:
    refused = api.post("/v1/jobs", json=RECIPE | {"metadata": metadata})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"].startswith("/metadata")


def test_a_cursor_with_other_filters_is_refused(api: Api) -> None:
    insert_jobs(api.database, api.tenant, 3)
    for query in ("&queue=default", "&created_after=2026-01-01T00:00:00Z", "&metadata[run]=42"):
        cursor = api.get("/v1/jobs?limit=1").json()["next"]
        assert api.get(f"/v1/jobs?limit=1{query}&cursor={cursor}").json()["code"] == "cursor_of_other_filters"
    cursor = api.get("/v1/jobs?limit=1&state=queued&state=running").json()["next"]
    assert api.get(f"/v1/jobs?limit=2&state=running&state=queued&cursor={cursor}").status_code == 200
    refused = api.get(f"/v1/jobs?limit=1&state=queued&cursor={cursor}")
    assert (refused.status_code, refused.json()["code"]) == (400, "cursor_of_other_filters")


@pytest.mark.parametrize(
    "cursor", ["x", "%00", "AAAA", "bnVsbA", "W10", "WzEsMiwzXQ", "WyJhIiwgIjIwMjYtMDEtMDEiLCAiYiJd", "%F0%9F%8C%B3", "=" * 10, "A" * 1000]
)
def test_a_cursor_that_was_never_given_is_refused(api: Api, cursor: str) -> None:
    refused = api.get(f"/v1/jobs?cursor={cursor}")
    assert (refused.status_code, refused.json()["code"]) == (400, "cursor_invalid")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "limit=" + "9" * 400,
        "state=done",
        "method=x",
        "model=%00",
        f"cursor={'A' * 1025}",
        "queue=A%20B",
        *BAD_TIMES,
        *BAD_LABELS,
    ],
)
def test_a_bad_query_names_its_parameter(api: Api, query: str) -> None:
    refused = api.get(f"/v1/jobs?{query}")
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["parameter"].partition(".")[0].partition("[")[0] == query.partition("=")[0].partition("[")[0]


def test_a_list_reads_no_reports(api: Api) -> None:
    insert_jobs(api.database, api.tenant, 1)
    with api.database.reading() as session:
        tenant_id = session.scalar(select(Tenant.id).where(Tenant.name == api.tenant))
        assert tenant_id is not None
        assert "report" not in repository.list_jobs(session, tenant_id, repository.JobFilter(), None, 1)[0].__dict__


# -------------------------------------------------------------------- events


def test_events_come_in_order_and_page_by_page(api: Api) -> None:
    job_id = api.submit()
    lease = api.start(job_id)
    with api.database.writing() as session:
        for number in range(5):
            repository.add_event(session, job_id, lease.tenant_id, "log", f"line {number}\0", {"number": number})
    events, after = [], 0
    while True:
        page = api.get(f"/v1/jobs/{job_id}/events?limit=3&after={after}").json()
        if not page["items"]:
            break
        events += page["items"]
        after = page["next"]
        assert page["finished"] is False
    assert [event["sequence"] for event in events] == list(range(1, 8))
    assert [event["kind"] for event in events] == ["queued", "claimed", *["log"] * 5]
    assert events[-1]["message"] == "line 4"
    assert events[-1]["data"] == {"number": 4}
    assert page["next"] == 7
    with api.database.writing() as session:
        finish(session, lease, "failed", error={"code": "disk_full", "message": "The disk is full.", "hint": ""})
    assert api.get(f"/v1/jobs/{job_id}/events?limit=7").json()["finished"] is False
    assert api.get(f"/v1/jobs/{job_id}/events?after=7").json()["finished"] is True
    assert api.get(f"/v1/jobs/{job_id}/events?after={2**31 - 1}").json()["items"] == []
    assert api.get(f"/v1/jobs/{job_id}/events?after={2**31}").status_code == 422


# -------------------------------------------------------------------- cancel


def test_a_queued_job_is_cancelled_at_once(api: Api) -> None:
    job_id = api.submit()
    answer = api.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    assert answer.json()["finished_at"] is not None
    assert [event["kind"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["items"]] == ["queued", "cancelled"]
    again = api.post(f"/v1/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "job_finished")


def test_a_running_job_is_asked_to_end(api: Api) -> None:
    job_id = api.submit()
    lease = api.start(job_id)
    first, second = api.post(f"/v1/jobs/{job_id}/cancel"), api.post(f"/v1/jobs/{job_id}/cancel")
    assert first.status_code == second.status_code == 202
    assert first.json() == second.json()
    assert first.json()["state"] == "cancelling"
    assert first.json()["finished_at"] is None
    with api.database.writing() as session:
        assert beat(session, lease, 45) is True
    with pytest.raises(LeaseLost), api.database.writing() as session:
        finish(session, lease, "succeeded", report={})
    with api.database.writing() as session:
        finish(session, lease, "cancelled")
    assert api.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"
    kinds = [event["kind"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["items"]]
    assert kinds == ["queued", "claimed", "cancel_requested", "cancelled"]


def test_a_finished_job_cannot_be_cancelled(api: Api) -> None:
    job_id = api.submit()
    api.fail(job_id)
    answer = api.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_finished")
    assert api.get(f"/v1/jobs/{job_id}").json()["state"] == "failed"


def test_many_cancels_at_once_cancel_once(api: Api) -> None:
    job_id = api.submit()
    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(lambda _: api.post(f"/v1/jobs/{job_id}/cancel").status_code, range(8)))
    assert statuses == [202, *[409] * 7]
    assert [event["kind"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["items"]] == ["queued", "cancelled"]


# --------------------------------------------------------------------- retry


def test_a_failed_job_is_tried_again(api: Api) -> None:
    job_id = api.submit(limits={"max_attempts": 2, "max_pending": 600})
    api.fail(job_id)
    failed = api.get(f"/v1/jobs/{job_id}").json()
    assert failed["links"]["retry"] == f"/v1/jobs/{job_id}/retry"
    answer = api.post(f"/v1/jobs/{job_id}/retry")
    job = answer.json()
    assert (answer.status_code, answer.headers["Location"]) == (202, f"/v1/jobs/{job_id}")
    assert (job["state"], job["attempt"], job["max_attempts"], job["error"]) == ("queued", 1, 3, None)
    assert (job["started_at"], job["finished_at"]) == (None, None)
    assert job == api.get(f"/v1/jobs/{job_id}").json()
    with api.database.reading() as session:
        row = session.get_one(Job, job_id)
        assert (row.ran_seconds, row.claimed_at, row.cancel_requested_at) == (0, None, None)
        assert row.start_by is not None
        assert row.start_by > datetime.now(UTC) + timedelta(minutes=9)
    jobs.wait_until(lambda: not jobs.outbox(api.database), what="its message")
    refused = api.post(f"/v1/jobs/{job_id}/retry")
    assert (refused.status_code, refused.json()["code"]) == (409, "job_not_retryable")
    lease = api.start(job_id)
    assert (lease.attempt, lease.max_attempts, lease.token) == (2, 3, 2)
    kinds = [event["kind"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["items"]]
    assert kinds == ["queued", "claimed", "failed", "retried", "claimed"]


def test_a_cancelled_job_is_tried_again_once(api: Api) -> None:
    job_id = api.submit()
    api.post(f"/v1/jobs/{job_id}/cancel")
    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(lambda _: api.post(f"/v1/jobs/{job_id}/retry").status_code, range(8)))
    assert statuses == [202, *[409] * 7]
    assert [event["kind"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["items"]] == ["queued", "cancelled", "retried"]
    lease = api.start(job_id)
    with api.database.writing() as session:
        assert beat(session, lease, 45) is False, "the cancel of before is over"


def test_a_retry_counts_as_a_submission(api: Api) -> None:
    job_id, _ = api.submit(), api.submit()
    api.fail(job_id)
    with api.database.writing() as session:
        session.execute(update(Tenant).where(Tenant.name == api.tenant).values(max_queued=1))
    refused = api.post(f"/v1/jobs/{job_id}/retry")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_queued")
    assert int(refused.headers["Retry-After"]) > 0
    assert api.get(f"/v1/jobs/{job_id}").json()["state"] == "failed"


def test_a_job_that_succeeded_is_not_tried_again(api: Api, tmp_path: Path) -> None:
    job_id = api.succeed(tmp_path, {})
    assert api.post(f"/v1/jobs/{job_id}/retry").json()["code"] == "job_not_retryable"
    assert api.post(f"/v1/jobs/{api.submit()}/retry").json()["code"] == "job_not_retryable"
    assert api.other_tenant().post(f"/v1/jobs/{job_id}/retry").json()["code"] == "job_not_found"


# -------------------------------------------------------------------- delete


def test_a_finished_job_is_deleted_with_all_that_came_of_it(api: Api, tmp_path: Path) -> None:
    job_id, kept = (api.succeed(tmp_path, {"report.json": b"{}", "checkpoint/model.safetensors": b"weights"}) for _ in range(2))
    with api.database.reading() as session:
        prefix = session.get_one(Job, job_id).artifact_prefix
    assert prefix is not None
    assert len(api.store.entries(prefix)) == 2
    assert api.other_tenant().request("DELETE", f"/v1/jobs/{job_id}").status_code == 404
    answer = api.request("DELETE", f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    for path in ("", "/events", "/report", "/artifacts", "/checkpoint"):
        assert api.get(f"/v1/jobs/{job_id}{path}").json()["code"] == "job_not_found"
    assert api.request("DELETE", f"/v1/jobs/{job_id}").json()["code"] == "job_not_found"
    with api.database.reading() as session:
        for table in (JobEvent, OutboxMessage, Artifact):
            assert session.scalar(select(func.count()).where(table.job_id == job_id)) == 0
    assert api.store.entries(prefix) == []
    assert api.get(f"/v1/jobs/{kept}/artifacts/checkpoint/model.safetensors").content == b"weights"


def test_a_job_that_goes_on_is_not_deleted(api: Api) -> None:
    job_id = api.submit()
    for _ in range(2):
        refused = api.request("DELETE", f"/v1/jobs/{job_id}")
        assert (refused.status_code, refused.json()["code"]) == (409, "job_not_finished")
        assert f"/v1/jobs/{job_id}/cancel" in refused.json()["hint"]
        api.start(job_id) if api.get(f"/v1/jobs/{job_id}").json()["state"] == "queued" else None
    api.post(f"/v1/jobs/{job_id}/cancel")
    assert api.request("DELETE", f"/v1/jobs/{job_id}").status_code == 409


# -------------------------------------------------------------------- result


@pytest.mark.parametrize("part", ["report", "artifacts", "artifacts/report.json", "checkpoint"])
def test_there_is_no_result_before_success(api: Api, part: str) -> None:
    job_id = api.submit()
    waiting = api.get(f"/v1/jobs/{job_id}/{part}")
    assert (waiting.status_code, waiting.json()["code"]) == (409, "job_not_finished")
    api.fail(job_id)
    failed = api.get(f"/v1/jobs/{job_id}/{part}")
    assert (failed.status_code, failed.json()["code"]) == (409, "job_without_result")


def test_the_report_is_what_the_worker_measured(api: Api, tmp_path: Path) -> None:
    report = example(Report.model_json_schema(mode="serialization")) | {"recipe": Recipe.model_validate(RECIPE).model_dump(mode="json")}
    job_id = api.succeed(tmp_path, {}, report)
    answer = api.get(f"/v1/jobs/{job_id}/report")
    assert (answer.status_code, answer.json()) == (200, report)
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert job["links"]["report"] == f"/v1/jobs/{job_id}/report"
    assert "report" not in job


def example(schema: dict[str, Any], definitions: dict[str, Any] | None = None) -> Any:
    """The simplest value of a JSON schema that has every field."""
    definitions = definitions or schema.get("$defs", {})
    if "$ref" in schema:
        return example(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return example(schema["anyOf"][0], definitions)
    match schema:
        case {"properties": properties}:
            return {name: example(value, definitions) for name, value in properties.items()}
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"type": "array", "items": items}:
            return [example(items, definitions)]
        case {"type": kind}:
            return {"string": "text", "integer": 3, "number": 0.5, "boolean": True, "object": {}}[kind]
        case _:
            return None


def test_methods(api: Api) -> None:
    methods = {method["name"]: method for method in api.get("/v1/methods").json()["items"]}
    assert set(methods) == {"magnitude", "wanda", "sparsegpt", "cfsp", "flap", "bonsai", "depth", "experts"}
    assert methods["cfsp"]["denominator"] == "ffn"
    assert methods["cfsp"]["parameters"]["properties"]["mode"]["enum"] == ["combined", "paper", "code"]
    assert methods["wanda"]["patterns"] is True
    assert "llama" in methods["magnitude"]["model_types"]
    assert all(method["summary"].endswith(".") or method["summary"].endswith(").") for method in methods.values())


def test_recoveries(api: Api) -> None:
    recoveries = {recovery["name"]: recovery for recovery in api.get("/v1/recoveries").json()["items"]}
    assert {"full", "lora"} <= set(recoveries)
    assert recoveries["lora"]["presets"]["bonsai"]["rank"] == 128
    assert all(recovery["summary"].endswith(".") for recovery in recoveries.values())
    for recovery in recoveries.values():
        for preset in recovery["presets"]:
            named = api.post("/v1/jobs", json=RECIPE | {"recovery": preset})
            assert (named.status_code, named.json()["recipe"]["recovery"]["name"]) == (202, recovery["name"])
