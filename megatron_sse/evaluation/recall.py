"""Accuracy on multi-query associative recall (MQAR)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sse.config import MQARTask
from megatron_sse.data.tasks.mqar import make_recall
from megatron_sse.evaluation.read import Reader


@dataclass(frozen=True)
class Distance:
    """Accuracy on the questions that come `first` to 2 x `first` - 1 tokens after their value."""

    first: int
    questions: int
    accuracy: float


@dataclass(frozen=True)
class Recalled:
    """Accuracy at one length and number of pairs: the share of questions whose value is the likeliest token.

    chance: accuracy of guessing a value.
    """

    length: int
    pairs: int
    accuracy: float
    chance: float
    distances: list[Distance]


def measure_recall(reader: Reader, task: MQARTask, length: int, samples: int, seed: int) -> Recalled:
    """Return the accuracy on `samples` sequences of a length; seed, length, pairs and sample number determine each."""
    made = [make_recall(sample_generator(seed, length, task.pairs, number), task, length) for number in range(samples)]
    wanted = [np.isin(np.arange(length), recall.place_p) for recall in made]
    # q counts the questions of all sequences, in order.
    place_q = np.concatenate([number * length + recall.place_p for number, recall in enumerate(made)])
    answer_q = np.concatenate([recall.answer_p for recall in made])
    distance_q = np.concatenate([recall.distance_p for recall in made])
    right_b, asked_b = np.zeros((2, 64))
    for sequence_w, place_w, logits_wv in reader.logits([recall.tokens_E for recall in made], wanted):
        # place_q is sorted, so the search finds the question asked at each of these places.
        question_w = np.searchsorted(place_q, sequence_w * length + place_w)
        right_w = logits_wv.argmax(-1).cpu().numpy() == answer_q[question_w]
        # Bucket k is for distances from 2^k to 2^(k+1) - 1.
        power_w = np.floor(np.log2(distance_q[question_w])).astype(np.int64)
        right_b += np.bincount(power_w, right_w, minlength=64)
        asked_b += np.bincount(power_w, minlength=64)
    distances = [Distance(1 << int(k), int(asked_b[k]), right_b[k] / asked_b[k]) for k in np.flatnonzero(asked_b)]
    return Recalled(length, task.pairs, float(right_b.sum() / asked_b.sum()), 1 / task.values, distances)


def sample_generator(seed: int, *place: int) -> np.random.Generator:
    """Return the random generator of one sample."""
    return np.random.Generator(np.random.PCG64([seed, *place]))
