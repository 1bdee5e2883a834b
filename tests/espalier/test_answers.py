"""The client's types of answers beside the service's own description of them."""

from __future__ import annotations

from typing import Any, get_type_hints, is_typeddict

import pytest

from app.main import create_app
from espalier import answers

SCHEMAS: dict[str, Any] = create_app().openapi()["components"]["schemas"]
OPAQUE = {"Recipe"}  # what was sent comes back, with defaults
TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}
ANSWERS = {name: kind for name, kind in vars(answers).items() if is_typeddict(kind)}


def type_of(schema: dict[str, Any]) -> Any:
    """The type that a client has for what a schema describes."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return dict[str, Any] if name in OPAQUE else ANSWERS.get(name) or type_of(SCHEMAS[name])
    if "anyOf" in schema:
        first, *others = (type_of(one) for one in schema["anyOf"])
        for other in others:
            first = first | other
        return first
    if schema.get("type") == "array":
        return list[type_of(schema["items"])]  # type: ignore[misc]
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return dict[str, type_of(values) if isinstance(values, dict) else Any]  # type: ignore[misc]
    return TYPES[schema["type"]]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_has_the_fields_that_the_service_describes(name: str) -> None:
    described = {field: type_of(schema) for field, schema in SCHEMAS[name]["properties"].items()}
    assert get_type_hints(ANSWERS[name]) == described


def test_every_answer_has_a_type() -> None:
    """Pages and lists are unwrapped by the client, parts of an upload and what health tells are not its business."""
    known = {"Problem", "ProblemItem", "Health", "Readiness", "Check", "Part", *OPAQUE}
    seen: set[str] = set()

    def visit(schema: Any) -> None:
        if isinstance(schema, dict):
            name = str(schema.get("$ref", "")).rpartition("/")[2]
            if name and name not in seen | known:
                seen.add(name)
                visit(SCHEMAS[name])
            for value in schema.values():
                visit(value)
        elif isinstance(schema, list):
            for value in schema:
                visit(value)

    for path in create_app().openapi()["paths"].values():
        for operation in path.values():
            visit([response.get("content") for response in operation["responses"].values()])
    objects = {name for name in seen if SCHEMAS[name].get("type") == "object" and not set(SCHEMAS[name]["properties"]) <= {"items", "next"}}
    assert objects - ANSWERS.keys() == set()
