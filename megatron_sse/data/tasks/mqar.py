"""Multi-query associative recall (Arora et al., arXiv 2312.04927).

Tokens: the keys from 0 on, then the values, then one token for gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sse.config import MQARTask


@dataclass(frozen=True)
class Recall:
    """A sequence of E tokens with p pairs; the arrays below are in the order of the questions.

    Attributes:
        tokens_E: int64.
        place_p: position of the key's second appearance, where its value has to be predicted.
        answer_p: the value's token.
        distance_p: tokens from the value to the question.
    """

    tokens_E: np.ndarray
    place_p: np.ndarray
    answer_p: np.ndarray
    distance_p: np.ndarray


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
    key_p = generator.permutation(task.keys)[:pairs]
    value_p = task.keys + generator.integers(task.values, size=pairs)
    asked_p = generator.permutation(pairs)
    # Choose which of the items in a row (pairs, questions, gaps) are pairs and which are questions; pairs come first.
    # A pair takes two tokens, so it starts one token later for each pair before it, and all questions come p later.
    item_2p = np.sort(generator.permutation(2 * pairs + gaps)[: 2 * pairs])
    begin_p, place_p = item_2p[:pairs] + np.arange(pairs), item_2p[pairs:] + pairs
    tokens_E = np.full(length, task.keys + task.values, dtype=np.int64)
    tokens_E[begin_p], tokens_E[begin_p + 1], tokens_E[place_p] = key_p, value_p, key_p[asked_p]
    return Recall(tokens_E, place_p, value_p[asked_p], place_p - begin_p[asked_p] - 1)
