"""The samples of a task, for training and validation."""

from __future__ import annotations

import numpy as np

from megatron_sse.config import DataConfig, MQARTask, NeedleTask
from megatron_sse.data.dataset import Sample
from megatron_sse.data.tasks.mqar import make_recall
from megatron_sse.data.tasks.needle import make_needle
from megatron_sse.data.tokenizer import END_OF_DOCUMENT

# The nominal number of samples: more than any run sees.
ENDLESS = 1 << 62


class TaskDataset:
    """Generated samples: each depends on its number and the seed alone, and only its answers count as labels."""

    def __init__(self, task: MQARTask | NeedleTask, data: DataConfig, seed: list[int]) -> None:
        self.task, self.length, self.seed = task, data.sequence_length, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Sample:
        generator = np.random.Generator(np.random.PCG64([*self.seed, number]))
        if isinstance(self.task, MQARTask):
            return _recall_sample(generator, self.task, self.length)
        return _needle_sample(generator, self.task, self.length)


def _recall_sample(generator: np.random.Generator, task: MQARTask, length: int) -> Sample:
    """Return a recall sample, whose labels are the values at the places where their keys appear again.

    The token after such a key is not the value (it is a gap or the next key), so labels differ from tokens.
    """
    recall = make_recall(generator, task, length)
    tokens_E1 = np.append(recall.tokens_E, 0)
    labels_E1, counts_E1 = tokens_E1.copy(), np.zeros(length + 1, dtype=bool)
    labels_E1[recall.place_p + 1], counts_E1[recall.place_p + 1] = recall.answer_p, True
    return Sample(tokens_E1, _starts(length + 1, length + 1), counts_E1, length + 1, labels_E1, of_task=True)


def _needle_sample(generator: np.random.Generator, task: NeedleTask, length: int) -> Sample:
    """Return byte tokens of a text, then its answer and the end of the document, which both count; then padding."""
    # The sample has one token more than the model reads, and the end of the document takes it.
    needle = make_needle(generator, task, length, None, len)
    prompt, answer = needle.prompt.encode(), needle.answer.encode()
    tokens = [*prompt, *answer, END_OF_DOCUMENT]
    tokens_E1, counts_E1 = np.zeros(length + 1, dtype=np.int64), np.zeros(length + 1, dtype=bool)
    tokens_E1[: len(tokens)], counts_E1[len(prompt) : len(tokens)] = tokens, True
    return Sample(tokens_E1, _starts(length + 1, len(tokens)), counts_E1, len(tokens), of_task=True)


def _starts(room: int, length: int) -> np.ndarray:
    """Return the starts of one document and, where it does not fill the room, of the padding."""
    starts_E1 = np.zeros(room, dtype=bool)
    starts_E1[[0, *range(length, min(length + 1, room))]] = True
    return starts_E1
