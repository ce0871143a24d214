"""Endless training batches and repeatable validation batches of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.config import StageRun, choose_layout
from megatron_sse.data.batch import Batch, make_batch
from megatron_sse.data.blend import TrainingOrder, ValidationSamples
from megatron_sse.data.sources import open_training, open_validation
from megatron_sse.parallel.sharding import ContextShard

ValidationFactory = Callable[[], Iterator[Batch]]


def build_data_iterators(
    stage: StageRun, groups: ProcessGroupCollection, consumed_samples: int, device: torch.device | str = "cpu"
) -> tuple[Iterator[Batch], ValidationFactory | None]:
    """Return the training iterator, and a function that returns a new validation iterator (None without such data).

    Each `next` is one micro-batch of this data-parallel rank, the same on its tensor and pipeline ranks; a context rank
    gets its part of it. Training continues after `consumed_samples` samples of the stage and never ends; a validation
    iterator ends after training.validation_batches global batches, always the same ones. Raises UserError where a file
    is wrong.
    """
    config = stage.config
    data, training = config.data, config.training
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), choose_layout(config)[0])
    train = TrainingOrder(open_training(stage), [training.seed, stage.number])
    validation = open_validation(config)

    def batches(samples: TrainingOrder | ValidationSamples, first: int) -> Iterator[Batch]:
        ranks = groups.dp.rank(), groups.dp.size()
        for chosen in rank_positions(first, training.global_batch_size, training.micro_batch_size, *ranks):
            yield make_batch([samples[position] for position in chosen], data.reset_at_documents, device, shard)

    if validation is None:
        return batches(train, consumed_samples), None
    per_rank = (
        training.validation_batches * training.global_batch_size // (training.micro_batch_size * groups.dp.size())
    )
    return batches(train, consumed_samples), lambda: islice(batches(validation, 0), per_rank)


def rank_positions(first: int, global_batch: int, micro_batch: int, rank: int, size: int) -> Iterator[range]:
    """Yield the positions in the sample order of this rank's micro-batches, endlessly, from position `first` on.

    The ranks take micro-batches in turn: micro-batch m of rank r in the global batch at s starts at
    s + (m * size + r) * micro_batch, so that the global batch is the same at any data-parallel size. With a global
    batch of 8, micro-batches of 2 and two ranks: rank 0 takes 0 1, 4 5 and rank 1 takes 2 3, 6 7.
    """
    while True:
        for begin in range(first + rank * micro_batch, first + global_batch, micro_batch * size):
            yield range(begin, begin + micro_batch)
        first += global_batch
