"""`/v1/methods`: what can be done to a model."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.auth import JobReader
from app.problems import declared
from app.recipe import METHODS, MethodFacts, MethodName

router = APIRouter(prefix="/v1/methods", tags=["methods"], responses=declared(401, 403))


class Method(MethodFacts):
    """A pruning method."""

    name: MethodName = Field(description="What to give as `method`.")
    summary: str = Field(description="What it does, in a sentence.")
    parameters: dict[str, Any] = Field(description='Its own parameters as a JSON schema, to be given as `{"name": …, …}`.')


class MethodList(BaseModel):
    """All pruning methods."""

    items: list[Method] = Field(description="The methods.")


@router.get("")
def list_methods(caller: JobReader) -> MethodList:
    """The pruning methods with their papers, denominators and parameters."""
    return METHOD_LIST


def _method(name: MethodName) -> Method:
    parameters, facts = METHODS[name]
    summary = inspect.cleandoc(parameters.__doc__ or "").partition("\n")[0]
    return Method(name=name, summary=summary, parameters=parameters.model_json_schema(), **facts.model_dump())


METHOD_LIST = MethodList(items=[_method(name) for name in get_args(MethodName)])
