"""Endless training batches and repeatable validation batches of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.config import RunConfig, choose_layout
from megatron_sse.data.batch import Batch, make_batch
from megatron_sse.data.checks import check_token_file
from megatron_sse.data.dataset import SampleOrder, TokenDataset
from megatron_sse.parallel.sharding import ContextShard

ValidationFactory = Callable[[], Iterator[Batch]]


def build_data_iterators(
    config: RunConfig, groups: ProcessGroupCollection, consumed_samples: int, device: torch.device | str = "cpu"
) -> tuple[Iterator[Batch], ValidationFactory | None]:
    """Training iterator, and a function that starts the validation batches anew (None without data.validation).

    Each `next` is one micro-batch of this data-parallel rank, the same on its tensor and pipeline ranks; a context rank
    has its part of it. Training goes on after `consumed_samples` samples and never ends; a validation iterator ends
    after training.validation_batches global batches, always the same ones. Raises UserError on a wrong file.
    """
    data, training = config.data, config.training
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), choose_layout(config)[0])
    vocab_size = config.model.vocab_size

    def positions(first: int) -> Iterator[range]:
        return rank_positions(
            first, training.global_batch_size, training.micro_batch_size, groups.dp.rank(), groups.dp.size()
        )

    train_index = check_token_file("data.train", data.train, vocab_size, data.sequence_length)
    train = TokenDataset(data.train, train_index, data.sequence_length)
    order = SampleOrder(len(train), training.seed)

    def train_batches() -> Iterator[Batch]:
        for chosen in positions(consumed_samples):
            yield make_batch([train[order[position]] for position in chosen], data.reset_at_documents, device, shard)

    if not data.validation:
        return train_batches(), None

    needed = training.validation_batches * training.global_batch_size
    validation_index = check_token_file("data.validation", data.validation, vocab_size, data.sequence_length, needed)
    validation = TokenDataset(data.validation, validation_index, data.sequence_length)

    def validation_batches() -> Iterator[Batch]:
        for chosen in positions(0):
            if chosen.start >= needed:
                return
            # Evenly over the file, so that a few batches speak for all of it.
            samples = [validation[position * len(validation) // needed] for position in chosen]
            yield make_batch(samples, data.reset_at_documents, device, shard)

    return train_batches(), validation_batches


def rank_positions(first: int, global_batch: int, micro_batch: int, rank: int, size: int) -> Iterator[range]:
    """Positions in the sample order of this rank's micro-batches, endlessly, from position `first` on.

    Micro-batch m of the global batch at s is split between the ranks in turn: rank r takes `micro_batch` positions
    from s + (m * size + r) * micro_batch on, so that the global batch is the same at any data-parallel size.
    """
    while True:
        for begin in range(first + rank * micro_batch, first + global_batch, micro_batch * size):
            yield range(begin, begin + micro_batch)
        first += global_batch
