"""The contract of a job: what is accepted and expanded, and what is refused with the path to the field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from app.recipe import CFSP, METHODS, MODEL_ID, Coarse, Fraction, Magnitude, MethodConfig, MethodName, Owl, Pattern, Recipe, Structured, Uniform, Wanda, ZScore


def recipe(**values: Any) -> Recipe:
    return Recipe.model_validate({"model": "owner/name", "method": "cfsp", "sparsity": 0.3} | values)


def faults(**values: Any) -> list[tuple[str, str]]:
    """Paths and messages of what is refused."""
    with pytest.raises(ValidationError) as refused:
        recipe(**values)
    return [("/".join(str(part) for part in fault["loc"]), fault["msg"]) for fault in refused.value.errors()]


def test_three_fields_suffice() -> None:
    minimal = recipe()
    assert minimal.method == CFSP()
    assert minimal.sparsity == Fraction(fraction=0.3, of="method")
    assert minimal.calibration.model_dump() == {"source": "c4", "samples": 32, "sequence_length": 512, "seed": 0}
    assert minimal.evaluation is not None
    assert minimal.evaluation.model_dump() == {"source": "wiki", "windows": 24, "sequence_length": 512, "speed": True}
    assert minimal.output.model_dump() == {"layout": "uniform", "padded": False, "dtype": "source"}
    assert minimal.limits.max_attempts == 3


def test_calibration_and_evaluation_texts_differ_by_default() -> None:
    minimal = recipe()
    assert minimal.evaluation is not None
    assert minimal.calibration.source != minimal.evaluation.source


def test_the_model_may_be_left_out_and_the_evaluation_be_null() -> None:
    bare = Recipe.model_validate({"method": "magnitude", "sparsity": 0.5, "evaluation": None})
    assert bare.model is None
    assert bare.evaluation is None


@pytest.mark.parametrize(
    ("short", "long"), [("magnitude", Magnitude()), ("wanda", Wanda()), ("cfsp", CFSP()), ({"name": "cfsp", "mode": "code"}, CFSP(mode="code"))]
)
def test_methods_by_name_or_object(short: Any, long: BaseModel) -> None:
    assert recipe(method=short).method == long


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (0.3, Fraction(fraction=0.3)),
        (1e-9, Fraction(fraction=1e-9)),
        ({"fraction": 0.3, "of": "all"}, Fraction(fraction=0.3, of="all")),
        ("2:4", Pattern(n=2, m=4)),
        ("15:16", Pattern(n=15, m=16)),
        ({"n": 4, "m": 8}, Pattern(n=4, m=8)),
    ],
)
def test_sparsities_in_every_form(short: Any, long: BaseModel) -> None:
    assert recipe(method="wanda", sparsity=short).sparsity == long


def test_a_recipe_survives_json() -> None:
    for written in (
        recipe(),
        recipe(method={"name": "wanda", "variant": True}, sparsity="2:4"),
        recipe(evaluation=None, output={"layout": "per_layer", "padded": True}),
    ):
        assert Recipe.model_validate_json(written.model_dump_json()) == written


@pytest.mark.parametrize(
    "sparsity",
    [
        0,
        1,
        1.5,
        -0.1,
        float("nan"),
        float("inf"),
        float("-inf"),
        True,
        False,
        None,
        [],
        {},
        "",
        "half",
        "0.5",
        "2:4:8",
        "a:b",
        "2:",
        " 2:4",
        "-2:4",
        "200:400",
        "4:4",
        "8:4",
        "0:4",
        "1:1",
        "1:65",
        {"n": 2},
        {"m": 4},
        {"n": 2, "m": 4, "fraction": 0.5},
        {"n": 2.5, "m": 4},
        {"fraction": "x"},
        {"fraction": 0.5, "of": "heads"},
        {"fraction": 0.5, "off": "all"},
        {"fraction": None},
    ],
)
def test_bad_sparsities_are_refused_at_their_field(sparsity: Any) -> None:
    refused = faults(method="wanda", sparsity=sparsity)
    assert all(path.startswith("sparsity") for path, _ in refused)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1", "0", "1.5", '"NaN"', "true", "null"])
def test_bad_sparsities_in_json_text_are_refused(number: str) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate_json(f'{{"method": "cfsp", "sparsity": {number}}}')


@pytest.mark.parametrize("method", ["wandaa", "", "Wanda", None, 3, [], {}, {"name": "obc"}, {"name": None}, {"mode": "code"}, ["cfsp"], True])
def test_unknown_methods_are_refused_at_their_field(method: Any) -> None:
    refused = faults(method=method)
    assert all(path.split("/")[0] == "method" for path, _ in refused)


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    ((_, message),) = faults(method="wandaa")
    assert all(name in message for name in METHODS)


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"colour": "red"}, "colour"),
        ({"method": {"name": "wanda", "mode": "code"}}, "method/wanda/mode"),
        ({"method": {"name": "cfsp", "mode": "papers"}}, "method/cfsp/mode"),
        ({"method": {"name": "cfsp", "units": "heads"}}, "method/cfsp/units"),
        ({"method": {"name": "sparsegpt", "damping": 0}}, "method/sparsegpt/damping"),
        ({"allocation": {"name": "coarse", "max_layer_share": 0}}, "allocation/coarse/max_layer_share"),
        ({"allocation": {"name": "coarse", "max_layer_share": 1.1}}, "allocation/coarse/max_layer_share"),
        ({"allocation": {"name": "given", "sparsities": [0.2, 1.0]}}, "allocation/given/sparsities/1"),
        ({"allocation": {"name": "owl", "threshold": 1}}, "allocation/owl/threshold"),
        ({"restoration": {"name": "least_squares", "ridge": 0}}, "restoration/least_squares/ridge"),
        ({"restoration": {"name": "swaps", "rounds": 0}}, "restoration/swaps/rounds"),
        ({"method": {"name": "cfsp", "multiple_of": 0}}, "method/cfsp/multiple_of"),
        ({"allocation": {"name": "coarse", "strength": float("nan")}}, "allocation/coarse/strength"),
        ({"sparsity": {"target_parameters": 0}}, "sparsity/Budget/target_parameters"),
        ({"sparsity": {"max_perplexity_increase": 0}}, "sparsity/Budget/max_perplexity_increase"),
        ({"calibration": {"samples": 0}}, "calibration/samples"),
        ({"calibration": {"sequence_length": 7}}, "calibration/sequence_length"),
        ({"calibration": {"seed": -1}}, "calibration/seed"),
        ({"calibration": {"source": ""}}, "calibration/source"),
        ({"calibration": {"tokens": 3}}, "calibration/tokens"),
        ({"calibration": None}, "calibration"),
        ({"evaluation": {"windows": 0}}, "evaluation/windows"),
        ({"evaluation": {"speed": "often"}}, "evaluation/speed"),
        ({"output": {"layout": "diagonal"}}, "output/layout"),
        ({"output": {"dtype": "int4"}}, "output/dtype"),
        ({"limits": {"max_attempts": 0}}, "limits/max_attempts"),
        ({"limits": {"max_attempts": 21}}, "limits/max_attempts"),
        ({"limits": {"max_runtime": 0}}, "limits/max_runtime"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"model": "x" * 1025}, "model"),
    ],
)
def test_bad_fields_are_refused_with_their_path(values: dict[str, Any], path: str) -> None:
    assert [found for found, _ in faults(**values)] == [path]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "cfsp", "sparsity": "2:4"}, "the pattern 2:4 is not possible"),
        ({"method": "wanda", "output": {"layout": "per_layer"}}, "keeps all shapes"),
        ({"output": {"padded": True}}, "set output.layout to 'per_layer'"),
        ({"method": "depth", "output": {"layout": "per_layer"}}, "all layers stay alike"),
        ({"method": "depth", "allocation": "owl"}, "leaves nothing to allot"),
        ({"method": "cfsp", "allocation": "owl"}, "set output.layout to 'per_layer'"),
        ({"method": "wanda", "sparsity": "2:4", "allocation": "owl"}, "the same in every layer"),
        ({"method": "wanda", "sparsity": 0.5, "allocation": {"name": "given", "sparsities": [0.5, 0.7]}}, "mean of allocation.sparsities is 0.6"),
        ({"method": "wanda", "sparsity": {"fraction": 0.5, "of": "all"}, "allocation": {"name": "given", "sparsities": [0.5]}}, "plain number"),
        ({"method": "wanda", "sparsity": {"target_bytes": 1000}}, "no budget bounds its result"),
        ({"sparsity": {"max_perplexity_increase": 0.1}, "evaluation": None}, "leave evaluation in"),
        ({"sparsity": {"target_bytes": 1, "target_parameters": 1}}, "a budget is one bound, not 2"),
        ({"method": "cfsp", "restoration": "swaps"}, "possible: least_squares"),
        ({"method": "sparsegpt", "restoration": "swaps"}, "possible: none"),
    ],
)
def test_combinations_that_can_not_be_are_refused(values: dict[str, Any], words: str) -> None:
    ((_, message),) = faults(**values)
    assert words in message


def test_every_wrong_field_is_told_at_once() -> None:
    assert len(faults(method="none", sparsity=2, colour="red", limits={"max_attempts": 0})) == 4


def test_a_recipe_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().sparsity = Fraction(fraction=0.9)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["owner/name", "name", "HuggingFaceTB/SmolLM2-135M", "a.b-c_d/e.f"])
def test_hub_ids(name: str) -> None:
    assert MODEL_ID.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["", "../x", "a/../b", "/abs", "a/b/c", "a//b", ".hidden", "a/.b", "a b", "a/b\n", "-a", "a" * 97, "https://host/a", "a\\b", "a@b"]
)
def test_no_hub_ids(name: str) -> None:
    assert not MODEL_ID.fullmatch(name)


# ----------------------------------------------------------- the tables agree


def test_methods_agree_with_the_union_and_with_the_names() -> None:
    union = get_args(get_args(MethodConfig)[0])
    assert {config for config, _ in METHODS.values()} == set(union)
    assert tuple(METHODS) == get_args(MethodName)
    for name, (config, _) in METHODS.items():
        assert config().model_dump()["name"] == name


def test_a_method_calibrates_or_says_that_it_does_not() -> None:
    for config, facts in METHODS.values():
        assert facts.calibrates or "no calibration" in (config.__doc__ or "")
        assert not (facts.structured and facts.patterns)
        assert "swaps" not in facts.restorations or not facts.structured
        assert "least_squares" not in facts.restorations or issubclass(config, Structured)


@pytest.mark.parametrize(
    ("method", "denominator"),
    [
        ("wanda", "decoder"),
        ("cfsp", "ffn"),
        ({"name": "cfsp", "units": "attention"}, "attention"),
        ("flap", "decoder"),
        ("depth", "blocks"),
        ("experts", "experts"),
    ],
)
def test_a_plain_sparsity_is_a_fraction_of_what_the_method_removes_from(method: Any, denominator: str) -> None:
    assert recipe(method=method).denominator == denominator


def test_layers_share_the_sparsity_as_published_where_the_layout_lets_them() -> None:
    assert recipe(method="cfsp").allots == Uniform()
    assert recipe(method="cfsp", output={"layout": "per_layer"}).allots == Coarse()
    assert recipe(method="flap", output={"layout": "per_layer"}).allots == ZScore()
    assert recipe(method="flap", output={"layout": "per_layer"}, allocation="owl").allots == Owl()
    assert recipe(method="wanda", allocation="coarse").allots == Coarse()
    assert recipe(method="wanda").allots == recipe(method="depth").allots == Uniform()


def every_object(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for part in schema for found in every_object(part)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" and "properties" in schema else []
    return own + [found for part in schema.values() for found in every_object(part)]


def test_the_schema_documents_every_parameter() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["required"]) == {"method", "sparsity"}
    objects = every_object(schema)
    assert len(objects) >= 1 + 2 + len(METHODS) + 4
    for described in objects:
        assert described["additionalProperties"] is False
        for name, field in described["properties"].items():
            fixed = name == "name" or "$ref" in field or any("$ref" in option for option in field.get("anyOf", []))
            assert fixed or field.get("description"), f"{described['title']}.{name} has no description"


def test_the_schema_admits_the_short_forms() -> None:
    properties = Recipe.model_json_schema()["properties"]
    assert set(METHODS) in [set(option.get("enum", ())) for option in properties["method"]["anyOf"]]
    assert {"number", "string"} <= {option.get("type") for option in properties["sparsity"]["anyOf"]}


def test_importing_the_contract_loads_no_torch() -> None:
    code = "import sys, app.recipe, app.report, app.source; print([name for name in ('torch', 'transformers', 'safetensors', 'numpy') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(ended.stdout.replace("'", '"')) == []
