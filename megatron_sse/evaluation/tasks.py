"""The tasks of an evaluation: as requested, else as the model was trained, and checked against the model."""

from __future__ import annotations

from megatron_sse.config import MQARTask, NeedleTask, RunConfig
from megatron_sse.data.tasks.mqar import vocabulary_of
from megatron_sse.data.tasks.needle import VARIANTS
from megatron_sse.errors import UserError
from megatron_sse.evaluation.needles import least_length
from megatron_sse.evaluation.request import DIGITS, RECALL, Request
from megatron_sse.pretrained.text import Tokenizer


def recall_tasks(request: Request, config: RunConfig, lengths: list[int]) -> list[MQARTask]:
    """Return a task for each number of pairs. Settings that are not given are as in training, if it had the task.

    Raises UserError where they fit neither the model nor any of the lengths.
    """
    trained = next((source.mqar for source in config.data.sources() if source.mqar is not None), RECALL)
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
    """Return a task for each variant; otherwise like recall_tasks. Raises UserError where a length is too short."""
    trained = [source.needle for source in config.data.sources() if source.needle is not None]
    digits = request.digits or (trained[0].digits if trained else DIGITS)
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
