"""What `megatron-sse evaluate` is asked for, and whether it fits the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_sse.config import MQARTask, NeedleTask, NeedleVariant, RunConfig
from megatron_sse.data.tasks.mqar import vocabulary_of
from megatron_sse.data.tasks.needle import VARIANTS
from megatron_sse.errors import UserError
from megatron_sse.evaluation.needles import least_length
from megatron_sse.inference.run import DEFAULT_CHUNK
from megatron_sse.pretrained.text import Tokenizer

PERPLEXITY, MQAR, NEEDLE = TASKS = ("perplexity", "mqar", "needle")
# Of a model that was not trained on the task.
_RECALL = MQARTask(pairs=32, keys=64, values=32)
_DIGITS = 7

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Request:
    """docs/evaluate.md explains each. Lists are texts with commas."""

    checkpoint: str
    tasks: Sequence[str]
    output: str = "evaluation"
    data: str | None = None
    tokens: int = 1 << 18
    lengths: str | None = None
    depths: str = "0,25,50,75,100"
    pairs: str | None = None
    keys: int | None = None
    values: int | None = None
    variants: str | None = None
    digits: int | None = None
    samples: int = 20
    seed: int = 0
    batch: int = 8
    chunk: int = DEFAULT_CHUNK
    precision: str | None = None
    any_length: bool = False

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        for task in self.tasks:
            if task not in TASKS or self.tasks.count(task) > 1:
                raise UserError(f"TASK: got {task!r}, allowed {', '.join(TASKS)}, each once")
        for name in ("tokens", "keys", "values", "digits", "samples", "batch", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: got {value}, allowed 1 or more")
        if self.seed < 0:
            raise UserError(f"--seed: got {self.seed}, allowed 0 or more")
        self.length_list(), self.depth_list(), self.pair_list(), self.variant_list()

    def length_list(self) -> list[int]:
        """Empty where not given; as the other lists. Raises UserError."""
        return _read_list("--lengths", self.lengths, int, lambda length: length >= 1, "whole numbers from 1 on")

    def pair_list(self) -> list[int]:
        return _read_list("--pairs", self.pairs, int, lambda pairs: pairs >= 1, "whole numbers from 1 on")

    def depth_list(self) -> list[float]:
        """As shares of the text."""
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


def recall_tasks(request: Request, config: RunConfig, lengths: list[int]) -> list[MQARTask]:
    """One for each number of pairs; what is not given is as the model was trained, if it was. Raises UserError where
    they fit neither the model nor any of the lengths."""
    trained = next((source.mqar for source in config.data.sources() if source.mqar is not None), _RECALL)
    given = {name: getattr(request, name) for name in ("keys", "values") if getattr(request, name) is not None}
    sizes = trained.model_dump() | given
    tasks = [MQARTask.model_validate(sizes | {"pairs": pairs}) for pairs in request.pair_list() or [trained.pairs]]
    needed, vocab_size = vocabulary_of(tasks[0]), config.model.vocab_size
    if needed > vocab_size:
        raise UserError(
            f"mqar: got a model of {vocab_size} tokens, allowed {needed} or more with {sizes['keys']} keys, "
            f"{sizes['values']} values and a token for gaps; give fewer with --keys and --values"
        )
    for task in tasks:
        if task.pairs > task.keys:
            raise UserError(f"--pairs: got {task.pairs}, allowed at most {task.keys}, the number of keys")
        if 3 * task.pairs > max(lengths):
            raise UserError(
                f"--pairs: got {task.pairs}, allowed at most {max(lengths) // 3}, a third of the tokens of --lengths"
            )
    return tasks


def needle_tasks(request: Request, config: RunConfig, lengths: list[int], tokenizer: Tokenizer) -> list[NeedleTask]:
    """One for each variant; otherwise as recall_tasks. Raises UserError where a length is too short."""
    trained = [source.needle for source in config.data.sources() if source.needle is not None]
    digits = request.digits or (trained[0].digits if trained else _DIGITS)
    variants = request.variant_list() or list(dict.fromkeys(task.variant for task in trained)) or list(VARIANTS)
    tasks = [NeedleTask(variant=variant, digits=digits) for variant in variants]
    for task in tasks:
        least = least_length(tokenizer, task)
        if least > min(lengths):
            raise UserError(
                f"--lengths: got {min(lengths)}, allowed {least} or more, the tokens of needle {task.variant} with "
                f"{digits} digits"
            )
    return tasks
