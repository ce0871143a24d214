"""The command `megatron-sse inspect-states`: measures SSE layers on texts; writes tables, JSON and pictures."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sse.config import RunConfig
from megatron_sse.errors import UserError, found_by_all
from megatron_sse.inference.prompts import check_length, check_tokens, read_prompts, read_tokens
from megatron_sse.inspection.measure import Layer, measure_layers
from megatron_sse.inspection.report import tabulate, to_json
from megatron_sse.inspection.request import Request
from megatron_sse.installed import has_pictures, warn_without_pictures
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import Model, open_model
from megatron_sse.pretrained.text import open_tokenizer
from megatron_sse.reports.results import make_folder, result_folder, write_json

logger = logging.getLogger(__name__)

RESULTS = "states.json"


@dataclass(frozen=True)
class _Job:
    """A request with its files read and checked against the model. texts: token ids."""

    model: Model
    config: RunConfig
    texts: list[list[int]]


def run(request: Request) -> int:
    """Measure, print and write; return the exit status. Raises UserError.

    All processes form one tensor group.
    """
    is_writer = os.environ.get("RANK", "0") == "0"
    with found_by_all():
        job = _prepare(request)
    if is_writer:
        warn_without_pictures()
    with result_folder(request.output, is_writer):
        with inference_groups(request.tensor_size) as (groups, device):
            net = build_and_load(job.model, job.config, groups, device)
            start = time.perf_counter()
            layers = measure_layers(net, job.config.model.layer_kinds(), job.texts, request.chunk, groups.tp)
            seconds, peak = time.perf_counter() - start, device.peak_memory_bytes()
        num_tokens = sum(map(len, job.texts))
        logger.info("%d tokens in %.2f s; peak memory %.0f MB", num_tokens, seconds, peak / 1e6)
        if is_writer:
            _show(request, job, layers)
    return 0


def _prepare(request: Request) -> _Job:
    request.check()
    model = open_model("CHECKPOINT", request.checkpoint)
    config = inference_config(model, request.precision, request.tensor_size)
    if set(config.model.layer_kinds()) == {"softmax"}:
        raise UserError(
            f"CHECKPOINT: got {request.checkpoint}, whose layers are all softmax, allowed a model with sse, gla or gdn "
            "layers"
        )
    texts = _read_texts(request, model, config)
    if not request.any_length:
        longest = max(map(len, texts))
        check_length(config.model, config.data.sequence_length, longest, f"got a text of {longest} tokens")
    make_folder(request.output)
    return _Job(model, config, texts)


def _read_texts(request: Request, model: Model, config: RunConfig) -> list[list[int]]:
    vocab_size = config.model.vocab_size
    if request.tokens is not None:
        return read_tokens(request.tokens, vocab_size, continues=False)
    tokenizer = open_tokenizer(model, ", or give token ids with --tokens")
    texts = read_prompts(request.prompts, request.prompt_files, tokenizer, continues=False)
    for number, text in enumerate(texts, 1):
        check_tokens(f"text {number}", text, vocab_size)
    return texts


def _show(request: Request, job: _Job, layers: list[Layer]) -> None:
    """Print the tables, draw the pictures and write all numbers."""
    folder = Path(request.output)
    print(tabulate(layers))
    about = {
        "checkpoint": str(job.model.folder),
        "settings": asdict(request) | {"precision": job.config.training.precision},
        "model": job.config.model.model_dump(mode="json"),
        "tokens": [len(text) for text in job.texts],
    }
    path = write_json(folder / RESULTS, about, {"layers": to_json(layers)})
    if has_pictures():
        # matplotlib is an extra.
        from megatron_sse.inspection.pictures import draw_all

        draw_all(folder, layers)
    logger.info("written to %s", path)
