"""News of jobs reaches who asked for it: signed, at least once, under one id, to an address that was checked; what a receiver does holds up no other."""

from __future__ import annotations

import datetime
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update
from standardwebhooks.webhooks import WebhookVerificationError

from app import totals
from app.addresses import Resolver
from app.database import Database, db_now
from app.jobs.lease import claim, finish, give_up, reap, release
from app.main import create_app
from app.models import AuditEntry, Delivery, Job, Webhook
from app.retention import DAY, tidy
from app.settings import Settings
from app.storage import open_store
from app.vault import Vault
from app.webhooks import deliveries, service
from app.webhooks.deliveries import Answer, Try
from app.webhooks.schemas import NewWebhook
from app.webhooks.sending import keep_sending
from tests import jobs
from tests.app.conftest import RECIPE, Api, make_settings
from tests.receiver import NETWORKS, Receiver, receiving, wait_for_messages
from tests.servers import free_port

FAST = {"sweep_seconds": 0.1, "webhook_networks": NETWORKS, "webhook_timeout_seconds": 60, "webhook_retry_seconds": [0.2, 0.2]}


@pytest.fixture(scope="module")
def sending_api(migrated_url: str, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service that sends at once."""
    settings = make_settings(tmp_path_factory.mktemp("home"), migrated_url, roots, **FAST)
    database = Database(migrated_url)
    with TestClient(create_app(settings)) as client:
        yield Api(client, database, open_store(settings), settings)
    database.dispose()


@pytest.fixture
def api(sending_api: Api) -> Api:
    return sending_api.other_tenant()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as there:
        yield there


def make(api: Api, receiver: Receiver, **values: Any) -> dict[str, Any]:
    answer = api.post("/v1/webhooks", json={"url": receiver.url} | values)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def log(api: Api, webhook: dict[str, Any]) -> list[dict[str, Any]]:
    """Its deliveries, oldest first."""
    items: list[dict[str, Any]] = api.get(f"/v1/webhooks/{webhook['id']}/deliveries", params={"limit": 100}).json()["items"]
    return items[::-1]


def wait_for_log(api: Api, webhook: dict[str, Any], *states: str) -> list[dict[str, Any]]:
    jobs.wait_until(lambda: [item["state"] for item in log(api, webhook)] == list(states), 60, f"{states}")
    return log(api, webhook)


def rows(api: Api, job_id: str) -> list[Delivery]:
    with api.database.reading() as session:
        return list(session.scalars(select(Delivery).where(Delivery.job_id == job_id).order_by(Delivery.id)))


# ------------------------------------------------------------------ webhooks


def test_a_secret_is_shown_once(api: Api, receiver: Receiver) -> None:
    answer = api.post("/v1/webhooks", json={"url": receiver.url, "description": "CI"})
    made = answer.json()
    assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")
    assert answer.headers["Location"] == f"/v1/webhooks/{made['id']}"
    assert made["secret"].startswith("whsec_")
    assert made["kinds"] == ["job.started", "job.succeeded", "job.failed", "job.cancelled", "job.requeued", "artifacts.deleted"]
    without = {name: value for name, value in made.items() if name != "secret"}
    assert api.get(answer.headers["Location"]).json() == without
    assert api.get("/v1/webhooks").json() == {"items": [without]}
    with api.database.reading() as session:
        assert made["secret"] not in session.get_one(Webhook, made["id"]).secrets


def test_only_an_administrator_of_the_tenant_has_them(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    ping = api.post(f"/v1/webhooks/{webhook['id']}/test").json()["id"]
    wait_for_log(api, webhook, "delivered")
    calls = [("GET", ""), ("DELETE", ""), ("POST", "/enable"), ("POST", "/rotate"), ("POST", "/test"), ("GET", "/deliveries")]
    for method, action in [*calls, ("POST", f"/deliveries/{ping}/replay")]:
        path = f"/v1/webhooks/{webhook['id']}{action}"
        assert api.request(method, path, key=api.new_key(["jobs:write"])).status_code == 403
        assert api.other_tenant().request(method, path).json()["code"] == "webhook_not_found"
    assert api.other_tenant().get("/v1/webhooks").json() == {"items": []}
    assert len(log(api, webhook)) == 1
    for path in ("wh_1", "wh_" + "0" * 32, "%00"):
        assert api.get(f"/v1/webhooks/{path}").status_code == 404
    for path in ("dlv_1", "dlv_" + "0" * 32):
        assert api.post(f"/v1/webhooks/{webhook['id']}/deliveries/{path}/replay").json()["code"] == "delivery_not_found"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://user:password@example.com/", "address_invalid"),
        ("https://2130706433/", "address_invalid"),
        ("https://example.com:22/", "address_port_refused"),
        ("http://169.254.169.254/latest/meta-data/", "address_not_public"),
        ("https://[::ffff:10.0.0.1]/", "address_not_public"),
        ("https://nothing.invalid/", "address_unknown"),
    ],
)
def test_an_address_that_may_not_be_called_is_refused(api: Api, url: str, code: str) -> None:
    refused = api.post("/v1/webhooks", json={"url": url})
    assert (refused.status_code, refused.json()["code"]) == (422, code)
    assert refused.json()["errors"][0]["pointer"] == "/url"
    assert refused.json()["hint"]
    assert api.get("/v1/webhooks").json() == {"items": []}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"kinds": []}, "/kinds"),
        ({"kinds": ["job.eaten"]}, "/kinds/0"),
        ({"description": "\0"}, "/description"),
        ({"url": "ftp://x"}, "/url"),
        ({"secret": "x"}, "/secret"),
    ],
)
def test_a_bad_wish_is_refused(api: Api, receiver: Receiver, changes: dict[str, Any], pointer: str) -> None:
    refused = api.post("/v1/webhooks", json={"url": receiver.url} | changes)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, pointer)


def test_a_tenant_has_only_so_many(api: Api, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_WEBHOOKS", 2)
    first = make(api, receiver)
    make(api, receiver)
    assert api.post("/v1/webhooks", json={"url": receiver.url}).json()["code"] == "too_many_webhooks"
    assert api.request("DELETE", f"/v1/webhooks/{first['id']}").status_code == 204
    make(api, receiver)


def test_changes_are_in_the_audit_log(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    for action in ("enable", "rotate", "test"):
        assert api.post(f"/v1/webhooks/{webhook['id']}/{action}").is_success
    api.request("DELETE", f"/v1/webhooks/{webhook['id']}")
    with api.database.reading() as session:
        actions = session.scalars(select(AuditEntry.action).where(AuditEntry.target == webhook["id"]).order_by(AuditEntry.id)).all()
    assert actions == ["webhook.create", "webhook.enable", "webhook.rotate", "webhook.test", "webhook.delete"]


# ---------------------------------------------------------------------- news


def test_what_happens_to_a_job_is_told_and_signed(api: Api, receiver: Receiver, tmp_path: Path) -> None:
    webhook = make(api, receiver)
    job_id = api.succeed(tmp_path, {"report.json": b"{}"})
    messages = wait_for_messages(receiver, 2)
    said = receiver.said(webhook["secret"])
    data = {"job_id": job_id, "url": f"/v1/jobs/{job_id}"}
    assert [(news["type"], news["data"]) for news in said] == [
        ("job.started", data | {"state": "running", "sequence": 2}),
        ("job.succeeded", data | {"state": "succeeded", "sequence": 3}),
    ]
    events = api.get(f"/v1/jobs/{job_id}/events").json()["items"]
    for news, event in zip(said, events[1:], strict=True):
        apart = datetime.datetime.fromisoformat(news["timestamp"]) - datetime.datetime.fromisoformat(event["created_at"])
        assert abs(apart.total_seconds()) < 5
    assert api.get(said[0]["data"]["url"]).json()["id"] == job_id
    assert messages[0].path == "/hook?from=espalier"
    assert messages[0].headers["host"] in receiver.url
    assert messages[0].headers["content-type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        messages[0].verified(make(api, receiver)["secret"])
    delivered = wait_for_log(api, webhook, "delivered", "delivered")
    assert [item["id"] for item in delivered] == [message.id for message in messages]
    assert [(item["tries"], item["last_status"], item["last_error"], item["next_at"]) for item in delivered] == [(1, 204, None, None)] * 2
    moment = datetime.datetime.fromisoformat
    assert all(moment(item["delivered_at"]) >= moment(item["created_at"]) for item in delivered)


def test_every_end_of_a_job_is_told_whoever_brought_it_about(api: Api, receiver: Receiver, tmp_path: Path) -> None:
    make(api, receiver, kinds=["job.failed", "job.cancelled", "job.requeued", "artifacts.deleted"])
    failed, released, lost, cancelled, late = (api.submit(limits={"max_attempts": 1} if number == 2 else {}) for number in range(5))
    api.fail(failed)
    lease = api.start(released)
    with api.database.writing() as session:
        release(session, lease, "why", charged=False)
    api.start(lost)
    with api.database.writing() as session:
        session.execute(update(Job).where(Job.id == lost).values(lease_until=db_now(-1)))
    api.post(f"/v1/jobs/{cancelled}/cancel")
    with api.database.writing() as session:
        session.execute(update(Job).where(Job.id == late).values(start_by=db_now(-1)))
    with api.database.writing() as session:
        reap(session)
        give_up(session)
    old = api.succeed(tmp_path, {"report.json": b"{}"})
    with api.database.writing() as session:
        session.execute(update(Job).where(Job.id == old).values(finished_at=db_now(-2 * DAY)))
    tidy(api.database, api.store, api.settings.model_copy(update={"retention_days": 1}), threading.Event())
    expected = {failed: "job.failed", released: "job.requeued", lost: "job.failed", cancelled: "job.cancelled", late: "job.failed", old: "artifacts.deleted"}
    for job_id, kind in expected.items():
        jobs.wait_until(partial(rows, api, job_id), what=kind)
        [row] = rows(api, job_id)
        assert row.kind == kind
        events = api.get(f"/v1/jobs/{job_id}/events").json()["items"]
        assert events[row.payload["data"]["sequence"] - 1]["kind"].replace("_", ".").removeprefix("job.") in kind
    wait_for_messages(receiver, len(expected))


def test_news_is_written_with_its_event_or_not_at_all(api: Api, receiver: Receiver) -> None:
    make(api, receiver, kinds=["job.succeeded"])
    job_id = api.submit()
    lease = api.start(job_id)
    with api.database.writing() as session:
        finish(session, lease, "succeeded", report={})
        assert session.scalar(select(func.count()).where(Delivery.job_id == job_id)) == 1
        session.rollback()
    assert rows(api, job_id) == []
    with api.database.writing() as session:
        finish(session, lease, "succeeded", report={})
    assert [row.kind for row in rows(api, job_id)] == ["job.succeeded"]


def test_a_job_may_name_a_webhook_that_hears_of_no_other(api: Api, receiver: Receiver) -> None:
    every, named, other = make(api, receiver), make(api, receiver, every_job=False), make(api, receiver, every_job=False, kinds=["job.failed"])
    api.start(api.submit())
    for webhook in (named, other):
        job_id = api.submit(webhook=webhook["id"])
        api.fail(job_id)
    jobs.wait_until(lambda: len(log(api, every)) == 5, 60, "the news")
    assert {(item["job_id"], item["kind"]) for item in log(api, other)} == {(job_id, "job.failed")}
    assert sorted(item["kind"] for item in log(api, named)) == ["job.failed", "job.started"]
    assert api.get(f"/v1/jobs/{job_id}").json()["webhook"] == other["id"]
    path = f"/v1/webhooks/{every['id']}/deliveries"
    first = api.get(path, params={"job_id": job_id, "limit": 1}).json()
    second = api.get(path, params={"job_id": job_id, "limit": 1, "cursor": first["next"]}).json()
    assert [(page["items"][0]["job_id"], page["items"][0]["kind"]) for page in (first, second)] == [(job_id, "job.failed"), (job_id, "job.started")]
    assert second["next"] is None
    assert api.get(path, params={"cursor": first["next"]}).json()["code"] == "cursor_of_other_filters"


def test_a_job_may_name_no_webhook_that_is_not_there(api: Api, receiver: Receiver) -> None:
    others = make(api.other_tenant(), receiver)
    for webhook, code in ((others["id"], "webhook_not_found"), ("wh_" + "0" * 32, "webhook_not_found"), ("wh_1", "invalid_request")):
        refused = api.post("/v1/jobs", json=RECIPE | {"webhook": webhook})
        assert (refused.status_code, refused.json()["code"]) == (422, code)
        assert refused.json()["errors"][0]["pointer"] == "/webhook"
    assert api.get("/v1/jobs").json()["items"] == []


def test_another_tenants_jobs_are_not_told(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    other = api.other_tenant()
    other.start(other.submit())
    assert log(api, webhook) == []


# ------------------------------------------------------------------- tries


def test_what_is_not_taken_is_sent_again_under_its_id(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    receiver.status, receiver.headers = 500, {"Retry-After": "3600"}
    ping = api.post(f"/v1/webhooks/{webhook['id']}/test").json()
    assert (ping["kind"], ping["job_id"], ping["state"]) == ("ping", None, "waiting")
    jobs.wait_until(lambda: log(api, webhook)[0]["last_status"], what="the first try")
    assert api.get(f"/v1/webhooks/{webhook['id']}").json()["failing_since"] is not None
    waiting = log(api, webhook)[0]
    assert (waiting["state"], waiting["last_status"]) == ("waiting", 500)
    assert "500" in waiting["last_error"]
    assert api.post(f"/v1/webhooks/{webhook['id']}/deliveries/{ping['id']}/replay").json()["code"] == "delivery_waiting"
    receiver.status = 200
    with api.database.writing() as session:
        session.execute(update(Delivery).where(Delivery.id == ping["id"]).values(next_at=db_now()))
    [delivered] = wait_for_log(api, webhook, "delivered")
    assert {message.id for message in receiver.messages} == {ping["id"]}
    assert {news["timestamp"] for news in receiver.said(webhook["secret"])} == {receiver.said(webhook["secret"])[0]["timestamp"]}
    assert delivered["tries"] == len(receiver.messages) > 1
    assert (delivered["last_status"], delivered["last_error"]) == (200, None)
    assert api.get(f"/v1/webhooks/{webhook['id']}").json()["failing_since"] is None


def test_what_is_given_up_can_be_replayed(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    receiver.status = 503
    ping = api.post(f"/v1/webhooks/{webhook['id']}/test").json()
    [failed] = wait_for_log(api, webhook, "failed")
    assert failed["tries"] == 1 + len(FAST["webhook_retry_seconds"]) == len(receiver.messages)  # type: ignore[arg-type]
    receiver.status = 204
    for _ in range(2):  # once more also where it was taken
        again = api.post(f"/v1/webhooks/{webhook['id']}/deliveries/{ping['id']}/replay")
        assert (again.status_code, again.json()["state"], again.json()["tries"]) == (202, "waiting", 0)
        [delivered] = wait_for_log(api, webhook, "delivered")
        assert (delivered["id"], delivered["tries"]) == (ping["id"], 1)
    assert {message.id for message in receiver.messages} == {ping["id"]}


def test_gone_disables(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    path = f"/v1/webhooks/{webhook['id']}"
    receiver.status = 410
    with api.database.writing() as session:
        tenant_id = session.get_one(Webhook, webhook["id"]).tenant_id
        first, second = (service.send_ping(session, tenant_id, webhook["id"]).id for _ in range(2))
    assert [item["id"] for item in wait_for_log(api, webhook, "failed", "failed")] == [first, second]
    assert [message.id for message in receiver.messages] == [first]
    disabled = api.get(path).json()
    assert disabled["disabled_at"] is not None
    assert "410" in disabled["disabled_reason"]
    assert api.post(f"{path}/test").json()["code"] == "webhook_disabled"
    assert api.post(f"{path}/deliveries/{first}/replay").json()["code"] == "webhook_disabled"
    api.start(api.submit())
    assert len(log(api, webhook)) == 2
    receiver.status = 204
    enabled = api.post(f"{path}/enable").json()
    assert (enabled["disabled_at"], enabled["disabled_reason"], enabled["failing_since"]) == (None, None, None)
    api.post(f"{path}/deliveries/{first}/replay")
    wait_for_log(api, webhook, "delivered", "failed")


def test_days_without_success_disable(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    receiver.status = 500

    def try_after(days: float) -> dict[str, Any]:
        with api.database.writing() as session:
            session.execute(update(Webhook).where(Webhook.id == webhook["id"]).values(failing_since=db_now(-days * DAY)))
        before = len(receiver.messages)
        api.post(f"/v1/webhooks/{webhook['id']}/test")
        wait_for_messages(receiver, before + 3 if days < 5 else before + 1)
        jobs.wait_until(lambda: "waiting" not in {item["state"] for item in log(api, webhook)}, what="the last try")
        shown: dict[str, Any] = api.get(f"/v1/webhooks/{webhook['id']}").json()
        return shown

    assert try_after(4.9)["disabled_at"] is None
    disabled = try_after(5.1)
    assert disabled["disabled_at"] is not None
    assert "500" in disabled["disabled_reason"]
    assert len(receiver.messages) == 4


def test_a_redirect_is_not_followed(api: Api, receiver: Receiver) -> None:
    with receiving() as elsewhere:
        webhook = make(api, receiver)
        receiver.status, receiver.headers = 307, {"Location": elsewhere.url}
        api.post(f"/v1/webhooks/{webhook['id']}/test")
        [failed] = wait_for_log(api, webhook, "failed")
        assert failed["last_status"] == 307
        assert "redirect" in failed["last_error"]
        assert elsewhere.messages == []


def test_an_endless_answer_is_not_read(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    receiver.status, receiver.endless = 200, True
    began = time.monotonic()
    api.post(f"/v1/webhooks/{webhook['id']}/test")
    [delivered] = wait_for_log(api, webhook, "delivered")
    assert delivered["tries"] == 1
    assert time.monotonic() - began < 45


@pytest.mark.parametrize(("header", "seconds"), [("40", 40), ("date", 40), ("99999999999", 86400), ("soon", 0.2), ("-5", 0.2)])
def test_a_receiver_may_ask_for_time(api: Api, receiver: Receiver, header: str, seconds: float) -> None:
    webhook = make(api, receiver)
    if header == "date":
        header = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    receiver.status, receiver.headers, receiver.pause = 429, {"Retry-After": header}, 0
    sent = datetime.datetime.now(datetime.UTC)
    api.post(f"/v1/webhooks/{webhook['id']}/test")
    jobs.wait_until(lambda: log(api, webhook)[0]["last_status"] == 429, what="the first try")
    item = log(api, webhook)[0]
    if seconds < 1:
        wait_for_log(api, webhook, "failed")
    else:
        assert -2 < (datetime.datetime.fromisoformat(item["next_at"]) - sent).total_seconds() - seconds < 60  # a date has whole seconds
    api.request("DELETE", f"/v1/webhooks/{webhook['id']}")


def test_a_secret_can_be_changed_while_receivers_still_know_the_old_one(api: Api, receiver: Receiver) -> None:
    old = make(api, receiver)
    path = f"/v1/webhooks/{old['id']}"
    answer = api.post(f"{path}/rotate")
    assert answer.headers["Cache-Control"] == "no-store"
    new = answer.json()
    assert new["secret"] != old["secret"]
    api.post(f"{path}/test")
    [message] = wait_for_messages(receiver, 1)
    assert [part[:3] for part in message.headers["webhook-signature"].split(" ")] == ["v1,", "v1,"]
    assert message.verified(old["secret"]) == message.verified(new["secret"])
    newest = api.post(f"{path}/rotate", params={"overlap": 0}).json()
    api.post(f"{path}/test")
    message = wait_for_messages(receiver, 2)[1]
    assert message.verified(newest["secret"])["type"] == "ping"
    for secret in (old["secret"], new["secret"]):
        with pytest.raises(WebhookVerificationError):
            message.verified(secret)
    assert api.post(f"{path}/rotate", params={"overlap": 10**9}).status_code == 422


def test_the_log_is_paged_and_forgets(api: Api, receiver: Receiver) -> None:
    webhook = make(api, receiver)
    path = f"/v1/webhooks/{webhook['id']}/deliveries"
    ids = [api.post(f"/v1/webhooks/{webhook['id']}/test").json()["id"] for _ in range(5)]
    wait_for_log(api, webhook, *["delivered"] * 5)
    seen, cursor = [], None
    while True:
        page = api.get(path, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == ids[::-1]
    other = make(api, receiver)
    cursor = api.get(path, params={"limit": 1}).json()["next"]
    assert api.get(f"/v1/webhooks/{other['id']}/deliveries", params={"cursor": cursor}).json()["code"] == "cursor_invalid"
    with api.database.writing() as session:
        old = f"dlv_{int((time.time() - deliveries.KEPT_SECONDS - 60) * 1000):012x}{'0' * 20}"
        session.execute(update(Delivery).where(Delivery.id == ids[0]).values(id=old))
        deliveries.forget(session)
    assert [item["id"] for item in log(api, webhook)] == ids[1:]


def test_tries_are_counted(api: Api, receiver: Receiver) -> None:
    def counted() -> dict[str, float]:
        with api.database.reading() as session:
            return {labels["outcome"]: value for name, labels, value in totals.read(session) if name == totals.DELIVERIES}

    webhook = make(api, receiver)
    receiver.status = 500
    before = counted()
    api.post(f"/v1/webhooks/{webhook['id']}/test")
    wait_for_log(api, webhook, "failed")
    after = counted()
    assert {outcome: after[outcome] - before.get(outcome, 0) for outcome in ("retried", "failed")} == {"retried": 2, "failed": 1}


@pytest.fixture(params=["sqlite", "postgres"])
def quiet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database from which nothing is sent."""
    url = f"sqlite:///{tmp_path}/quiet.db" if request.param == "sqlite" else request.getfixturevalue("postgres_database")
    database = jobs.open_database(url)
    yield database
    database.dispose()


def take(database: Database, *busy: str, limit: int = 10, lease_seconds: float = 60) -> list[Try]:
    with database.writing() as session:
        return deliveries.take(session, busy, limit, lease_seconds)


def test_who_came_too_late_changes_nothing(quiet: Database, tmp_path: Path) -> None:
    """A process that was stopped for longer than its try may last."""
    with quiet.writing() as session:
        webhook, _ = service.create(session, jobs.TENANT, NewWebhook(url="http://hooks.example/"), Vault(Settings(home=tmp_path)))
        service.send_ping(session, jobs.TENANT, webhook.id)
    [late] = take(quiet, lease_seconds=-1)
    [second] = take(quiet)
    assert (late.number, second.number, late.delivery_id) == (1, 2, second.delivery_id)
    assert take(quiet) == []

    def told(sent: Try, answer: Answer) -> tuple[str, int, str | None]:
        with quiet.writing() as session:
            deliveries.record(session, sent, answer, [60, 60, 60])
        with quiet.reading() as session:
            row = session.get_one(Delivery, sent.delivery_id)
        return row.state, row.tries, row.last_error

    assert told(late, Answer(204)) == ("waiting", 2, None)
    assert told(second, Answer(204)) == ("delivered", 2, None)
    assert told(late, Answer(500, "late")) == ("delivered", 2, None)


def test_each_webhook_has_one_at_a_time_and_its_oldest_first(quiet: Database, tmp_path: Path) -> None:
    with quiet.writing() as session:
        first, second, off = (
            service.create(session, jobs.TENANT, NewWebhook(url="http://hooks.example/"), Vault(Settings(home=tmp_path)))[0].id for _ in range(3)
        )
        ids = {webhook_id: [service.send_ping(session, jobs.TENANT, webhook_id).id for _ in range(3)] for webhook_id in (first, second, off)}
        session.execute(update(Webhook).where(Webhook.id == off).values(disabled_at=db_now()))
    assert {sent.delivery_id for sent in take(quiet)} == {ids[first][0], ids[second][0]}
    assert [sent.delivery_id for sent in take(quiet, first)] == [ids[second][1]]
    assert [sent.delivery_id for sent in take(quiet, limit=1)] == [ids[first][1]]
    with quiet.writing() as session:
        session.execute(update(Delivery).where(Delivery.id == ids[second][2]).values(next_at=db_now(60)))
    assert [sent.delivery_id for sent in take(quiet)] == [ids[first][2]]


def test_news_for_a_webhook_that_is_deleted_meanwhile_fails_no_job(postgres_database: str, tmp_path: Path) -> None:
    database = jobs.open_database(postgres_database)
    with database.writing() as session:
        webhook, _ = service.create(session, jobs.TENANT, NewWebhook(url="http://hooks.example/"), Vault(Settings(home=tmp_path)))
    job_id = jobs.submit(database)
    deleting = threading.Event()

    def delete() -> None:
        with database.writing() as session:
            service.delete(session, jobs.TENANT, webhook.id)
            deleting.set()
            time.sleep(0.5)

    thread = threading.Thread(target=delete)
    thread.start()
    deleting.wait(60)
    with database.writing() as session:
        assert claim(session, job_id, "test", 45) is not None
    thread.join()
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Delivery)) == 0
    database.dispose()


