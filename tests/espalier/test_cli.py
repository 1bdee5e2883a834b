"""The `espalier` command against a real API: what it prints and its exit codes."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.recipe import Recipe
from app.report import LayerReport, LoadCheck, Measured, Parameters, Perplexity, Report, Sparsities, Speed, TextUsed
from espalier import cli
from tests.espalier.conftest import MODEL, Service
from tests.models import make_checkpoint

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
    assert (again.code, again.out) == (2, "")
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
    assert espalier("wait", cancelled).code == 3
    assert espalier("wait").code == 2
    assert espalier("wait", "job_unknown").code == 2
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
    (stored,) = (service.home / "objects").rglob(f"{job_id}/*/checkpoint/model.safetensors")
    stored.write_bytes(b"weightz")
    damaged = espalier("download", job_id, "--to", str(tmp_path / "damaged"))
    assert damaged.code == 1
    assert "checkpoint/model.safetensors" in damaged.err
    assert "sha256" in damaged.err


def test_an_estimate_submits_nothing(espalier: Command, service: Service) -> None:
    make_checkpoint(service.home / "models" / "estimated", "llama")
    asked = ("submit", "estimated", "--method", "bonsai", "--sparsity", "0.1", "--estimate")
    told = espalier(*asked)
    assert "2 rounds of at most 100 sub-models" in told.out
    assert espalier(*asked, "--json").json["sub_models"] == 200
    assert "once the worker has fetched" in espalier("submit", MODEL, "--estimate").out
    assert espalier("list", "--json").json == []
    assert espalier("submit", "estimated", "--sparsity", "1.5", "--estimate").code == 2


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
    assert refused.code == 2
    assert "422" in refused.err
    assert "/sparsity" in refused.err
    monkeypatch.setenv("ESPALIER_API_KEY", "esp_no")
    assert "key_malformed" in espalier("list").err
    monkeypatch.setenv("ESPALIER_URL", "nowhere")
    assert "ESPALIER_URL" in espalier("list").err


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_the_service_needs_its_extra(espalier: Command, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda module: None if module == "torch" else object())
    ran = espalier(command)
    assert ran.code == 2
    assert "needs torch" in ran.err
    assert "make serve" in ran.err
