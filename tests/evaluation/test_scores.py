"""Scores of models that know the answers, and of models that do not."""

import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sse.config import MQARTask, NeedleTask
from megatron_sse.evaluation import needles
from megatron_sse.evaluation.needles import make_samples, measure_needles
from megatron_sse.evaluation.read import Reader
from megatron_sse.evaluation.recall import measure_recall
from megatron_sse.pretrained.text import ByteTokenizer

TASK = MQARTask(pairs=6, keys=12, values=8)


class Oracle(Reader):
    """A reader that answers by looking keys up in a limited number of the last tokens."""

    def __init__(self, memory: int):
        super().__init__(None, TASK.keys + TASK.values + 1, 4, 16)
        object.__setattr__(self, "memory", memory)

    def logits(
        self, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
        for number, (tokens_E, wanted_E) in enumerate(zip(sequences, wanted, strict=True)):
            place_w = np.flatnonzero(wanted_E)
            logits_wv = torch.zeros(len(place_w), self.vocab_size)
            for row, place in enumerate(place_w):
                [given] = np.flatnonzero(tokens_E[:place] == tokens_E[place])
                if place - given - 1 < self.memory:
                    logits_wv[row, tokens_E[given + 1]] = 1
            yield np.full(len(place_w), number), place_w, logits_wv


def test_recall_of_a_model_that_knows_and_one_that_does_not() -> None:
    known = measure_recall(Oracle(1000), TASK, 64, 10, seed=3)
    assert known.accuracy == 1 and known.chance == 1 / 8
    assert sum(distance.questions for distance in known.distances) == 10 * TASK.pairs
    assert measure_recall(Oracle(0), TASK, 64, 10, seed=3).accuracy == 0


def test_recall_by_distance() -> None:
    near = measure_recall(Oracle(16), TASK, 64, 20, seed=3)
    assert [distance.accuracy for distance in near.distances] == [float(d.first < 16) for d in near.distances]
    assert {distance.first for distance in near.distances} >= {4, 8, 16, 32}
    right = sum(distance.questions for distance in near.distances if distance.first < 16)
    assert near.accuracy == right / (20 * TASK.pairs)
    assert measure_recall(Oracle(16), TASK, 64, 20, seed=4) != near


def answer_texts(known: int):
    """Return a replacement for generation that answers the first `known` numbers correctly and 0 for the others."""

    def generate(net, cache, prompts, num_tokens, sampler, end, chunk):
        answers = []
        for prompt in prompts:
            text, question = bytes(prompt).decode().rsplit("\n", 1)
            names = re.fullmatch(r"The magic numbers? of (.*) (?:is|are)", question)[1].split(", ")
            found = [n for name, n in re.findall(r"magic number of (\S+) is (\d+)\.", text) if name in names]
            said = [number if place < known else "0" * len(number) for place, number in enumerate(found)]
            answers.append([*f" {', '.join(said)}.".encode(), end][:num_tokens])
        for step in range(num_tokens):
            yield [answer[step] if step < len(answer) else None for answer in answers]

    return generate


@pytest.mark.parametrize(("known", "scores"), [(9, [1, 1, 1, 1]), (1, [1, 1, 0.25, 0.25]), (0, [0, 0, 0, 0])])
def test_needles_of_models_that_know_some(known: int, scores: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needles, "generate", answer_texts(known))
    monkeypatch.setattr(needles, "Cache", lambda *_: SimpleNamespace())
    reader = Reader(None, 257, 3, 16)
    found = [
        measure_needles(reader, ByteTokenizer(), NeedleTask(variant=variant, digits=4), 700, 0.5, 7, seed=1).score
        for variant in ("single", "multi_key", "multi_value", "multi_query")
    ]
    assert found == scores


def test_texts_are_as_long_as_asked_for() -> None:
    tokenizer, task = ByteTokenizer(), NeedleTask()
    for length in (400, 1000):
        made = make_samples(tokenizer, task, length, 0.5, 5, 0)
        sizes = [len(tokenizer.encode(needle.prompt + needle.answer)) for needle in made]
        assert length - 60 < min(sizes) and max(sizes) <= length
        assert len({needle.numbers for needle in made}) == 5
    other = make_samples(tokenizer, task, 1000, 0.25, 5, 0)
    assert not {needle.numbers for needle in other} & {needle.numbers for needle in made}