# ----------------------------------------------------- names and certificates


@contextmanager
def sending(settings: Settings, database: Database, resolver: Resolver) -> Iterator[None]:
    """A sender alone, to which names mean what the test says."""
    stopping = threading.Event()
    thread = threading.Thread(target=keep_sending, args=(database, settings, stopping, resolver))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(60)
        assert not thread.is_alive()


class Names:
    def __init__(self, *answers: list[str]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[Settings, Database]]:
    settings = Settings.model_validate({"home": tmp_path} | FAST | {"webhook_retry_seconds": [0.2]})
    database = jobs.open_database(settings.database_url.get_secret_value())
    yield settings, database
    database.dispose()


def ping(alone: tuple[Settings, Database], url: str, times: int = 1) -> tuple[str, str]:
    """A webhook with messages that wait; its id and its secret."""
    settings, database = alone
    with database.writing() as session:
        webhook, secret = service.create(session, jobs.TENANT, NewWebhook(url=url), Vault(settings))
        for _ in range(times):
            service.send_ping(session, jobs.TENANT, webhook.id)
    return webhook.id, secret


def ended(alone: tuple[Settings, Database], webhook_id: str) -> Delivery:
    def find() -> Delivery:
        with alone[1].reading() as session:
            return session.scalars(select(Delivery).where(Delivery.webhook_id == webhook_id)).one()

    jobs.wait_until(lambda: find().state != "waiting", 60, "the last try")
    return find()


