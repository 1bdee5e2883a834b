"""Whatever is sent, the answer is a problem that says what was wrong and where: never a 500, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.app.conftest import RECIPE, Api
from tests.models import make_checkpoint

FIELDS = {"type", "title", "status", "detail", "code", "instance", "request_id"}


def check_problem(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """Every problem has these fields, and they agree with the response."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem.keys() - {"errors", "hint"} == FIELDS
    assert problem["status"] == status
    assert problem["type"] == f"urn:espalier:problem:{problem['code']}"
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    assert problem["instance"] == answer.request.url.path
    assert problem["title"]
    assert problem["detail"]
    assert problem.get("hint") != ""
    return problem


def refuse(api: Api, body: Any, status: int = 422) -> dict[str, Any]:
    problem = check_problem(api.post("/v1/jobs", json=body), status)
    assert api.get("/v1/jobs").json()["items"] == []
    return problem


def pointers(problem: dict[str, Any]) -> list[str]:
    return [error["pointer"] for error in problem["errors"]]


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"method": "prune-all"}, "/method", "'prune-all' is not one of 'magnitude', 'wanda', 'sparsegpt', 'cfsp'"),
        ({"method": {"mode": "code"}}, "/method", "name"),
        ({"method": 5}, "/method", ""),
        ({"method": None}, "/method", ""),
        ({"method": {"name": "cfsp", "mode": "slow"}}, "/method/mode", "'paper' or 'code'"),
        ({"method": {"name": "wanda", "mode": "code"}}, "/method/mode", "no field 'mode'"),
        ({"method": {"name": "cfsp", "multiple_of": 0}}, "/method/multiple_of", "greater than or equal to 1"),
        ({"sparsity": 0}, "/sparsity", "greater than 0"),
        ({"sparsity": 1}, "/sparsity", "less than 1"),
        ({"sparsity": 1.5}, "/sparsity", "less than 1"),
        ({"sparsity": -0.1}, "/sparsity", "greater than 0"),
        ({"sparsity": True}, "/sparsity", "must be a number"),
        ({"sparsity": None}, "/sparsity", ""),
        ({"sparsity": []}, "/sparsity", ""),
        ({"sparsity": "half"}, "/sparsity", "'half' is not a sparsity"),
        ({"sparsity": {"fraction": 2}}, "/sparsity/fraction", "less than 1"),
        ({"sparsity": {"of": "ffn"}}, "/sparsity/fraction", "missing"),
        ({"sparsity": {"fraction": 0.5, "of": "heads"}}, "/sparsity/of", "'ffn'"),
        ({"sparsity": {"fraction": {"fraction": 1}}}, "/sparsity/fraction", "valid number"),
        ({"sparsity": {"n": 2}}, "/sparsity/m", "missing"),
        ({"method": "wanda", "sparsity": "4:4"}, "/sparsity", "removes nothing"),
        ({"sparsity": 10**400}, "/sparsity", ""),
        ({"model": None}, "/model", "valid string"),
        ({"model": 3}, "/model", "valid string"),
        ({"model": ""}, "/model", "at least 1"),
        ({"model": "a" * 2000}, "/model", "at most 1024"),
        ({"model": ["a/b"]}, "/model", "valid string"),
        ({"speed": 1}, "/speed", "no field 'speed'"),
        ({"a/b~c": 1}, "/a~1b~0c", "no field"),
        ({"calibration": {"samples": "many"}}, "/calibration/samples", "valid integer"),
        ({"calibration": {"samples": 0}}, "/calibration/samples", ""),
        ({"calibration": {"samples": 10**30}}, "/calibration/samples", ""),
        ({"calibration": {"sample": 1}}, "/calibration/sample", "no field 'sample'"),
        ({"calibration": "c4"}, "/calibration", ""),
        ({"evaluation": {"windows": 1.5}}, "/evaluation/windows", ""),
        ({"output": {"layout": "tall"}}, "/output/layout", "'uniform' or 'per_layer'"),
        ({"limits": {"max_attempts": 21}}, "/limits/max_attempts", ""),
    ],
)
def test_the_pointer_shows_the_place(api: Api, changes: dict[str, Any], pointer: str, words: str) -> None:
    problem = refuse(api, RECIPE | changes)
    assert problem["code"] == "invalid_request"
    assert pointer in pointers(problem)
    assert words in next(error["message"] for error in problem["errors"] if error["pointer"] == pointer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": "2:4"}, "give a fraction"),
        ({"method": "wanda", "output": {"layout": "per_layer"}}, "leave output.layout out"),
        ({"output": {"padded": True}}, "set output.layout"),
    ],
)
def test_fields_that_contradict_each_other(api: Api, changes: dict[str, Any], words: str) -> None:
    problem = refuse(api, RECIPE | changes)
    assert pointers(problem) == [""]
    assert words in problem["detail"]


