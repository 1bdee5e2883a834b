"""The description that clients are generated from is whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI

from app.main import create_app

Schema = dict[str, Any]


@pytest.fixture(scope="module")
def schema() -> Schema:
    return create_app().openapi()


def operations(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_it_is_valid(schema: Schema) -> None:
    assert schema["openapi"].startswith("3.1")
    OpenAPI.model_validate(schema)
    for reference in references(schema):
        kind, name = reference.removeprefix("#/components/").split("/")
        assert name in schema["components"][kind]
    names = [operation["operationId"] for _, operation in operations(schema)]
    assert len(names) == len(set(names))
    assert "submit_job" in names


def test_every_operation_declares_its_errors(schema: Schema) -> None:
    for name, operation in operations(schema):
        errors = {status: response for status, response in operation["responses"].items() if status >= "400"}
        expected = {"500", "503"} | ({"401", "403"} if "/v1/" in name else set()) | ({"404", "422"} if "{job_id}" in name else set())
        assert expected <= set(errors), name
        for response in errors.values():
            assert response["content"] == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}, name
        assert operation["summary"], name
        assert operation["description"], name
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_every_operation_but_health_needs_a_key(schema: Schema) -> None:
    for name, operation in operations(schema):
        assert bool(operation.get("security")) == ("/v1/" in name)


def test_every_field_and_parameter_is_described(schema: Schema) -> None:
    for name, component in schema["components"]["schemas"].items():
        assert component.get("description"), name
        for field, described in component.get("properties", {}).items():
            assert described.get("description") or "const" in described, f"{name}.{field}"
    for name, operation in operations(schema):
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), f"{name} {parameter['name']}"


def test_a_recipe_has_one_schema_for_in_and_out(schema: Schema) -> None:
    schemas = schema["components"]["schemas"]
    assert schemas["Submission"]["required"] == ["model", "method", "sparsity"]
    assert schemas["Submission"]["additionalProperties"] is False
    assert schemas["Job"]["properties"]["recipe"]["$ref"] == "#/components/schemas/Recipe"
    assert set(schemas["CFSP"]["properties"]["mode"]["enum"]) == {"combined", "paper", "code"}
