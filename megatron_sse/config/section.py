"""Types of settings with their bounds, and sections without unknown keys."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_sse.config.pattern import MAX_LAYERS
from megatron_sse.config.problem import show
from megatron_sse.visible import make_visible

# The upper bounds are far above any run: what lies beyond is a slip, and would hang or fill the memory.
Count = Annotated[int, Field(ge=1, le=1 << 24)]
Size0 = Annotated[int, Field(ge=0, le=1 << 24)]
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Length = Annotated[int, Field(ge=1, le=1 << 32)]
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Steps0 = Annotated[int, Field(ge=0, le=1_000_000_000)]
Tokens = Annotated[int, Field(ge=1, le=1 << 53)]
Seed = Annotated[int, Field(ge=0, lt=1 << 40)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
NonNegative = Annotated[float, Field(ge=0, le=1e12)]
# AdamW's steps of fp32 overflow far beyond.
Rate = Annotated[float, Field(gt=0, le=1000)]
Rate0 = Annotated[float, Field(ge=0, le=1000)]
# What the process groups can count.
Minutes = Annotated[float, Field(gt=0, le=100_000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _check_name(text: str) -> str:
    if not text or make_visible(text) != text or "\n" in text or "\t" in text:
        allowed = "a name without control characters" if text else "a name that is not empty"
        raise PydanticCustomError("setting", "{text}", {"text": f"got {show(text)}, allowed {allowed}"})
    return text


# Of files, folders and what else is shown on a terminal.
Name = Annotated[str, AfterValidator(_check_name)]

# Default of a setting that may be left out or null and is then derived from the others.
DERIVED: Any = None


class Section(BaseModel):
    """A section: no unknown keys, no silent conversions, and null allowed wherever the default is null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # A null in YAML means the default, wherever the default is null.
        nullable = {name for name, field in cls.model_fields.items() if field.default is None}
        return {key: value for key, value in values.items() if value is not None or key not in nullable}
