"""What all parts of a recipe are made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def expand_name(value: Any) -> Any:
    """The long form of a name that stands for an object with defaults."""
    return {"name": value} if isinstance(value, str) else value
