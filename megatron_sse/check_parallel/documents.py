"""Random packed documents in place of a token file."""

from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.config import RunConfig, choose_layout
from megatron_sse.data.batch import Batch, make_batch
from megatron_sse.data.dataset import Sample
from megatron_sse.data.iterators import rank_positions
from megatron_sse.parallel.sharding import ContextShard

# Documents that end on the edges of context ranks start at multiples of 1/8 of the sequence: edges of up to 8 slots.
EDGES = 8


def make_samples(config: RunConfig) -> list[Sample]:
    """Return every sample of one global batch, drawn with the run's seed.

    In turn: one document, documents of random length (one of a single token among them), documents that end on the
    edges of context ranks, and one long document between short ones.
    """
    length, vocab_size = config.data.sequence_length, config.model.vocab_size
    generator = np.random.default_rng(config.training.seed)
    samples = []
    for number in range(config.training.global_batch_size):
        starts = np.zeros(length + 1, dtype=bool)
        starts[0] = True
        if number % 4 == 1:
            chosen = generator.integers(1, length, 6)
            # Two starts in a row make a document of one token.
            starts[[*chosen, chosen[0] + 1]] = True
        elif number % 4 == 2:
            starts[length * generator.integers(1, EDGES, EDGES // 2) // EDGES] = True
        elif number % 4 == 3:
            starts[generator.integers(1, 1 + length // 16, 2)] = True
            starts[generator.integers(length - length // 16, length + 1, 2)] = True
        tokens = generator.integers(0, vocab_size, length + 1)
        samples.append(Sample(tokens, starts, np.ones_like(starts), length + 1))
    return samples


def rank_batches(
    config: RunConfig, groups: ProcessGroupCollection, device: str
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield this rank's micro-batches of the global batch, each with the numbers [B] of its samples."""
    samples = make_samples(config)
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), choose_layout(config)[0])
    training = config.training
    positions = rank_positions(0, len(samples), training.micro_batch_size, groups.dp.rank(), groups.dp.size())
    for chosen in positions:
        if chosen.start >= len(samples):
            return
        batch = make_batch([samples[number] for number in chosen], config.data.reset_at_documents, device, shard)
        yield torch.tensor(chosen), batch