@pytest.mark.parametrize("field", ["model", "method", "sparsity"])
def test_a_missing_field(api: Api, field: str) -> None:
    assert pointers(refuse(api, {name: value for name, value in RECIPE.items() if name != field})) == [f"/{field}"]


def test_every_fault_is_told_at_once(api: Api) -> None:
    problem = refuse(api, {"model": 3, "method": "x", "sparsity": 2, "y": 1})
    assert sorted(pointers(problem)) == ["/method", "/model", "/sparsity", "/y"]


@pytest.mark.parametrize("body", [None, [], "text", 5, True])
def test_a_body_that_is_no_object(api: Api, body: Any) -> None:
    assert pointers(refuse(api, body)) == [""]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"model": "\xff", "method": "cfsp", "sparsity": 0.3}', 400),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": NaN}', 422),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": Infinity}', 422),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": -Infinity}', 422),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": 1e999}', 422),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": {"fraction": NaN}}', 422),
        (b'{"model": "a/b", "method": {"name": "cfsp", "allocation_strength": NaN}, "sparsity": 0.3}', 422),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": ' + b"9" * 10_000 + b"}", 400),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": 0.3, "calibration": {"seed": ' + b"9" * 4000 + b"}}", 422),
        (b'{"model": "\\ud800", "method": "cfsp", "sparsity": 0.3}', 422),
        (b'{"model": "a/b", "method": "\\ud800", "sparsity": 0.3}', 422),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": 0.3, "\\ud800": 1}', 422),
        (b'{"model": "a\\u0000b", "method": "cfsp", "sparsity": 0.3}', 422),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": 0.3, "calibration": {"source": "a\\u0000b"}}', 422),
        (b"[" * 100_000, 400),
        (b'{"model": "a/b", "method": "cfsp", "sparsity": 0.3, "x": "' + b"x" * 1024 * 1024 + b'"}', 413),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else str(value),
)
def test_a_body_that_is_hostile(api: Api, body: bytes, status: int) -> None:
    answer = api.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    check_problem(answer, status)
    assert len(answer.content) < 5000


def test_a_body_without_a_length_is_limited_too(api: Api) -> None:
    answer = api.post("/v1/jobs", content=(b" " * 65536 for _ in range(20)), headers={"Content-Type": "application/json"})
    assert check_problem(answer, 413)["code"] == "body_too_large"


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_that_is_not_declared_as_json(api: Api, media_type: str) -> None:
    answer = api.post("/v1/jobs", content=json.dumps(RECIPE), headers={"Content-Type": media_type})
    assert check_problem(answer, 415)["code"] == "not_json"


@pytest.mark.parametrize(
    "model",
    [
        "../secret",
        "a/../../b",
        "..",
        ".",
        "/",
        "/etc",
        "/etc/passwd",
        "a/b/c",
        "-a/b",
        ".a/b",
        "a--b/c",
        "a..b/c",
        "a/b ",
        "a\nb",
        "ä/b",
        "a/" + "b" * 97,
        "~/x",
        "C:\\x",
        "a/" * 400,
    ],
)
def test_a_model_id_that_is_none(api: Api, model: str) -> None:
    problem = refuse(api, RECIPE | {"model": model})
    assert problem["code"] in ("model_id_invalid", "model_outside_roots")
    assert pointers(problem) == ["/model"]
    assert problem["hint"]


# -------------------------------------------------------------- local models


@pytest.fixture(scope="session")
def whole(roots: Path) -> Path:
    return make_checkpoint(roots / "models" / "whole", "llama", layers=2)


