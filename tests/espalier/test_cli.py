"""The `espalier` command against a real API: what it prints and its exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from app.auth import Scope
from app.recipe import Recipe
from app.report import LayerReport, LoadCheck, Measured, Parameters, Perplexity, Report, Sparsities, Speed, TextUsed
from espalier import cli
from espalier.commands import admin, common, local
from tests.espalier.conftest import MODEL, Service
from tests.models import make_checkpoint
from tests.servers import free_port

FILES = {"checkpoint/config.json": b"{}", "checkpoint/model.safetensors": b"weights", "report.json": b"{}"}


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ran]


@pytest.fixture
def espalier(service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command as the service's tenant."""
    monkeypatch.setenv("ESPALIER_URL", service.url)
    monkeypatch.setenv("ESPALIER_API_KEY", service.key)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["espalier", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    return run


def measured(scale: float) -> Measured:
    return Measured(
        parameters=parameters(scale),
        checkpoint_bytes=int(4000 * scale),
        macs_per_token=int(900 * scale),
        perplexity=Perplexity(value=20 / scale, text=text_used(), windows=2, sequence_length=8, dtype="float32"),
        speed=Speed(device="cpu", threads=1, prefill_tokens=8, prefill_tokens_per_second=100 / scale, decode_tokens=8, decode_tokens_per_second=10 / scale),
        peak_memory_bytes=int(10_000 * scale),
    )


def parameters(scale: float) -> Parameters:
    return Parameters(
        all=int(1000 * scale), non_embedding=int(800 * scale), decoder=int(700 * scale), ffn=int(500 * scale), ffn_channels=50, decoder_zeros=0, ffn_zeros=0
    )


def text_used() -> TextUsed:
    return TextUsed(source="wiki", sha256="0" * 64, tokens=100, used_tokens=16, bos_added=False)


def a_report() -> dict[str, Any]:
    return Report(
        recipe=Recipe.model_validate({"model": MODEL, "method": "cfsp", "sparsity": 0.2}),
        model_type="llama",
        model_fingerprint="0" * 64,
        before=measured(1),
        after=measured(0.5),
        parameters_before=parameters(1),
        parameters_after=parameters(0.5),
        sparsity=Sparsities(ffn=0.2, decoder=0.1, non_embedding=0.1, all=0.1),
        layers=[
            LayerReport(
                index=0,
                dropped=False,
                ffn_channels=40,
                ffn_channels_before=50,
                kv_groups=2,
                kv_groups_before=2,
                experts=None,
                experts_before=None,
                weights=500,
                zeros=0,
                importance=0.5,
            )
        ],
        calibration=text_used(),
        loads_with=[LoadCheck(layout="uniform", loader="transformers", max_logit_difference=0.0, checked="logits")],
        seconds={"prune": 1.5},
        resumed_at_block=None,
        peak_memory_bytes=10_000,
        notes=["Widths were rounded."],
        versions={"espalier": "0"},
    ).model_dump(mode="json")


def test_submit_list_show_cancel(espalier: Command) -> None:
    job_id = espalier("submit", MODEL, "--method", "wanda", "--sparsity", "2:4").out.strip()
    assert job_id.startswith("job_")
    more = espalier("submit", MODEL, "--layout", "per_layer", "--recipe", '{"evaluation": null, "output": {"padded": true}}', "--json").json
    assert (more["method"], more["recipe"]["evaluation"], more["recipe"]["output"]["padded"]) == ("cfsp", None, True)
    assert [job["id"] for job in espalier("list", "--json").json] == [more["id"], job_id]
    assert [job["id"] for job in espalier("list", "--limit", "1", "--json").json] == [more["id"]]
    assert job_id in espalier("list").out
    assert espalier("show", job_id, "--json").json["report"] is None
    assert "queued" in espalier("show", job_id).out
    assert espalier("cancel", job_id).out.strip() == f"{job_id} is cancelled"
    again = espalier("cancel", job_id)
    assert (again.code, again.out) == (1, "")
    assert "job_finished" in again.err


def test_show_tells_what_was_measured(espalier: Command, service: Service) -> None:
    shown = espalier("show", service.job_with({}, a_report()))
    assert shown.code == 0
    rows = {name: values for name, *values in (re.split(r"\s{2,}", line.strip()) for line in shown.out.splitlines())}
    assert rows["parameters, all"] == ["1,000", "500", "-50.0%"]
    assert rows["perplexity"] == ["20.00", "40.00", "+100.0%"]
    assert rows["decode, tokens/s"] == ["10.0", "20.0", "+100.0%"]
    assert "Widths were rounded." in shown.out


def test_the_exit_code_of_wait_is_the_result(espalier: Command, service: Service) -> None:
    succeeded, failed, cancelled = service.job_with({}), service.submit(), service.submit()
    service.fail(service.start(failed))
    espalier("cancel", cancelled)
    assert espalier("wait", succeeded).code == 0
    lost = espalier("wait", failed)
    assert lost.code == 1
    assert "disk_full" in lost.out
    assert "Free some space." in lost.out
    assert espalier("wait", cancelled).code == 1
    assert espalier("wait").code == 2
    assert espalier("wait", "job_unknown").code == 1
    waited = espalier("wait", failed, "--json")
    assert (waited.code, waited.json["state"]) == (1, "failed")


def test_wait_shows_progress_and_may_give_up(espalier: Command, service: Service) -> None:
    job_id = service.submit()
    service.tell(service.start(job_id), "prune", 0.42)
    waited = espalier("wait", job_id, "--timeout", "0.2")
    assert waited.code == 1
    assert "prune" in waited.err
    assert "42 %" in waited.err
    assert "is still running" in waited.err


def test_submit_can_wait(espalier: Command, service: Service) -> None:
    def fail() -> None:
        with service.client() as client:
            while not (jobs := list(client.jobs())):
                time.sleep(0.05)
        service.fail(service.start(jobs[0]["id"]))

    worker = threading.Thread(target=fail)
    worker.start()
    submitted = espalier("submit", MODEL, "--wait", "--json")
    worker.join()
    assert (submitted.code, submitted.json["state"]) == (1, "failed")


def test_logs(espalier: Command, service: Service) -> None:
    job_id = service.submit()
    lease = service.start(job_id)
    service.tell(lease, "load", 0.1)
    assert [line.split()[2] for line in espalier("logs", job_id).out.splitlines()] == ["queued", "claimed", "phase"]
    threading.Timer(0.5, service.fail, (lease,)).start()
    followed = espalier("logs", job_id, "--follow", "--json")
    assert [json.loads(line)["kind"] for line in followed.out.splitlines()] == ["queued", "claimed", "phase", "failed"]


def test_download(espalier: Command, service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    ran = espalier("download", job_id, "--to", str(tmp_path / "all"))
    assert ran.code == 0
    assert "3 files" in ran.out
    assert (tmp_path / "all/checkpoint/model.safetensors").read_bytes() == b"weights"
    told = espalier("download", job_id, "--to", str(tmp_path / "some"), "--role", "report", "--json").json
    assert [(Path(file["file"]), file["bytes"]) for file in told] == [(tmp_path / "some/report.json", 2)]
    tarred = espalier("download", job_id, "--tar", str(tmp_path / "all.tar"), "--json").json
    assert [file["path"] for file in tarred["files"]] == ["checkpoint/config.json", "checkpoint/model.safetensors"]
    assert "2 files" in espalier("download", job_id, "--tar", str(tmp_path / "all.tar")).out
    assert espalier("download", job_id, "--tar", str(tmp_path / "all.tar"), "--role", "report").code == 1
    (stored,) = (service.home / "objects").rglob(f"{job_id}/*/checkpoint/model.safetensors")
    stored.write_bytes(b"weightz")
    damaged = espalier("download", job_id, "--to", str(tmp_path / "damaged"))
    assert damaged.code == 1
    assert "checkpoint/model.safetensors" in damaged.err
    assert "sha256" in damaged.err


def test_an_estimate_submits_nothing(espalier: Command, service: Service) -> None:
    make_checkpoint(service.home / "models" / "estimated", "llama")
    asked = ("estimate", "estimated", "--method", "bonsai", "--sparsity", "0.1")
    told = espalier(*asked)
    assert "2 rounds of at most 100 sub-models" in told.out
    assert "queue default: 0 live workers" in told.out
    assert espalier(*asked, "--json").json["estimate"]["sub_models"] == 200
    assert "once the worker has fetched" in espalier("estimate", MODEL).out
    assert espalier("list", "--json").json == []
    assert espalier("estimate", "estimated", "--sparsity", "1.5").code == 1


def test_methods(espalier: Command) -> None:
    assert {"magnitude", "wanda", "cfsp"} <= {method["name"] for method in espalier("methods", "--json").json}
    assert "FFN channels" in espalier("methods").out


def test_recoveries(espalier: Command) -> None:
    assert {"full", "lora"} <= {recovery["name"] for recovery in espalier("recoveries", "--json").json}
    assert "bonsai" in espalier("recoveries").out


@pytest.mark.parametrize("recipe", ["{", "[]"])
def test_a_recipe_that_is_no_json_object_is_a_usage_error(espalier: Command, recipe: str) -> None:
    ran = espalier("submit", MODEL, "--recipe", recipe)
    assert ran.code == 2
    assert "--recipe" in ran.err


def test_refusals_are_sentences(espalier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = espalier("submit", MODEL, "--sparsity", "1.5")
    assert refused.code == 1
    assert "422" in refused.err
    assert "/sparsity" in refused.err
    monkeypatch.setenv("ESPALIER_API_KEY", "esp_no")
    assert "key_malformed" in espalier("list").err
    monkeypatch.setenv("ESPALIER_URL", "nowhere")
    assert "ESPALIER_URL" in espalier("list").err


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_the_service_needs_its_extra(espalier: Command, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "find_spec", lambda module: None if module == "torch" else object())
    ran = espalier(command)
    assert ran.code == 2
    assert "needs torch" in ran.err
    assert "make serve" in ran.err


# ---------------------------------------------------------------- pipelines


@pytest.mark.parametrize(
    ("bounds", "code", "met"),
    [
        (("--max-perplexity-increase", "1.0", "--max-perplexity", "40", "--min-sparsity", "0.1", "--min-speedup", "2"), 0, [True] * 4),
        (("--max-perplexity-increase", "0.99"), 4, [False]),
        (("--max-parameters", "499", "--max-bytes", "2000"), 4, [False, True]),
    ],
)
def test_wait_holds_a_result_against_bounds(espalier: Command, service: Service, bounds: tuple[str, ...], code: int, met: list[bool]) -> None:
    job_id = service.job_with({}, a_report())
    ran = espalier("wait", job_id, *bounds)
    assert ran.code == code
    assert ran.out.count("not met") == met.count(False)
    told = espalier("wait", job_id, *bounds, "--json")
    assert (told.code, sorted(verdict["met"] for verdict in told.json["gates"])) == (code, sorted(met))


def test_what_was_not_measured_is_not_met(espalier: Command, service: Service) -> None:
    ran = espalier("wait", service.job_with({}, a_report() | {"before": None}), "--max-perplexity-increase", "9")
    assert ran.code == 4
    assert "not measured" in ran.out


def test_bounds_do_not_hide_that_a_job_failed(espalier: Command, service: Service) -> None:
    job_id = service.submit()
    service.fail(service.start(job_id))
    assert espalier("wait", job_id, "--max-perplexity", "40").code == 1


def test_a_service_that_is_away(espalier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_URL", f"http://127.0.0.1:{free_port()}")
    ran = espalier("list")
    assert (ran.code, ran.out) == (3, "")
    assert "ESPALIER_URL" in ran.err


def test_submit_can_wait_and_download(espalier: Command, service: Service, tmp_path: Path) -> None:
    def work() -> None:
        with service.client() as client:
            while not (jobs := list(client.jobs())):
                time.sleep(0.05)
        service.succeed(service.start(jobs[0]["id"]), FILES)

    worker = threading.Thread(target=work)
    worker.start()
    ran = espalier("submit", MODEL, "--metadata", "run=42", "--priority", "3", "--queue", "default", "--download", str(tmp_path), "--json")
    worker.join()
    assert (ran.code, ran.json["state"], ran.json["metadata"], ran.json["priority"]) == (0, "succeeded", {"run": "42"}, 3)
    assert {file["path"] for file in ran.json["files"]} == set(FILES)
    assert (tmp_path / "checkpoint/model.safetensors").read_bytes() == b"weights"


def test_one_idempotency_key_makes_one_job(espalier: Command) -> None:
    first, second = (espalier("submit", MODEL, "--idempotency-key", "build-7").out for _ in range(2))
    assert first == second
    assert len(espalier("list", "--json").json) == 1


def test_a_recipe_may_be_a_file(espalier: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"method": "wanda", "sparsity": "2:4", "evaluation": null}')
    assert espalier("submit", MODEL, "--recipe", f"@{tmp_path}/recipe.json", "--json").json["method"] == "wanda"
    missing = espalier("submit", MODEL, "--recipe", "@nowhere.json")
    assert missing.code == 1
    assert "nowhere.json" in missing.err


# ------------------------------------------------------------ other commands


def test_retry_and_delete(espalier: Command, service: Service) -> None:
    job_id = service.submit()
    service.fail(service.start(job_id))
    assert espalier("retry", job_id).out.strip() == f"{job_id} is queued"
    assert espalier("delete", job_id).code == 1
    espalier("cancel", job_id)
    assert espalier("delete", job_id, "--json").json == {"id": job_id, "deleted": True}
    assert espalier("show", job_id).code == 1


def test_report_and_get(espalier: Command, service: Service) -> None:
    job_id = service.job_with({}, a_report())
    assert espalier("report", job_id, "--json").json["parameters_after"]["all"] == 500
    assert "40 of 50" in espalier("report", job_id).out
    assert espalier("get", job_id, "--json").json["report"]["notes"] == ["Widths were rounded."]


def test_keys(espalier: Command) -> None:
    made = espalier("keys", "create", "CI", "--scope", "jobs:read", "--lifetime", "3600", "--json").json
    assert made["key"].startswith("esp_")
    assert made["id"] in espalier("keys", "list").out
    turned = espalier("keys", "rotate", made["id"], "--overlap", "0")
    assert turned.out.startswith("esp_")
    (left,) = [key for key in espalier("keys", "list", "--json").json if key["name"] == "CI"]
    assert espalier("keys", "revoke", left["id"]).code == 0
    assert espalier("keys", "revoke", left["id"]).code == 1
    assert get_args(Scope) == admin.SCOPES


def test_webhooks(espalier: Command) -> None:
    made = espalier("webhooks", "create", "https://1.1.1.1/hook", "--kind", "job.failed", "--json").json
    assert made["secret"].startswith("whsec_")
    assert espalier("webhooks", "create", "https://127.0.0.1/hook").code == 1
    assert "enabled" in espalier("webhooks", "list").out
    sent = espalier("webhooks", "test", made["id"], "--json").json
    assert [each["id"] for each in espalier("webhooks", "deliveries", made["id"], "--json").json] == [sent["id"]]
    assert "ping" in espalier("webhooks", "deliveries", made["id"]).out
    assert espalier("webhooks", "deliveries", made["id"], "--job", f"job_{1:032x}", "--json").json == []
    assert espalier("webhooks", "replay", made["id"], sent["id"]).code in (0, 1)  # it may be on its way
    assert espalier("webhooks", "enable", made["id"]).code == 0
    assert espalier("webhooks", "delete", made["id"]).code == 0
    assert espalier("webhooks", "list", "--json").json == []


def test_sinks(espalier: Command, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.job_with(FILES)
    secrets = {"access_key": "a", "secret_key": "b"}
    (tmp_path / "sink.json").write_text(json.dumps({"name": "s3", "url": "s3://models/pruned", **secrets}))
    added = espalier("sinks", "add", job_id, str(tmp_path / "sink.json"), "--json").json
    assert [(run["number"], run["name"], run["state"]) for run in added] == [(0, "s3", "waiting")]
    assert "waiting" in espalier("sinks", "list", job_id).out
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(secrets)))
    again = espalier("sinks", "retry", job_id, "0", "-")
    assert again.code == 1
    assert "sink" in again.err


def test_queues_usage_checkpoints_and_audit(espalier: Command, service: Service) -> None:
    job_id = service.submit()
    assert {"default"} <= {queue["name"] for queue in espalier("queues", "--json").json}
    assert "default" in espalier("queues").out
    assert espalier("usage", "--json").json["queued"]["used"] == 1
    assert "queued jobs" in espalier("usage").out
    assert espalier("checkpoints", "--json").json == []
    assert espalier("checkpoints", "--state", "ready").code == 0
    assert [entry["target"] for entry in espalier("audit", "--action", "job.submit", "--json").json] == [job_id]
    assert "job.submit" in espalier("audit").out


def test_every_command_has_json() -> None:
    def leaves(command: Any) -> Iterator[Any]:
        if not hasattr(command, "commands"):
            yield command
        for inner in getattr(command, "commands", {}).values():
            yield from leaves(inner)

    found = list(leaves(typer.main.get_command(cli.app)))
    assert len(found) > 30
    for command in found:
        assert any("--json" in parameter.opts for parameter in command.params), command.name
        assert command.help, command.name


# ----------------------------------------------------------------- completion


def complete(line: str, **environment: str) -> list[str]:
    asked = {"_ESPALIER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    command = [str(Path(sys.executable).with_name("espalier"))]
    ran = subprocess.run(command, env=os.environ | asked | environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.stderr == ""
    return ran.stdout.split()


def test_the_shell_completes_what_the_service_has(service: Service) -> None:
    job_id = service.submit()
    here = {"ESPALIER_URL": service.url, "ESPALIER_API_KEY": service.key}
    assert complete("espalier show job_", **here) == [job_id]
    assert complete("espalier submit model --method wan", **here) == ["wanda"]
    assert complete("espalier submit model --queue def", **here) == ["default"]
    assert complete("espalier keys create CI --scope jobs:w", **here) == ["jobs:write"]


def test_completion_is_silent_and_quick_when_the_service_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        started = time.monotonic()
        monkeypatch.setenv("ESPALIER_URL", url)
        assert common.offer_jobs("job_") == []
        assert time.monotonic() - started < 10
    assert complete("espalier show job_", ESPALIER_URL=f"http://127.0.0.1:{free_port()}") == []
    assert complete("espalier show job_", ESPALIER_URL="nowhere") == []
