"""The arguments of `megatron-sse inspect-states`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sse.errors import UserError, found_by_all
from megatron_sse.inference.request import TextRequest
from megatron_sse.options import option


@dataclass(frozen=True, kw_only=True)
class Request(TextRequest):
    """Measure over all tokens of some texts, layer by layer: use of partitions, effective rank of the states,
    half-lives of their decay. docs/states.md explains the numbers."""

    command, help = "inspect-states", "show what SSE layers do with a text"

    output: str = option("FOLDER", "folder for JSON and PNG files", default="states")

    @found_by_all()
    def check(self) -> None:
        super().check()
        if not 1 <= self.chunk <= 1 << 24:
            raise UserError(f"--chunk: got {self.chunk}, allowed 1 to 2^24")
        if self.tokens is None and not self.has_text:
            raise UserError("got no text, allowed one or more with --prompt, --prompt-file or --tokens")