@pytest.fixture
def broken(whole: Path, roots: Path) -> Iterator[Path]:
    folder = Path(shutil.copytree(whole, roots / "models" / "broken"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_local_model_is_named_by_its_path(api: Api, whole: Path) -> None:
    api.submit(model=str(whole))
    api.submit(model="whole")
    api.submit(model="whole", method="wanda", sparsity="2:4")


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("breaks", "code"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle_weights"),
        (edit_config(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
        (edit_config(model_type="mamba"), "unsupported_model_type"),
        (truncate, "checkpoint_truncated"),
        (drop("tokenizer.json"), "tokenizer_missing"),
        (drop("model.safetensors"), "weights_missing"),
        (drop("config.json"), "config_missing"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{"), "config_invalid"),
        (shutil.rmtree, "model_not_found"),
    ],
)
def test_a_folder_that_cannot_be_pruned(api: Api, broken: Path, breaks: Callable[[Path], object], code: str) -> None:
    breaks(broken)
    problem = refuse(api, RECIPE | {"model": str(broken)})
    assert problem["code"] == code
    assert pointers(problem) == ["/model"]
    assert problem["hint"]
    assert str(broken.parent) not in json.dumps({**problem, "instance": ""})


def test_a_pattern_that_does_not_fit(api: Api, whole: Path) -> None:
    problem = refuse(api, RECIPE | {"model": str(whole), "method": "wanda", "sparsity": "3:7"})
    assert (problem["code"], pointers(problem)) == ("pattern_does_not_fit", ["/sparsity"])


def test_a_link_that_leads_out(api: Api, whole: Path, roots: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shutil.copytree(whole, tmp_path / "secret")
    links = {"out": tmp_path / "secret", "loop": roots / "models" / "loop", "up": roots / "models" / ".."}
    for name, target in links.items():
        link = roots / "models" / name
        link.symlink_to(target)
        request.addfinalizer(link.unlink)
    for model in ("out", str(roots / "models" / "out"), "up", str(tmp_path / "secret"), str(roots / "models")):
        assert refuse(api, RECIPE | {"model": model})["code"] == "model_outside_roots", model
    assert refuse(api, RECIPE | {"model": str(roots / "models" / "loop")})["code"] in ("model_outside_roots", "model_not_found")


@pytest.mark.parametrize("field", ["calibration", "evaluation"])
def test_texts(api: Api, roots: Path, field: str) -> None:
    text = roots / "texts" / "words.txt"
    text.write_text("some words")
    for source in ("c4", "wiki", "words.txt", str(text)):
        api.submit(**{field: {"source": source}})
    other = api.other_tenant()
    for source, code in {
        "/etc/passwd": "text_outside_roots",
        "../models/whole/config.json": "text_outside_roots",
        str(roots / "texts" / ".." / "models"): "text_outside_roots",
        str(roots / "texts"): "text_outside_roots",
        "none.txt": "text_not_found",
        str(roots / "texts" / "none.txt"): "text_not_found",
        "wikitext": "text_not_found",
    }.items():
        problem = refuse(other, RECIPE | {field: {"source": source}})
        assert (problem["code"], pointers(problem)) == (code, [f"/{field}/source"])


# ------------------------------------------------------------- everything else


def test_paths_and_methods_that_are_not_there(api: Api) -> None:
    check_problem(api.get("/nope"), 404)
    check_problem(api.get("/v2/jobs"), 404)
    answer = api.request("DELETE", "/v1/jobs")
    problem = check_problem(answer, 405)
    assert problem["code"] == "method_not_allowed"
    assert answer.headers["Allow"] in problem["hint"]
    assert check_problem(api.request("POST", "/livez"), 405)["hint"]


@pytest.mark.parametrize("job_id", ["job_0", "x", "%00", "job_%00", "a" * 5000, "%F0%9F%8C%B3", "..", "%2e%2e", "'; DROP TABLE jobs; --"])
def test_a_job_that_is_not_there(api: Api, job_id: str) -> None:
    for part in ("", "/events", "/report", "/artifacts", "/artifacts/report.json", "/checkpoint"):
        check_problem(api.get(f"/v1/jobs/{job_id}{part}"), 404)
    check_problem(api.post(f"/v1/jobs/{job_id}/cancel"), 404)


def test_a_request_id_is_taken_over_only_if_it_is_harmless(api: Api) -> None:
    assert api.get("/livez", headers={"X-Request-ID": "mine-1.2_3"}).headers["X-Request-ID"] == "mine-1.2_3"
    for bad in ("a b", "x" * 65, "<script>", ""):
        assert api.get("/livez", headers={"X-Request-ID": bad}).headers["X-Request-ID"] not in (bad, "")
