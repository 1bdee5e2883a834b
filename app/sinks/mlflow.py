"""MLflow, by its REST API: a run with the recipe as parameters and the report as metrics, and a version of a registered model that says where the checkpoint lies.

The files stay where they are; only the report is sent, where the server takes files itself. A try looks for what earlier ones have made: the run and the version
have the tag `espalier.job_id`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import httpx

from app.settings import get_settings
from app.sinks.reach import look_up
from app.sinks.results import Result, SinkFailed, read
from app.sinks.schemas import Mlflow
from app.storage import Store

JOB = "espalier.job_id"
API = "/api/2.0/mlflow"
FILES = "/api/2.0/mlflow-artifacts/artifacts"
PROXIED = "mlflow-artifacts:"
METRICS_AT_ONCE = 1000  # the API's own limits
PARAMETERS_AT_ONCE = 100
LONGEST_PARAMETER = 6000
TIMEOUT_SECONDS = 30.0
MISSING = "RESOURCE_DOES_NOT_EXIST"
EXISTS = "RESOURCE_ALREADY_EXISTS"


def register(sink: Mlflow, result: Result, store: Store, scratch: Path) -> dict[str, Any]:
    """-> the `experiment_id`, the `run_id`, the run's `url`, and the `version` of the registered model, where one was asked for."""
    with _Server(sink) as server:
        experiment = _experiment(server, sink.experiment)
        run = _run(server, experiment, result)
        run_id = run["info"]["run_id"]
        for batch in _batches(parameters(result.recipe), PARAMETERS_AT_ONCE):
            server.post("/runs/log-batch", {"run_id": run_id, "params": batch})
        for batch in _batches(metrics(result), METRICS_AT_ONCE):
            server.post("/runs/log-batch", {"run_id": run_id, "metrics": batch})
        if run["info"]["artifact_uri"].startswith(PROXIED):
            report = next(file for file in result.files if file.role == "report")
            server.put(f"{FILES}{run['info']['artifact_uri'].removeprefix(PROXIED)}/{report.path}", b"".join(read(store, result, report)))
        server.post("/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": result.finished_ms})
        told = {"experiment_id": experiment, "run_id": run_id, "url": f"{sink.tracking_uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"}
        if sink.registered_model is not None:
            told |= {"registered_model": sink.registered_model, "version": _version(server, sink.registered_model, run["info"], result)}
        return told


# ------------------------------------------------------------- what is registered


