"""schemathesis against a real process on a migrated Postgres, without a worker: `python -m tests.security.soak --examples 60 --seed 1`.

Beside what it makes itself it is told of things that it could not make: a job that has succeeded, one that failed, an upload, a webhook with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.app.calls import NETWORKS, prepare
from tests.app.conftest import serving as in_process
from tests.app.serving import serving
from tests.servers import fresh_database, postgres

HERE = Path(__file__).parent
RATES = {f"rate_{name}": "" for name in ("read", "write", "read_tenant", "write_tenant", "refused")}
KNOWN = (
    "GET /v1/jobs/{job_id}/artifacts/{path}",
    "PUT /v1/checkpoints/{checkpoint_id}/files/{path}/parts/{number}",
    "POST /v1/jobs/{job_id}/retry",
    "POST /v1/checkpoints/{checkpoint_id}/complete",
    "POST /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay",
)


def soak(postgres_url: str, folder: Path, examples: int, seed: int, phases: str = "examples,coverage,fuzzing,stateful") -> tuple[int, dict[str, Any]]:
    """-> schemathesis' exit status, which is 0 if it found nothing, and its report. examples: cases of each endpoint in each random phase."""
    with fresh_database(postgres_url) as database_url, serving(database_url, folder, **RATES, webhook_networks=json.dumps(NETWORKS)) as server:
        (folder / "models").mkdir(exist_ok=True)
        (folder / "texts").mkdir(exist_ok=True)
        with in_process(folder, database_url, folder, webhook_networks=NETWORKS) as api:
            values: dict[str, list[str | int]] = {}
            for endpoint in KNOWN:
                template, path = endpoint.split()[1].split("/"), prepare(api, endpoint, folder).path.split("/")
                for name, value in zip(template, path, strict=False):
                    if name.startswith("{"):
                        values.setdefault(name.strip("{}"), []).append(int(value) if value.isdecimal() else value)
        kept = ["key_" + api.key.split("_")[1], *(str(known) for name in values if name.endswith("_id") for known in values[name])]
        config = (HERE / "schemathesis.toml").read_text() + _dictionaries(values)
        (folder / "schemathesis.toml").write_text(config)
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml"), "run"),
            f"http://127.0.0.1:{server.port}/openapi.json",
            *("--header", f"Authorization: Bearer {api.key}"),
            *("--phases", phases, "--max-examples", str(examples), "--seed", str(seed)),
            *("--report", "json", "--report-json-path", str(folder / "report.json")),
        ]
        environment = {**os.environ, "SOAK_KEPT": " ".join(kept), "SCHEMATHESIS_HOOKS": "tests.security.hooks"}
        status = subprocess.run(command, env=environment, check=False).returncode
        return status, json.loads((folder / "report.json").read_text())


def _dictionaries(values: Mapping[str, list[str | int]]) -> str:
    """The part of the configuration by which half of the ids are those of things that exist."""
    lines = [f"[dictionaries.{name}]\nvalues = {json.dumps(ids)}\n" for name, ids in values.items()]
    lines += ["[parameters]\n", *(f'"path.{name}" = {{ dictionary = "{name}", probability = 0.5 }}\n' for name in values)]
    return "\n" + "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=60, help="cases of each endpoint in each random phase")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with postgres() as (url, _), TemporaryDirectory() as folder:
        status, _ = soak(url, Path(folder), given.examples, given.seed)
    return status


if __name__ == "__main__":
    sys.exit(main())
