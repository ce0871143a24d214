"""Share of hidden numbers that a model finds in long texts, by length and depth."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sse.config import NeedleTask
from megatron_sse.data.tasks.needle import VARIANTS, Needle, least_room, make_needle, score_answer
from megatron_sse.evaluation.read import Reader
from megatron_sse.evaluation.recall import sample_generator
from megatron_sse.inference.cache import Cache
from megatron_sse.inference.run import generate
from megatron_sse.inference.sampling import Sampler
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.pretrained.text import Tokenizer


@dataclass(frozen=True)
class Found:
    """Score at one length and depth: the share of the numbers asked for that were answered, a mean over samples.

    depth: place of the first of these numbers, as a share of the text.
    """

    variant: str
    length: int
    depth: float
    score: float


def measure_needles(
    reader: Reader, tokenizer: Tokenizer, task: NeedleTask, length: int, depth: float, samples: int, seed: int
) -> Found:
    """Return the score of greedy answers to `samples` texts of at most `length` tokens, answers included.

    length: at least least_length(tokenizer, task).
    """
    made = make_samples(tokenizer, task, length, depth, samples, seed)
    score = 0.0
    for first in range(0, samples, reader.batch):
        group = made[first : first + reader.batch]
        texts = answer(reader, tokenizer, group)
        score += sum(score_answer(text, needle.numbers) for text, needle in zip(texts, group, strict=True))
    return Found(task.variant, length, depth, score / samples)


def make_samples(
    tokenizer: Tokenizer, task: NeedleTask, length: int, depth: float, samples: int, seed: int
) -> list[Needle]:
    """Return the texts of a length and depth; other depths hide other numbers in other texts."""
    # The tokens that the tokenizer puts before the text count towards the length.
    room = length - _num_before(tokenizer)
    # Seeds are integers: the depth counts in millionths.
    place = length, list(VARIANTS).index(task.variant), round(depth * 1e6)
    return [
        make_needle(sample_generator(seed, *place, number), task, room, depth, lambda text: count(tokenizer, text))
        for number in range(samples)
    ]


def least_length(tokenizer: Tokenizer, task: NeedleTask) -> int:
    """Return the number of tokens of the longest text without filler, answer included."""
    return _num_before(tokenizer) + least_room(task, lambda text: count(tokenizer, text))


def _num_before(tokenizer: Tokenizer) -> int:
    """Return the number of tokens that a tokenizer puts before a text."""
    return len(tokenizer.encode("a")) - len(tokenizer.encode("a", continues=True))


def count(tokenizer: Tokenizer, text: str) -> int:
    """Return the number of tokens of a text that continues another."""
    return len(tokenizer.encode(text, continues=True))


def answer(reader: Reader, tokenizer: Tokenizer, needles: list[Needle]) -> list[str]:
    """Return the model's greedy answers, with as many tokens as the longest correct answer has."""
    net: LanguageModel = reader.net
    prompts = [tokenizer.encode(needle.prompt) for needle in needles]
    num_tokens = max(count(tokenizer, needle.answer) for needle in needles)
    decoders, texts = [tokenizer.stream() for _ in needles], [""] * len(needles)
    sampler = Sampler(reader.vocab_size)
    for tokens in generate(net, Cache(net, len(needles)), prompts, num_tokens, sampler, tokenizer.end, reader.chunk):
        for place, token in enumerate(tokens):
            # None: this sequence has ended while others continue.
            if token is not None and token != tokenizer.end:
                texts[place] += decoders[place](token)
    return texts
