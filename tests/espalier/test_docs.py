"""The user's page and the workflow beside it: every block and every step is run against a service with a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from espalier.client import Client
from tests.espalier.test_serve import serving
from tests.models import make_checkpoint

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```\n", re.DOTALL)
BLOCKS = [(match["language"], match["code"], match["reason"]) for match in BLOCK.finditer((DOCS / "user.md").read_text())]
NOT_RUN = {
    "the tests run from a development install",
    "the tests have a service of their own",
    "the receiver has to be on the internet",
    "it writes to a bucket of yours",
}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass
class Shell:
    """A folder and an environment that one block hands on to the next."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, language: str, code: str) -> str:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", f"{code}\nenv -0 > .environment"]
        ran = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=200, check=False)
        assert ran.returncode == 0, f"{code}\n{ran.stdout}\n{ran.stderr}"
        if language == "sh":
            self.environment = dict(pair.split("=", 1) for pair in (self.folder / ".environment").read_text().split("\0") if pair)
        return ran.stdout


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    home, folder = tmp_path_factory.mktemp("service"), tmp_path_factory.mktemp("user")
    make_checkpoint(home / "models" / MODEL, "llama")
    make_checkpoint(folder / "my-model", "llama", seed=1)
    settings = {"ESPALIER_MODEL_ROOTS": json.dumps([str(home / "models")]), "ESPALIER_HUB": "false", "ESPALIER_SWEEP_SECONDS": "0.5"}
    with serving(home, **settings) as running:
        assert running.key is not None
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"ESPALIER_URL": running.url, "ESPALIER_API_KEY": running.key, "PATH": path, "OMP_NUM_THREADS": "1"}
        yield Shell(folder, {**os.environ, **own})


def test_every_block_of_the_users_page_runs(shell: Shell) -> None:
    assert {language for language, _, _ in BLOCKS} == {"sh", "python"}
    assert {reason for _, _, reason in BLOCKS if reason} == NOT_RUN
    for language, code, reason in BLOCKS:
        if reason is None:
            shell.run(language, code)
    assert (shell.folder / "smaller/checkpoint/config.json").is_file()
    assert json.loads((shell.folder / "report.json").read_text())["sparsity"]["all"] > 0


@pytest.mark.parametrize(("budget", "fails_at"), [("100", None), ("-0.9", "Wait, and hold the result against the budget")])
def test_the_workflow_gates_on_a_budget(shell: Shell, tmp_path: Path, budget: str, fails_at: str | None) -> None:
    workflow = yaml.safe_load((DOCS / "github-actions.yaml").read_text())
    (job,) = workflow["jobs"].values()
    given = {
        "vars.ESPALIER_URL": shell.environment["ESPALIER_URL"],
        "secrets.ESPALIER_API_KEY": shell.environment["ESPALIER_API_KEY"],
        "vars.ESPALIER_PACKAGE": "espalier",  # which is there
        "inputs.model": MODEL,
        "inputs.sparsity": workflow[True]["workflow_dispatch"]["inputs"]["sparsity"]["default"],
        "inputs.budget": budget,
        "github.run_id": "1234",  # of both runs, so the second finds the job of the first
    }
    files = {name: str(tmp_path / name) for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
    own = {name: re.fullmatch(r"\$\{\{ (.+) \}\}", value)[1] for name, value in job["env"].items()}  # type: ignore[index]
    environment = shell.environment | files | {name: given[value] for name, value in own.items()}
    for step in job["steps"]:
        if "run" not in step:
            continue
        assert "${{" not in step["run"]
        ran = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        if step["name"] == fails_at:
            assert ran.returncode == 4, ran.stderr
            assert "not met" in ran.stdout
            return
        assert ran.returncode == 0, f"{step['name']}\n{ran.stdout}\n{ran.stderr}"
        told = Path(files["GITHUB_ENV"])
        environment |= dict(line.split("=", 1) for line in told.read_text().splitlines()) if told.exists() else {}
    assert fails_at is None
    assert "perplexity" in Path(files["GITHUB_STEP_SUMMARY"]).read_text()
    assert (tmp_path / "pruned/checkpoint/config.json").is_file()


def test_a_step_that_is_run_again_finds_its_job(shell: Shell) -> None:
    with Client(shell.environment["ESPALIER_URL"], shell.environment["ESPALIER_API_KEY"]) as client:
        jobs = [client.submit(MODEL, "cfsp", 0.2, evaluation=None, idempotency_key="build-1")["id"] for _ in range(2)]
        assert jobs[0] == jobs[1]
        client.cancel(jobs[0])
