"""The arguments of `megatron-sse score`."""

from dataclasses import dataclass

from megatron_sse.durable import check_output
from megatron_sse.options import Command, option


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """Write a model's logits for given tokens."""

    command, help = "score", "write the logits of a model"

    checkpoint: str = option("DIR", "checkpoint, run folder or Hugging Face folder")
    input: str = option("FILE", "safetensors file with input_ids, integers [B, L]; each sequence is one document")
    output: str = option("FILE", "safetensors file to write: logits, fp32 [B, L, vocabulary]")

    def check(self) -> None:
        check_output("--output", self.output)
