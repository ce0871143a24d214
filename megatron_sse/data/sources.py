"""Opening the token files and tasks that a run's settings name: check, pack and mix them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_sse.config import DataConfig, MQARTask, NeedleTask, RLConfig, RunConfig, Source, StageRun, plan_stages
from megatron_sse.data.blend import Blend, Dataset, ValidationSamples
from megatron_sse.data.checks import TokenFile, check_token_file
from megatron_sse.data.dataset import TokenDataset
from megatron_sse.data.problems import read_problems
from megatron_sse.data.tasks.dataset import TaskDataset
from megatron_sse.data.tasks.needle import least_room
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)

# The first number of a task's seed: training and validation draw different samples.
_TRAINING, _VALIDATION = 0, 1


def check_data(config: RunConfig) -> None:
    """Check the token files of all of a run's stages, or its prompts, and log what they hold. Raises UserError.

    Files that data.corpus has yet to build are checked after they are built.
    """
    if config.rl is not None:
        _check_prompts(config.rl, config.training.steps)
        return
    for stage in plan_stages(config):
        if is_unbuilt(stage.config.data):
            continue
        training = stage.config.training
        blend = open_training(stage)
        samples = stage.steps * training.global_batch_size
        sources = name_sources(stage.train_key, stage.config.data.train)
        for (key, source), dataset, count in zip(sources, blend.datasets, blend.shares(samples), strict=True):
            place = f"stage {stage.number + 1}: {key}" if config.stages else key
            if isinstance(dataset, TaskDataset):
                logger.info("%s: %s: %s samples, generated as needed", place, source, f"{count:,}")
            else:
                epochs = count / len(dataset)
                logger.info("%s: %s: %s; %.3g epochs", place, source, dataset.packing.account, epochs)
        open_validation(stage.config)


def _check_prompts(rl: RLConfig, steps: int) -> None:
    count = len(read_problems("rl.prompts", rl.prompts))
    epochs = steps * rl.prompts_per_step / count
    logger.info("rl.prompts: %s: %s prompts; %.3g epochs", rl.prompts, f"{count:,}", epochs)
    if rl.validation_prompts is not None:
        count = len(read_problems("rl.validation_prompts", rl.validation_prompts))
        logger.info("rl.validation_prompts: %s: %s prompts", rl.validation_prompts, f"{count:,}")


def is_unbuilt(data: DataConfig) -> bool:
    """Check whether data.corpus still has to build one of the files."""
    blends = [data.train, data.validation or []]
    return data.corpus is not None and any(
        source.prefix and not Path(source.prefix + ".idx").exists() for blend in blends for source in blend
    )


def open_training(stage: StageRun) -> Blend:
    """Return a blend of the checked training files and the tasks of a stage. Raises UserError."""
    config, key = stage.config, stage.train_key
    blend = _open_blend(key, config.data.train, config, [_TRAINING, config.training.seed, stage.number], part=0)
    for (name, _), dataset in zip(name_sources(key, config.data.train), blend.datasets, strict=True):
        _check_samples(name, dataset, 1, config.data, "the sequence length")
    return blend


def open_validation(config: RunConfig) -> ValidationSamples | None:
    """Return the samples of training.validation_batches global batches; None where there is no validation data.

    They are those of data.validation, or of the training files' last documents and the training tasks (with a seed of
    their own, so that training never sees them). Raises UserError.
    """
    data, training = config.data, config.training
    samples = training.validation_batches * training.global_batch_size
    if data.validation is None and not data.validation_share:
        return None
    key = "data.train" if data.validation is None else "data.validation"
    sources = data.validation or data.train
    blend = _open_blend(key, sources, config, [_VALIDATION], part=1)
    names = [name for name, _ in name_sources(key, sources)]
    for name, dataset, count in zip(names, blend.datasets, blend.shares(samples), strict=True):
        _check_samples(name, dataset, count, data, "training.validation_batches")
    return ValidationSamples(blend, samples)


def name_sources(key: str, sources: list[Source]) -> list[tuple[str, Source]]:
    """Return each source with its dotted key; a single source has the key of the blend."""
    if len(sources) == 1:
        return [(key, sources[0])]
    return [
        (f"{key}.{number}.{'prefix' if source.prefix else source}", source) for number, source in enumerate(sources)
    ]


def split_file(file: TokenFile, share: float) -> tuple[TokenFile, TokenFile]:
    """Split a file into its first documents and its last ones, which hold `share` of its tokens. Raises UserError."""
    offsets_D1 = file.offsets_D1
    first = int(np.searchsorted(offsets_D1, (1 - share) * offsets_D1[-1]))
    if not 0 < first < len(offsets_D1) - 1:
        raise UserError(
            f"data.validation_share: {share:g} of {file.prefix} ({len(offsets_D1) - 1} documents) leaves one side "
            "without a document; give data.validation, another share or a file of more documents"
        )
    return replace(file, offsets_D1=offsets_D1[: first + 1]), replace(file, offsets_D1=offsets_D1[first:])


def _open_blend(key: str, sources: list[Source], config: RunConfig, seed: list[int], part: int) -> Blend:
    """Open the sources of a blend.

    seed: numbers that the samples of tasks are drawn from. part: 0 (training) or 1 (validation) of the files that
    data.validation_share splits.
    """
    data = config.data
    datasets: list[Dataset] = []
    for number, (name, source) in enumerate(name_sources(key, sources)):
        if source.prefix is None:
            assert source.task is not None
            datasets.append(open_task(name, source.task, data, [*seed, number]))
            continue
        file = check_token_file(name, source.prefix, config.model.vocab_size)
        datasets.append(
            TokenDataset(split_file(file, data.validation_share)[part] if data.validation_share else file, data)
        )
    return Blend(datasets, [source.weight for source in sources])


def open_task(key: str, task: MQARTask | NeedleTask, data: DataConfig, seed: list[int]) -> TaskDataset:
    """Return the samples of a task. Raises UserError where they do not fit into data.sequence_length."""
    if isinstance(task, NeedleTask) and (least := least_room(task, len)) > data.sequence_length:
        raise UserError(
            f"{key}: got data.sequence_length {data.sequence_length}, allowed {least} or more for needle "
            f"{task.variant} with {task.digits} digits"
        )
    return TaskDataset(task, data, seed)


def _check_samples(key: str, dataset: Dataset, needed: int, data: DataConfig, lower: str) -> None:
    if isinstance(dataset, TaskDataset):
        return
    account = dataset.packing.account
    if account.samples < needed:
        raise UserError(
            f"{key}: {dataset.prefix} has {account.tokens} tokens, {account.samples} samples of data.sequence_length "
            f"{data.sequence_length}; {needed} are needed, lower {lower} or give a larger file"
        )
