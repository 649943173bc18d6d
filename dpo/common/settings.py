"""Base class and types of settings. Each package defines its settings in its own `settings.py`."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field, GetPydanticSchema
from pydantic_core.core_schema import custom_error_schema

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `values`, or raise ValueError if one appears twice."""
    if len(set(values)) < len(values):
        raise ValueError("the same value appears twice")
    return values


Distinct = AfterValidator(distinct)
"""Annotation of a tuple without duplicates."""

Several = (Field(min_length=1), Distinct)
"""Annotations of a tuple with at least one value and no duplicates."""


def one_error(message: str) -> GetPydanticSchema:
    """Return an annotation of a union that reports one error, not one for each of its members."""
    return GetPydanticSchema(
        lambda kind, handler: custom_error_schema(handler(kind), "limit", custom_error_message=message)
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A section of `params.yaml`. Unknown keys and values of another type are errors."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
