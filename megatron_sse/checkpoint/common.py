"""The file common.pt of a checkpoint: the numbers that Megatron-Core's format keeps beside the tensors."""

import io
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from megatron_sse.checkpoint.manifest import Count
from megatron_sse.checkpoint.names import COMMON
from megatron_sse.errors import UserError
from megatron_sse.reading import check, read_bytes

_MAX_BYTES = 1 << 20


class Common(BaseModel):
    """Steps and samples that are done, and the steps that the optimizer has made; None in a checkpoint of weights."""

    # Megatron-Core merges what is there into what it loads.
    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Count
    consumed_samples: Count
    optimizer_step: Count | None = None


def read_common(folder: Path) -> Common:
    """Read common.pt of a checkpoint; nothing but values is unpickled. Raises UserError."""
    path = folder / COMMON
    content = read_bytes(path, _MAX_BYTES)
    try:
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # The type of torch's error depends on what is wrong with the file.
    except Exception as error:
        raise UserError(f"{path}: refused, {first_line(error)}") from None
    return check(path, values, Common)


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error's message; those of torch.load are long."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].split(". ")[0]
