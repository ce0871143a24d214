"""Token files and tasks mixed by weights, and the order in which a run sees their samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sse.data.dataset import Sample, TokenDataset
from megatron_sse.data.tasks.dataset import TaskDataset

Dataset = TokenDataset | TaskDataset


class SampleOrder:
    """The sample at each position: every epoch is a permutation of its own, drawn from the seed and the epoch."""

    def __init__(self, num_samples: int, seed: list[int]):
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = -1
        self.permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, rest = divmod(position, self.num_samples)
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([*self.seed, epoch]))
            self.permutation = generator.permutation(self.num_samples)
            self.epoch = epoch
        return int(self.permutation[rest])


class Blend:
    """Datasets mixed so that every stretch of positions has about the shares of their weights.

    The order does not depend on the length of the run. A dataset that is shorter than its share is seen several times.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: list[float]) -> None:
        self.datasets = datasets
        self.weights = np.array(weights, dtype=np.float64) / sum(weights)
        self._grow(1)

    def _grow(self, size: int) -> None:
        """Compute for the first `size` positions the dataset, and how many of its samples came before."""
        self.dataset_n, self.place_n = np.zeros(size, dtype=np.int16), np.arange(size, dtype=np.int64)
        if len(self.datasets) == 1:
            return
        # Its import takes seconds, which a launcher would spend too.
        from megatron.core.datasets import helpers

        helpers.build_blending_indices(self.dataset_n, self.place_n, self.weights, len(self.datasets), size, False)

    def place(self, position: int) -> tuple[int, int]:
        """Return the dataset at a position, and how many of its samples came before."""
        if position >= len(self.dataset_n):
            # Growing does not change what is known: each position follows from those before it.
            self._grow(max(position + 1, 2 * len(self.dataset_n)))
        return int(self.dataset_n[position]), int(self.place_n[position])

    def shares(self, size: int) -> list[int]:
        """Return how many of the first `size` positions each dataset has."""
        self.place(size - 1)
        return np.bincount(self.dataset_n[:size], minlength=len(self.datasets)).tolist()


class TrainingOrder:
    """The samples of a blend in the order in which a run sees them, without end.

    The sample at a position depends on seed and position alone. seed: the numbers of run and stage.
    """

    def __init__(self, blend: Blend, seed: list[int]) -> None:
        self.blend = blend
        self.orders = [
            # A task has endless samples, so each is seen once, in order.
            range(len(dataset)) if isinstance(dataset, TaskDataset) else SampleOrder(len(dataset), [*seed, number])
            for number, dataset in enumerate(blend.datasets)
        ]

    def __getitem__(self, position: int) -> Sample:
        number, place = self.blend.place(position)
        return self.blend.datasets[number][self.orders[number][place]]


class ValidationSamples:
    """`size` samples, always the same: each dataset's share of them is spread evenly over it."""

    def __init__(self, blend: Blend, size: int) -> None:
        self.blend, self.counts = blend, blend.shares(size)

    def __getitem__(self, position: int) -> Sample:
        number, place = self.blend.place(position)
        dataset = self.blend.datasets[number]
        return dataset[place * len(dataset) // self.counts[number]]
