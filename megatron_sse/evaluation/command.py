"""The command `megatron-sse evaluate`: measures what a model predicts and recalls; writes tables, JSON, pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_sse.config import MQARTask, NeedleTask, RunConfig
from megatron_sse.data.checks import TokenFile
from megatron_sse.errors import found_by_all
from megatron_sse.evaluation.needles import Found, measure_needles
from megatron_sse.evaluation.perplexity import Losses, measure_losses, validation_files
from megatron_sse.evaluation.read import Reader
from megatron_sse.evaluation.recall import Recalled, measure_recall
from megatron_sse.evaluation.report import (
    tabulate_losses,
    tabulate_needles,
    tabulate_recall,
    tabulate_solved,
    write_results,
)
from megatron_sse.evaluation.request import MQAR, NEEDLE, PERPLEXITY, SOLVE, Request
from megatron_sse.evaluation.solve import Solved, Solving, prepare, solve
from megatron_sse.evaluation.tasks import needle_tasks, recall_tasks
from megatron_sse.inference.prompts import check_length
from megatron_sse.installed import has_pictures, warn_without_pictures
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import Model, open_model
from megatron_sse.pretrained.text import Tokenizer, open_tokenizer
from megatron_sse.reports.results import make_folder, result_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """A request with its files read and checked against the model."""

    request: Request
    model: Model
    config: RunConfig
    lengths: list[int]
    files: list[TokenFile]
    recall: list[MQARTask]
    needles: list[NeedleTask]
    tokenizer: Tokenizer | None
    solving: Solving | None


def run(request: Request) -> int:
    """Evaluate, print and write; return the exit status. Raises UserError.

    All processes form one tensor group.
    """
    is_writer = os.environ.get("RANK", "0") == "0"
    with found_by_all():
        job = _prepare(request)
    if is_writer:
        warn_without_pictures()
    with result_folder(request.output, is_writer), inference_groups(request.tensor_size) as (groups, device):
        net = build_and_load(job.model, job.config, groups, device)
        reader = Reader(net, job.config.model.vocab_size, request.batch, request.chunk)
        results: dict[str, list[Any]] = {}
        for task in request.tasks:
            results[task] = _MEASURE[task](job, reader)
            if is_writer:
                _show(job, task, results)
    return 0


def _prepare(request: Request) -> _Job:
    request.check()
    model = open_model("CHECKPOINT", request.checkpoint)
    config = inference_config(model, request.precision, request.tensor_size)
    lengths = request.length_list() or [config.data.sequence_length]
    if not request.any_length:
        given = f"--lengths: got {max(lengths)}"
        check_length(config.model, config.data.sequence_length, max(lengths), given)
    tokenizer = open_tokenizer(model) if NEEDLE in request.tasks else None
    job = _Job(
        request,
        model,
        config,
        lengths,
        validation_files(config, request.data) if PERPLEXITY in request.tasks else [],
        recall_tasks(request, config, lengths) if MQAR in request.tasks else [],
        [] if tokenizer is None else needle_tasks(request, config, lengths, tokenizer),
        tokenizer,
        prepare(request, model, config, 1 << 40 if request.any_length else max(lengths))
        if SOLVE in request.tasks
        else None,
    )
    make_folder(request.output)
    return job


def _perplexity(job: _Job, reader: Reader) -> list[Losses]:
    found = []
    for file in job.files:
        for length in job.lengths:
            found.append(measure_losses(reader, file, length, job.request.tokens))
            logger.info("perplexity: %s, length %d: %.4f nats per token", file.prefix, length, found[-1].loss)
    return found


def _recall(job: _Job, reader: Reader) -> list[Recalled]:
    found = []
    for task in job.recall:
        for length in job.lengths:
            if length >= 3 * task.pairs:
                found.append(measure_recall(reader, task, length, job.request.samples, job.request.seed))
                logger.info("mqar: %d pairs, length %d: %.3f", task.pairs, length, found[-1].accuracy)
    return found


def _needles(job: _Job, reader: Reader) -> list[Found]:
    assert job.tokenizer is not None
    found, request = [], job.request
    for task in job.needles:
        for length in job.lengths:
            for depth in request.depth_list():
                place = length, depth, request.samples, request.seed
                found.append(measure_needles(reader, job.tokenizer, task, *place))
                logger.info("needle, %s: length %d, depth %g: %.3f", task.variant, *place[:2], found[-1].score)
    return found


def _solve(job: _Job, reader: Reader) -> list[Solved]:
    assert job.solving is not None
    return [solve(reader.net, job.solving)]


_MEASURE: dict[str, Callable[[_Job, Reader], list[Any]]]
_MEASURE = {PERPLEXITY: _perplexity, MQAR: _recall, NEEDLE: _needles, SOLVE: _solve}


def _show(job: _Job, task: str, results: dict[str, list[Any]]) -> None:
    """Print a task's tables, draw its pictures, and write all results so far."""
    folder = Path(job.request.output)
    for name, part in _parts(task, results[task]):
        print(_TABLES[task](part))
        if has_pictures() and task != SOLVE:
            _draw(task, folder / f"{name}.png", part)
    path = write_results(folder, _about(job), results)
    logger.info("%s: written to %s", task, path)


def _parts(task: str, results: list[Any]) -> list[tuple[str, list[Any]]]:
    """Group results that share a table and a picture; return the groups with their names."""
    if task in (MQAR, SOLVE):
        return [(task, results)]
    name = "file" if task == PERPLEXITY else "variant"
    parts = [(key, list(part)) for key, part in groupby(results, key=lambda result: getattr(result, name))]
    if task == NEEDLE:
        return [(f"{task}_{key}", part) for key, part in parts]
    return [(task if len(parts) == 1 else f"{task}_{number}", part) for number, (_, part) in enumerate(parts, 1)]


_TABLES: dict[str, Callable[[Sequence[Any]], str]] = {
    PERPLEXITY: tabulate_losses,
    MQAR: tabulate_recall,
    NEEDLE: tabulate_needles,
    SOLVE: tabulate_solved,
}


def _draw(task: str, path: Path, results: list[Any]) -> None:
    # matplotlib is an extra.
    from megatron_sse.evaluation.pictures import draw_losses, draw_needles, draw_recall

    draw: dict[str, Callable[[Path, Sequence[Any]], None]]
    draw = {PERPLEXITY: draw_losses, MQAR: draw_recall, NEEDLE: draw_needles}
    draw[task](path, results)


def _about(job: _Job) -> dict[str, Any]:
    """Describe what was evaluated, and how."""
    settings = asdict(job.request) | {"lengths": job.lengths, "depths": job.request.depth_list()}
    settings |= {"pairs": [task.pairs for task in job.recall], "variants": [task.variant for task in job.needles]}
    settings["mqar"] = [task.model_dump() for task in job.recall]
    settings["needle"] = [task.model_dump() for task in job.needles]
    precision = job.config.training.precision
    return {
        "checkpoint": str(job.model.folder),
        "settings": settings | {"precision": precision},
        "model": job.config.model.model_dump(mode="json"),
    }
