"""`/v1/methods` and `/v1/recoveries`: what can be done to a model."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.auth import JobReader
from app.problems import declared
from app.recipe import METHODS, MethodFacts, MethodName
from app.recovery import RECOVERY_PRESETS, RecoveryConfig, Training

router = APIRouter(prefix="/v1", tags=["methods"], responses=declared(401, 403))


class Method(MethodFacts):
    """A pruning method."""

    name: MethodName = Field(description="What to give as `method`.")
    summary: str = Field(description="What it does, in a sentence.")
    parameters: dict[str, Any] = Field(description='Its own parameters as a JSON schema, to be given as `{"name": …, …}`.')


class MethodList(BaseModel):
    """All pruning methods."""

    items: list[Method] = Field(description="The methods.")


class Recovery(BaseModel):
    """A way to train back what pruning lost."""

    name: str = Field(description="What to give as `recovery`.")
    summary: str = Field(description="What it does, in a sentence.")
    parameters: dict[str, Any] = Field(description='Its parameters as a JSON schema, to be given as `{"name": …, …}`.')
    presets: dict[str, dict[str, Any]] = Field(description="Whole settings that can be given as `recovery` by their own names.")


class RecoveryList(BaseModel):
    """All recoveries."""

    items: list[Recovery] = Field(description="The recoveries.")


@router.get("/methods")
def list_methods(caller: JobReader) -> MethodList:
    """The pruning methods with their papers, denominators and parameters."""
    return METHOD_LIST


@router.get("/recoveries")
def list_recoveries(caller: JobReader) -> RecoveryList:
    """What can follow pruning, with its parameters."""
    return RECOVERY_LIST


def _method(name: MethodName) -> Method:
    parameters, facts = METHODS[name]
    return Method(name=name, summary=_summary(parameters), parameters=parameters.model_json_schema(), **facts.model_dump())


def _recovery(kind: type[Training]) -> Recovery:
    presets = {name: preset.model_dump() for name, preset in RECOVERY_PRESETS.items() if isinstance(preset, kind)}
    return Recovery(name=kind.model_fields["name"].default, summary=_summary(kind), parameters=kind.model_json_schema(), presets=presets)


def _summary(kind: type[BaseModel]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]


METHOD_LIST = MethodList(items=[_method(name) for name in get_args(MethodName)])
RECOVERY_LIST = RecoveryList(items=[_recovery(kind) for kind in get_args(get_args(RecoveryConfig)[0])])
