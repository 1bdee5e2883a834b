"""What requests are made of: nothing that is unknown, nothing that is guessed."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, model_validator

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


class Strict(BaseModel):
    """Takes 32 for a number and not "32". A field that is a tuple sets `strict=False`: JSON has lists."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers_are_integers(cls, values: Any) -> Any:
        """As JSON schema has it, 32.0 is an integer."""
        if not isinstance(values, dict):
            return values
        return {name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in values.items()}


def expand_name(value: Any) -> Any:
    """The long form of a name that stands for an object with defaults."""
    return {"name": value} if isinstance(value, str) else value


def _written_as_time(value: Any) -> Any:
    if not RFC_3339.fullmatch(str(value)):
        raise ValueError("it must be a time as of RFC 3339, with its zone")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("it must be a time that exists in UTC") from None


Time = Annotated[AwareDatetime, BeforeValidator(_written_as_time), AfterValidator(_in_utc)]
