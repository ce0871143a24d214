"""Multi-query associative recall (Arora et al., arXiv 2312.04927).

Tokens: the keys from 0 on, then the values, then one token for gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sse.config import MQARTask


@dataclass(frozen=True)
class Recall:
    """A sequence of L tokens with P pairs; the arrays below are in the order of the questions.

    Attributes:
        tokens_L: int64.
        place_P: position of the key's second appearance, where its value has to be predicted.
        answer_P: the value's token.
        distance_P: tokens from the value to the question.
    """

    tokens_L: np.ndarray
    place_P: np.ndarray
    answer_P: np.ndarray
    distance_P: np.ndarray


def vocabulary_of(task: MQARTask) -> int:
    """Return the vocabulary size that a model of the task needs."""
    return task.keys + task.values + 1


def make_recall(generator: np.random.Generator, task: MQARTask, length: int) -> Recall:
    """Return a sequence of pairs (key, value), then each key once more in another order (the questions).

    Gaps fall anywhere except inside a pair. length: of the sequence, at least 3 tokens for each pair. Keys differ,
    values may be equal.
    """
    pairs = task.pairs
    gaps = length - 3 * pairs
    assert gaps >= 0 and pairs <= task.keys
    key_P = generator.permutation(task.keys)[:pairs]
    value_P = task.keys + generator.integers(task.values, size=pairs)
    asked_P = generator.permutation(pairs)
    # Choose which of the items in a row (pairs, questions, gaps) are pairs and which are questions; pairs come first.
    # A pair takes two tokens, so it starts one token later for each pair before it, and all questions come P later.
    item_2P = np.sort(generator.permutation(2 * pairs + gaps)[: 2 * pairs])
    begin_P, place_P = item_2P[:pairs] + np.arange(pairs), item_2P[pairs:] + pairs
    tokens_L = np.full(length, task.keys + task.values, dtype=np.int64)
    tokens_L[begin_P], tokens_L[begin_P + 1], tokens_L[place_P] = key_P, value_P, key_P[asked_P]
    return Recall(tokens_L, place_P, value_P[asked_P], place_P - begin_P[asked_P] - 1)
