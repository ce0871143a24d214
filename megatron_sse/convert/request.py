"""The arguments of `megatron-sse convert`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sse.errors import UserError
from megatron_sse.options import Command, option, positional


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """Convert a model into a new folder, and compare the logits of both. Exit status 1 if they differ.
    docs/convert.md explains the kinds of folders."""

    command, help = "convert", "convert models from and to Hugging Face folders"

    source: str = positional("SRC", "Hugging Face folder, checkpoint or run folder")
    target: str = positional("DST", "folder to make")
    overrides: tuple[str, ...] = positional("model.sse.key=value", "SSE settings; only with --pattern", default=())
    to: str | None = option("KIND", "ours, hf, sse, llama, qwen2, qwen3 or mistral", unset="hf from ours, else ours")
    pattern: str | None = option("LAYERS", 'replace softmax layers by SSE layers: "5*sse, softmax"', unset="")
    tolerance: float = option("X", "largest relative difference of the logits, root mean square", default=1e-4)

    def check(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise UserError(f"--tolerance: got {self.tolerance}, allowed a number from 0")