def test_a_name_is_looked_up_once_a_try_and_the_connection_goes_there(alone: tuple[Settings, Database], receiver: Receiver) -> None:
    port = int(receiver.url.split(":")[2].split("/")[0])
    webhook_id, secret = ping(alone, f"http://hooks.example:{port}/x")
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    with sending(*alone, names):
        assert ended(alone, webhook_id).state == "delivered"
    assert names.asked == [("hooks.example", port)]
    [message] = receiver.messages
    assert message.headers["host"] == f"hooks.example:{port}"
    assert message.verified(secret)["type"] == "ping"


def test_a_name_that_means_the_inside_later_is_refused_then(alone: tuple[Settings, Database], receiver: Receiver) -> None:
    """DNS rebinding: it was public when the webhook was made."""
    settings, database = alone
    port = int(receiver.url.split(":")[2].split("/")[0])
    outside = settings.model_copy(update={"webhook_networks": (ip_network("127.0.0.9/32"),)})  # the only address that counts as public; nobody listens there
    webhook_id, _ = ping(alone, f"http://hooks.example:{port}/x")
    names = Names(["127.0.0.9"], ["127.0.0.1"])
    with sending(outside, database, names):
        failed = ended(alone, webhook_id)
    assert len(names.asked) == 2
    assert failed.last_error is not None
    assert "not public" in failed.last_error
    assert "127.0.0" not in failed.last_error
    assert receiver.messages == []


