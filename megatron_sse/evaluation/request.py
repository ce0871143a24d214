"""The arguments of `megatron-sse evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, get_args

from megatron_sse.config import MQARTask, NeedleVariant
from megatron_sse.errors import UserError, found_by_all
from megatron_sse.inference.request import ModelRequest
from megatron_sse.options import option, positional

PERPLEXITY, MQAR, NEEDLE, SOLVE = TASKS = ("perplexity", "mqar", "needle", "solve")
# For a model that was not trained on the task.
RECALL = MQARTask(pairs=32, keys=64, values=32)
DIGITS = 7
VARIANTS: tuple[NeedleVariant, ...] = get_args(NeedleVariant)

# The largest value of each number: beyond it nothing would end.
_MOST = {"tokens": 1 << 40, "keys": 1 << 24, "values": 1 << 24, "digits": 100, "samples": 1_000_000}
_MOST |= {"batch": 1 << 16, "chunk": 1 << 24, "max_tokens": 1 << 24}

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Request(ModelRequest):
    """Measure loss by position (perplexity), associative recall (mqar), the recall of numbers hidden in long texts
    (needle) and how many problems are solved (solve). Lists are numbers separated by commas. docs/evaluate.md explains
    the tasks."""

    command, help = "evaluate", "measure what a model predicts, recalls and solves"

    tasks: tuple[str, ...] = positional("TASK", ", ".join(TASKS))
    output: str = option("FOLDER", "folder for JSON and PNG files", default="evaluation")
    lengths: str | None = option("LIST", "tokens of a sequence", unset="the length that the model was trained on")
    data: str | None = option("PREFIX", "perplexity: token file", unset="the model's validation data")
    tokens: int = option("N", "perplexity: tokens of the file", default=1 << 18)
    pairs: str | None = option("LIST", "mqar: pairs in a sequence", unset=f"as trained, or {RECALL.pairs}")
    keys: int | None = option("N", "mqar: keys to choose from", unset=f"as trained, or {RECALL.keys}")
    values: int | None = option("N", "mqar: values to choose from", unset=f"as trained, or {RECALL.values}")
    variants: str | None = option("LIST", f"needle: {', '.join(VARIANTS)}", unset="as trained, or all")
    depths: str = option("LIST", "needle: depths of the first number, percent of the text", default="0,25,50,75,100")
    digits: int | None = option("N", "needle: digits of a number", unset=f"as trained, or {DIGITS}")
    prompts: str | None = option(
        "FILE", "solve: JSONL or Parquet of prompts, answers", unset="rl.validation_prompts of the run"
    )
    reward: str | None = option("NAME", "solve: exact, math or module:function", unset="as trained, or exact")
    max_tokens: int | None = option("N", "solve: tokens of an answer", unset="as trained, or 1024")
    temperature: float | None = option("X", "solve: 0 for the likeliest tokens", unset="as trained, or 1")
    top_p: float = option("X", "solve: draw among the likeliest tokens that have this share", default=1.0)
    samples: int = option("N", "samples of each cell; solve: tries of each prompt", default=20)
    seed: int = option("N", "seed of the samples", default=0)
    batch: int = option("N", "sequences at once", default=8)

    @found_by_all()
    def check(self) -> None:
        self.check_layout()
        for task in self.tasks:
            if task not in TASKS or self.tasks.count(task) > 1:
                raise UserError(f"TASK: got {task!r}, allowed {', '.join(TASKS)}, each once")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UserError(f"--{name.replace('_', '-')}: got {value}, allowed 1 to {most}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature: got {self.temperature}, allowed 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: got {self.top_p}, allowed more than 0, at most 1")
        if not 0 <= self.seed < 1 << 40:
            raise UserError(f"--seed: got {self.seed}, allowed 0 or more, below 2^40")
        self.length_list(), self.depth_list(), self.pair_list(), self.variant_list()

    def length_list(self) -> list[int]:
        """Return the lengths; like the other lists, empty if not given. Raises UserError."""
        return _read_list(
            "--lengths", self.lengths, int, lambda length: 1 <= length <= 1 << 32, "whole numbers from 1 on"
        )

    def pair_list(self) -> list[int]:
        return _read_list(
            "--pairs", self.pairs, int, lambda pairs: 1 <= pairs <= 1 << 24, "whole numbers from 1 to 2^24"
        )

    def depth_list(self) -> list[float]:
        """Return the depths as shares of the text."""
        right = "numbers from 0 to 100, in percent of the text"
        return [depth / 100 for depth in _read_list("--depths", self.depths, float, lambda d: 0 <= d <= 100, right)]

    def variant_list(self) -> list[NeedleVariant]:
        named = {str(variant): variant for variant in VARIANTS}
        given = _split(self.variants)
        for name in given:
            if name not in named or given.count(name) > 1:
                raise UserError(f"--variants: got {name!r}, allowed {', '.join(named)}, each once")
        return [named[name] for name in given]


def _split(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]


def _read_list(
    key: str, text: str | None, kind: Callable[[str], Number], right: Callable[[Number], bool], allowed: str
) -> list[Number]:
    try:
        values = [kind(part) for part in _split(text)]
    except ValueError:
        values = []
    if text is not None and (not values or not all(map(right, values)) or len(set(values)) < len(values)):
        raise UserError(f"{key}: got {text!r}, allowed different {allowed}, with commas between them")
    return sorted(values)