def parameters(recipe: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The recipe, `output.layout` and the like; lists stay whole, what is not set stays out."""
    for key, value in _leaves(recipe):
        if value is not None:
            yield {"key": key, "value": (value if isinstance(value, str) else json.dumps(value))[:LONGEST_PARAMETER]}


def metrics(result: Result) -> Iterator[dict[str, Any]]:
    """Every number of the report under its name there, `after.perplexity.value` and the like; those of `layers` have the layer's index as their step.

    All have the moment of the job's end, so that a later try logs the same.
    """
    report = {name: value for name, value in result.report.items() if name not in ("recipe", "layers")}
    steps = [("", 0, report)] + [
        ("layers.", layer["index"], layer | {"sparsity": layer["zeros"] / (layer["weights"] or 1)}) for layer in result.report["layers"]
    ]
    for prefix, step, values in steps:
        for key, value in _leaves(values):
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield {"key": prefix + key, "value": float(value), "timestamp": result.finished_ms, "step": step}


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, part in value.items():
        if isinstance(part, dict):
            yield from _leaves(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


def _experiment(server: _Server, name: str) -> str:
    found = server.get("/experiments/get-by-name", {"experiment_name": name}, unless=MISSING)
    if "experiment" in found:
        return str(found["experiment"]["experiment_id"])
    made = server.post("/experiments/create", {"name": name}, unless=EXISTS)
    return str(made["experiment_id"]) if "experiment_id" in made else _experiment(server, name)  # another one was faster


def _run(server: _Server, experiment: str, result: Result) -> dict[str, Any]:
    found = server.post("/runs/search", {"experiment_ids": [experiment], "filter": f"tags.`{JOB}` = '{result.job_id}'", "max_results": 1})
    if found.get("runs"):
        return cast("dict[str, Any]", found["runs"][0])
    named = {"experiment_id": experiment, "run_name": f"{result.method} {result.model}"[:250], "start_time": result.finished_ms}
    made = server.post("/runs/create", named | {"tags": _tags(result)})
    return cast("dict[str, Any]", made["run"])


def _version(server: _Server, name: str, run: dict[str, Any], result: Result) -> str:
    # A server takes no http(s) URL as a source; where the result has no other, the run stands for it, whose tags name it.
    source = result.url if result.url.startswith("s3://") else run["artifact_uri"]
    server.post("/registered-models/create", {"name": name}, unless=EXISTS)
    found = server.get("/model-versions/search", {"filter": f"run_id = '{run['run_id']}'"})
    for version in found.get("model_versions", []):
        if version["name"] == name:
            return str(version["version"])
    made = server.post("/model-versions/create", {"name": name, "source": source, "run_id": run["run_id"], "tags": _tags(result)})
    return str(made["model_version"]["version"])


def _tags(result: Result) -> list[dict[str, str]]:
    tags = {
        JOB: result.job_id,
        "espalier.model": result.model,
        "espalier.model_fingerprint": result.report["model_fingerprint"],
        "espalier.method": result.method,
        "espalier.result": result.url,
    }
    return [{"key": key, "value": value[:5000]} for key, value in tags.items()]


def _batches(items: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(items, size)):
        yield batch


# ----------------------------------------------------------------------- HTTP


class _Server:
    """The server's address is looked up and checked once, and every request goes there, whatever its name means a moment later; redirects are not followed."""

    def __init__(self, sink: Mlflow) -> None:
        address, found = look_up(sink.tracking_uri, get_settings())
        host = f"[{found[0]}]" if ":" in found[0] else found[0]
        headers = {"Host": address.authority}
        if sink.token is not None:
            headers["Authorization"] = f"Bearer {sink.token.get_secret_value()}"
        signed_in = None if sink.username is None or sink.password is None else (sink.username.get_secret_value(), sink.password.get_secret_value())
        base = f"{address.scheme}://{host}:{address.port}{address.target.rstrip('/')}"
        self._client = httpx.Client(base_url=base, headers=headers, auth=signed_in, timeout=TIMEOUT_SECONDS, trust_env=False)
        self._name = {"sni_hostname": address.host}

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def get(self, path: str, query: dict[str, str], unless: str = "") -> dict[str, Any]:
        return self._answer("GET", API + path, unless, params=query)

    def post(self, path: str, body: dict[str, Any], unless: str = "") -> dict[str, Any]:
        return self._answer("POST", API + path, unless, json=body)

    def put(self, path: str, content: bytes) -> None:
        self._answer("PUT", quote(path), "", content=content)

    def _answer(self, method: str, path: str, unless: str, **options: Any) -> dict[str, Any]:
        """What the server says; SinkFailed for an error, `unless` it is the one of this code, which is an answer, too."""
        try:
            response = self._client.request(method, path, extensions=self._name, **options)
        except httpx.TransportError as error:
            hint = "See that the server runs and can be reached from the service."
            raise SinkFailed("sink_unreachable", "The MLflow server did not answer.", hint, final=False) from error
        try:
            answer = response.json() if response.content else {}
        except ValueError:
            answer = None
        if isinstance(answer, dict) and (response.is_success or (unless and answer.get("error_code") == unless)):
            return answer
        status = response.status_code
        if status in (401, 403):
            raise SinkFailed(
                "sink_denied", f"The MLflow server refused the sign-in ({status}).", "Try the sink again with a token that may write there.", final=True
            )
        final = not (status >= 500 or status in (408, 429))
        hint = "See that tracking_uri is the URL of an MLflow server, and that its version knows the REST API 2.0; its log says more."
        raise SinkFailed("sink_refused", f"The MLflow server answered {status} to {path.rpartition('/')[2]}.", hint, final=final)
