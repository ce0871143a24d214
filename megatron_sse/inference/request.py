"""The arguments of commands that run a model, and of `megatron-sse generate`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_sse.durable import check_output
from megatron_sse.errors import UserError, found_by_all
from megatron_sse.options import Command, option, positional
from megatron_sse.visible import count_of

MOST_PROCESSES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Command):
    """A request to a model in a folder."""

    prints_result: ClassVar[bool] = True

    checkpoint: str = positional("CHECKPOINT", "checkpoint, run folder or Hugging Face folder")
    chunk: int = option("N", "tokens of a sequence that go through the model at once", default=2048)
    precision: Literal["fp32", "bf16"] | None = option(help="compute in this format", unset="the checkpoint's")
    any_length: bool = option(
        help="let softmax layers that see all positions have longer sequences than they were trained on"
    )

    tensor: int | None = option("N", "processes that split each layer", unset="1; under torchrun as many as there are")

    @property
    def num_groups(self) -> int:
        """Number of tensor groups that read the same texts together."""
        return 1

    @property
    def num_processes(self) -> int:
        if "RANK" in os.environ:
            return int(os.environ.get("WORLD_SIZE", "1"))
        return (self.tensor or 1) * self.num_groups

    @property
    def tensor_size(self) -> int:
        """Number of processes that split each layer."""
        return self.num_processes // self.num_groups

    @property
    def layout(self) -> str:
        return f"--tensor {self.tensor or 1}"

    def check_layout(self) -> None:
        """Raise UserError where --tensor or --context is out of range, or does not fit the processes of a launcher."""
        for name, number in (("--tensor", self.tensor), ("--context", self.num_groups)):
            if number is not None and not 1 <= number <= MOST_PROCESSES:
                raise UserError(f"{name}: got {number}, allowed 1 to {MOST_PROCESSES}")
        got, wanted = self.num_processes, (self.tensor or 1) * self.num_groups
        if self.tensor is not None and got != wanted:
            raise UserError(f"{self.layout}: got {count_of(got, 'process')}, allowed {wanted}")
        if got % wanted:
            raise UserError(f"{self.layout}: got {count_of(got, 'process')}, allowed a multiple of {wanted}")


@dataclass(frozen=True, kw_only=True)
class TextRequest(ModelRequest):
    """A request to a model about texts."""

    prompts: tuple[str, ...] = option("TEXT", "text; may be repeated", default=(), flag="--prompt")
    prompt_files: tuple[str, ...] = option("FILE", "text file; may be repeated", default=(), flag="--prompt-file")
    tokens: str | None = option("FILE", "file of token ids, one text per line", unset="")

    @property
    def has_text(self) -> bool:
        """Whether there is a prompt or a file of prompts."""
        return bool(self.prompts or self.prompt_files)

    def check(self) -> None:
        self.check_layout()
        if self.tokens is not None and self.has_text:
            raise UserError("--tokens: got text as well, allowed either text or tokens")


@dataclass(frozen=True, kw_only=True)
class Request(TextRequest):
    """Continue texts: those given here or in files, or else each line of the standard input. With --tokens, token ids
    are printed. docs/generate.md explains the options."""

    command, help = "generate", "generate text with a model"

    max_tokens: int = option("N", "new tokens", default=100)
    temperature: float = option("X", "0 picks the likeliest token, more varies", default=0.0)
    top_p: float = option("X", "pick among the likeliest tokens that have this share of the probability", default=1.0)
    seed: int = option("N", "seed of the random numbers", default=0)
    chat: bool = option(help="answer each prompt as what a user says, by the chat template kept with the model")
    context: int = option("N", "processes that share each long prompt", default=1)
    cuda_graph: bool = option(help="on one GPU, queue each new token's kernels as one CUDA graph")
    save_cache: str | None = option("FILE", "file to write the states of the sequences to", unset="")
    load_cache: str | None = option("FILE", "file of states to continue from", unset="")

    @property
    def num_groups(self) -> int:
        return self.context

    @property
    def layout(self) -> str:
        return f"{super().layout} x --context {self.context}"

    @property
    def is_interactive(self) -> bool:
        """Whether prompts come line by line from the standard input."""
        return not self.has_text and self.tokens is None

    @found_by_all()
    def check(self) -> None:
        super().check()
        for name, value, is_right, allowed in (
            ("--max-tokens", self.max_tokens, 1 <= self.max_tokens < 1 << 40, "1 or more, below 2^40"),
            (
                "--temperature",
                self.temperature,
                0 <= self.temperature < float("inf"),
                "0 (the likeliest token) or more",
            ),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("--seed", self.seed, 0 <= self.seed < 1 << 40, "0 or more, below 2^40"),
            ("--chunk", self.chunk, 1 <= self.chunk <= 1 << 24, "1 to 2^24"),
        ):
            if not is_right:
                raise UserError(f"{name}: got {value}, allowed {allowed}")
        given = {"--tokens": self.tokens, "--save-cache": self.save_cache, "--load-cache": self.load_cache}
        for name, file in given.items() if self.chat else ():
            if file is not None:
                raise UserError(f"{name}: given with --chat, which renders whole conversations; leave one of them out")
        if self.save_cache:
            check_output("--save-cache", self.save_cache)
        number = self.num_processes
        if number > 1 and self.cuda_graph:
            raise UserError(f"--cuda-graph: got {number} processes, allowed 1; collectives are not captured")
        if number > 1 and (self.save_cache or self.load_cache or self.is_interactive):
            raise UserError(
                f"{self.layout}: got {number} processes, allowed 1 where prompts come line by line, with --save-cache "
                "and with --load-cache"
            )
