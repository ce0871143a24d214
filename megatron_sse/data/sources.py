"""The token files that a run's settings name: checked, packed and mixed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_sse.config import DataConfig, RunConfig, Source, StageRun, plan_stages
from megatron_sse.data.blend import Blend, ValidationSamples
from megatron_sse.data.checks import TokenFile, check_token_file
from megatron_sse.data.dataset import TokenDataset
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)


def check_data(config: RunConfig) -> None:
    """Check the run's token files, of all its stages, and say what they hold. Raises UserError.

    Files that data.corpus will build are checked when they are.
    """
    for stage in plan_stages(config):
        if is_unbuilt(stage.config.data):
            continue
        training = stage.config.training
        blend = open_training(stage)
        samples = stage.steps * training.global_batch_size
        sources = name_sources(stage.train_key, stage.config.data.train)
        for (key, source), dataset, count in zip(sources, blend.datasets, blend.shares(samples), strict=True):
            epochs = count / len(dataset)
            place = f"stage {stage.number + 1}: " if config.stages else ""
            logger.info("%s%s: %s: %s; %.3g epochs", place, key, source.prefix, dataset.packing.account, epochs)
        open_validation(stage.config)


def is_unbuilt(data: DataConfig) -> bool:
    """Whether data.corpus is asked for a file that is not there yet."""
    blends = [data.train, data.validation or []]
    return data.corpus is not None and any(
        not Path(source.prefix + ".idx").exists() for blend in blends for source in blend
    )


def open_training(stage: StageRun) -> Blend:
    """The checked training files of a stage. Raises UserError."""
    key, data, vocab_size = stage.train_key, stage.config.data, stage.config.model.vocab_size
    files = [check_token_file(name, source.prefix, vocab_size) for name, source in name_sources(key, data.train)]
    if data.validation_share:
        files = [split_file(file, data.validation_share)[0] for file in files]
    blend = _make_blend(files, data.train, data)
    for (name, _), dataset in zip(name_sources(key, data.train), blend.datasets, strict=True):
        _check_samples(name, dataset, 1, data, "the sequence length")
    return blend


def open_validation(config: RunConfig) -> ValidationSamples | None:
    """The samples of training.validation_batches global batches: of the checked validation files, or of the training
    files' last documents; None without. Raises UserError."""
    data, training, vocab_size = config.data, config.training, config.model.vocab_size
    samples = training.validation_batches * training.global_batch_size
    if data.validation is not None:
        key, sources = "data.validation", data.validation
        files = [check_token_file(name, source.prefix, vocab_size) for name, source in name_sources(key, sources)]
    elif data.validation_share:
        key, sources = "data.train", data.train
        files = [check_token_file(name, source.prefix, vocab_size) for name, source in name_sources(key, sources)]
        files = [split_file(file, data.validation_share)[1] for file in files]
    else:
        return None
    blend = _make_blend(files, sources, data)
    names = [name for name, _ in name_sources(key, sources)]
    for name, dataset, count in zip(names, blend.datasets, blend.shares(samples), strict=True):
        _check_samples(name, dataset, count, data, "training.validation_batches")
    return ValidationSamples(blend, samples)


def name_sources(key: str, sources: list[Source]) -> list[tuple[str, Source]]:
    """Each source with its dotted key; a file alone has that of the blend."""
    if len(sources) == 1:
        return [(key, sources[0])]
    return [(f"{key}.{number}.prefix", source) for number, source in enumerate(sources)]


def split_file(file: TokenFile, share: float) -> tuple[TokenFile, TokenFile]:
    """A file's documents but the last, and the last, which hold `share` of its tokens. Raises UserError."""
    offsets_D1 = file.offsets_D1
    first = int(np.searchsorted(offsets_D1, (1 - share) * offsets_D1[-1]))
    if not 0 < first < len(offsets_D1) - 1:
        raise UserError(
            f"data.validation_share: {share:g} of {file.prefix} ({len(offsets_D1) - 1} documents) leaves no whole "
            "document on one side; give data.validation, a larger share or a file of more documents"
        )
    return replace(file, offsets_D1=offsets_D1[: first + 1]), replace(file, offsets_D1=offsets_D1[first:])


def _make_blend(files: list[TokenFile], sources: list[Source], data: DataConfig) -> Blend:
    return Blend([TokenDataset(file, data) for file in files], [source.weight for source in sources])


def _check_samples(key: str, dataset: TokenDataset, needed: int, data: DataConfig, lower: str) -> None:
    account = dataset.packing.account
    if account.samples < needed:
        raise UserError(
            f"{key}: {dataset.prefix} has {account.tokens} tokens, {account.samples} samples of data.sequence_length "
            f"{data.sequence_length}; {needed} are needed, lower {lower} or give a larger file"
        )
