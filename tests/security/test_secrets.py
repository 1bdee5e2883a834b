"""Secrets go where they are meant to go: not into logs, rows, messages or files, whoever brings them; and links open one object, for a while."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from app.settings import Settings
from app.storage import open_store
from tests.app.conftest import Api
from tests.app.running import RECIPE, running
from tests.servers import S3

SINKS = [
    {"name": "hub", "repository": "owner/name", "token": "hf_theHubTokenOfTheUser"},
    {"name": "mlflow", "tracking_uri": "http://127.0.0.1:9000", "experiment": "e", "username": "theMlflowUser", "password": "theMlflowPassword"},
    {"name": "s3", "url": "s3://bucket/prefix", "endpoint": "http://127.0.0.1:9000", "access_key": "AKIATHEACCESSKEY", "secret_key": "theS3SecretKey"},
]


def test_no_secret_of_a_whole_job_lies_anywhere(tmp_path: Path) -> None:
    networks = json.dumps(["127.0.0.0/8"])
    environment = {
        "ESPALIER_SINK_NETWORKS": networks,
        "ESPALIER_WEBHOOK_NETWORKS": networks,
        "ESPALIER_METRICS_TOKEN": "theMetricsToken",
        "HF_TOKEN": "hf_theOperatorsToken",
        "ESPALIER_S3_SECRET_KEY": "theOperatorsS3Secret",
    }
    with running(tmp_path, {"steps": 2}, environment) as service:
        call = service.client.post
        admin = service.key
        key = call("/v1/keys", json={"name": "ci", "scopes": ["admin"]}).json()["key"]
        made = call("/v1/webhooks", json={"url": "http://127.0.0.1:9000/hook"})
        assert made.status_code == 201, made.text
        webhook = made.json()
        rotated = call(f"/v1/webhooks/{webhook['id']}/rotate").json()
        submitted = call("/v1/jobs", json=RECIPE | {"sinks": SINKS, "webhook": webhook["id"]}, headers={"Authorization": f"Bearer {key}"})
        assert submitted.status_code == 202, submitted.text
        assert service.wait_for_end(submitted.json()["id"])["state"] == "succeeded"
        # what is refused is quoted, and logged, without its secret
        refused = call("/v1/jobs", json=RECIPE | {"sinks": [SINKS[0] | {"repository": "no", "token": "hf_refusedToken"}]})
        assert refused.status_code == 422
        call("/v1/webhooks", json={"url": "https://user:thePasswordInTheUrl@example.org/"})
        service.client.get("/v1/jobs", headers={"Authorization": "Bearer esp_" + "0" * 32 + "_" + "refusedKey" * 4 + "xyz"})
        answers = service.client.get("/v1/jobs").text + service.client.get("/v1/audit").text + service.client.get("/v1/webhooks").text + refused.text
    known = {name: value for sink in SINKS for name, value in sink.items() if name in ("token", "username", "password", "access_key", "secret_key")}
    sought = [*known.values(), "hf_refusedToken", "thePasswordInTheUrl", "refusedKey", *environment.values()]
    sought.remove(networks)
    sought = [*(each for each in sought if each != networks), *(made.split("_", 2)[2] for made in (admin, key))]
    sought += [found["secret"].removeprefix("whsec_") for found in (webhook, rotated)]
    files = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {"api.log", "worker.log", "espalier.db"} <= files.keys()
    for secret in sought:
        assert len(secret) >= 8
        assert secret not in answers, secret
        assert [name for name, content in files.items() if secret.encode() in content] == [], secret


def test_a_link_opens_one_object_for_a_while(s3: S3, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    environment = {name.removeprefix("ESPALIER_").lower(): value for name, value in s3.environment.items()}
    store = open_store(Settings.model_validate({"home": tmp_path, **environment}))
    for name in ("mine", "other"):
        (tmp_path / name).write_text(name)
        store.put_file(f"tenant/{name}", tmp_path / name)
    link, ending = store.presign("tenant/mine", 600), store.presign("tenant/mine", 1)
    assert link is not None
    assert ending is not None
    made_at = time.monotonic()
    assert parse_qs(urlsplit(link).query)["X-Amz-Expires"] == ["600"]
    assert s3.secret_key not in link
    assert httpx.get(link).text == "mine"
    for changed in (
        link.replace("tenant/mine", "tenant/other"),
        link.replace("X-Amz-Expires=600", "X-Amz-Expires=86400"),
        link.replace("tenant/mine", "tenant/"),
        link.split("?")[0],
    ):
        assert changed != link
        assert httpx.get(changed).status_code == 403, changed
    assert httpx.put(link, content=b"mine too").status_code == 403
    assert httpx.delete(link).status_code == 403
    time.sleep(max(0.0, made_at + 2.5 - time.monotonic()))
    assert httpx.get(ending).status_code == 403
    captured = capfd.readouterr()
    assert "X-Amz-Signature" not in captured.out + captured.err


def test_keys_are_compared_in_constant_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `compare_digest` and by nothing else: with one that always says the same, its answer is the service's."""
    wrong = api.key[:-43] + "A" * 43
    assert api.get("/v1/jobs", key=wrong).status_code == 401
    monkeypatch.setattr(secrets, "compare_digest", lambda one, other: False)
    assert api.get("/v1/jobs").status_code == 401
    monkeypatch.setattr(secrets, "compare_digest", lambda one, other: True)
    assert api.get("/v1/jobs", key=wrong).status_code == 200
    assert api.get("/v1/jobs", key="esp_" + "f" * 32 + "_" + "A" * 43).status_code == 401