def test_another_address_is_tried_where_one_does_not_answer(alone: tuple[Settings, Database], receiver: Receiver) -> None:
    port = int(receiver.url.split(":")[2].split("/")[0])
    webhook_id, _ = ping(alone, f"http://hooks.example:{port}/x")
    with sending(*alone, Names(["127.0.0.9", "127.0.0.1"])):
        assert ended(alone, webhook_id).tries == 1
    assert len(receiver.messages) == 1


def test_a_fault_of_the_service_is_a_try_like_any_other(alone: tuple[Settings, Database], receiver: Receiver) -> None:
    async def broken(host: str, port: int) -> Sequence[str]:
        raise ZeroDivisionError

    webhook_id, _ = ping(alone, "http://hooks.example/x")
    with sending(*alone, broken):
        failed = ended(alone, webhook_id)
    assert (failed.tries, failed.last_status) == (2, None)


def test_a_slow_receiver_holds_up_no_other(alone: tuple[Settings, Database], receiver: Receiver) -> None:
    with sending(*alone, Names()), receiving() as slow:
        slow.pause = 60
        for there in (slow, receiver):
            ping(alone, there.url, times=3)
        wait_for_messages(receiver, 3)
        assert len(slow.messages) == 1, "one at a time"


@pytest.mark.parametrize("behaviour", [{"pause": 60}, {"dripping": True}])
def test_a_slow_receiver_is_given_up_in_time(alone: tuple[Settings, Database], receiver: Receiver, behaviour: dict[str, Any]) -> None:
    vars(receiver).update(behaviour)
    settings, database = alone
    webhook_id, _ = ping(alone, receiver.url)
    with sending(settings.model_copy(update={"webhook_timeout_seconds": 3, "webhook_retry_seconds": ()}), database, Names()):
        failed = ended(alone, webhook_id)
    assert (failed.tries, failed.last_status, failed.last_error) == (1, None, "There was no answer within 3 seconds.")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """An authority made for the test -> its certificate, and that of a server with this name, with its key."""
    now = datetime.datetime.now(datetime.UTC)

    def issue(
        subject: str, issuer: x509.Name | None, signer: ec.EllipticCurvePrivateKey | None, *, ca: bool
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
        authority = signer or key
        built = (
            x509.CertificateBuilder()
            .subject_name(own)
            .issuer_name(issuer or own)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )
        return built.sign(authority, hashes.SHA256()), key

    authority, authority_key = issue("authority.test", None, None, ca=True)
    server, key = issue(name, authority.subject, authority_key, ca=False)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "authority.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM) + private)
    return folder / "authority.pem", folder / "server.pem"


def test_a_certificate_is_verified_for_the_name(alone: tuple[Settings, Database], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, server = certificate(tmp_path, "hooks.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    asked: list[str | None] = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server)
    tls.sni_callback = lambda connection, name, context: asked.append(name)
    with receiving(tls) as receiver, sending(*alone, Names(["127.0.0.1"])):
        port = int(receiver.url.split(":")[2].split("/")[0])
        right, secret = ping(alone, f"https://hooks.example:{port}/x")
        assert ended(alone, right).state == "delivered"
        assert receiver.messages[0].verified(secret)["type"] == "ping"
        wrong, _ = ping(alone, f"https://others.example:{port}/x")
        failed = ended(alone, wrong)
        bare, _ = ping(alone, f"https://127.0.0.1:{port}/x")
        assert "CERTIFICATE_VERIFY_FAILED" in (ended(alone, bare).last_error or "")
        assert len(receiver.messages) == 1
    assert failed.last_error is not None
    assert "others.example" in failed.last_error
    assert asked[:2] == ["hooks.example", "others.example"]


def test_a_certificate_of_an_unknown_authority_is_refused(alone: tuple[Settings, Database], tmp_path: Path) -> None:
    _, server = certificate(tmp_path, "hooks.example")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server)
    with receiving(tls) as receiver, sending(*alone, Names(["127.0.0.1"])):
        webhook_id, _ = ping(alone, receiver.url.replace("127.0.0.1", "hooks.example"))
        assert "CERTIFICATE_VERIFY_FAILED" in (ended(alone, webhook_id).last_error or "")
        assert receiver.messages == []


def test_a_receiver_that_is_not_there_is_told_of(alone: tuple[Settings, Database]) -> None:
    webhook_id, _ = ping(alone, f"http://127.0.0.1:{free_port()}/x")
    with sending(*alone, Names()):
        failed = ended(alone, webhook_id)
    assert (failed.state, failed.tries, failed.last_status) == ("failed", 2, None)
    assert failed.last_error is not None
    assert "ConnectError" in failed.last_error
