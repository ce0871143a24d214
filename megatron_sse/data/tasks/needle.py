"""Numbers hidden in a long text, in the manner of RULER's needle tasks (Hsieh et al., arXiv 2404.06654)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_sse.config import NeedleTask, NeedleVariant

# For each variant: names in the text, numbers per name, and names that the question asks for.
VARIANTS: dict[NeedleVariant, tuple[int, int, int]] = {
    "single": (1, 1, 1),
    "multi_key": (4, 1, 1),
    "multi_value": (1, 4, 1),
    "multi_query": (4, 1, 4),
}
_KINDS = "able bold calm dark eager fair heavy icy jolly keen loud mild neat odd plain quick rare shy tall wise".split()
_THINGS = "ant bell coin door egg farm gate hill inn jar king lamp moon nest oak path rain ship tree vase".split()
_DOES = "finds holds hears keeps leaves likes meets moves needs passes sees shows takes turns wants watches".split()
_NAMES = [f"{kind}-{thing}" for kind in _KINDS for thing in _THINGS]
_LONGEST = max(_NAMES, key=len)


@dataclass(frozen=True)
class Needle:
    """A text with hidden numbers.

    prompt: the text and its question. answer: what should follow. numbers: those in the answer.
    """

    prompt: str
    answer: str
    numbers: tuple[str, ...]


def least_room(task: NeedleTask, count: Callable[[str], int]) -> int:
    """Return the tokens of the longest possible question, answer and facts. count: returns the tokens of a text."""
    names, each, asked = VARIANTS[task.variant]
    facts = _state([_LONGEST] * names, ["8" * task.digits] * (names * each))
    question, answer = _ask([_LONGEST] * asked, ["8" * task.digits] * (asked * each))
    return sum(map(count, facts)) + count(question) + count(answer)


def make_needle(
    generator: np.random.Generator, task: NeedleTask, room: int, depth: float | None, count: Callable[[str], int]
) -> Needle:
    """Make a text whose prompt and answer together have at most `room` tokens, and only a few less.

    room: at least least_room. depth: share of the text that comes before the first fact that is asked for; None draws
    it at random, as for all other facts. count: returns the tokens of a text.
    """
    names, each, asked = VARIANTS[task.variant]
    chosen = generator.permutation(len(_NAMES))[:names]
    hidden_names = [_NAMES[number] for number in chosen]
    numbers = _draw_numbers(generator, names * each, task.digits)
    facts = _state(hidden_names, numbers)
    depths = [generator.random() for _ in facts]
    if depth is not None:
        depths[0] = depth
    # The question follows the order of the facts in the text, so that there is only one right answer.
    order = sorted(range(asked * each), key=lambda k: (depths[k], k))
    found = [numbers[k] for k in order]
    question, answer = _ask([hidden_names[name] for name in dict.fromkeys(k // each for k in order)], found)
    filler = _draw_filler(generator, room - sum(map(count, facts)) - count(question) - count(answer), count)
    while True:
        prompt = _hide(filler, facts, depths) + question
        over = count(prompt) + count(answer) - room
        if over <= 0 or not filler:
            return Needle(prompt, answer, tuple(found))
        # A tokenizer may need more tokens for a text than for its sentences one by one: drop sentences until it fits.
        del filler[-max(1, over // 16) :]


def _state(names: list[str], numbers: list[str]) -> list[str]:
    each = len(numbers) // len(names)
    return [f"The magic number of {names[k // each]} is {number}. " for k, number in enumerate(numbers)]


def _ask(names: list[str], numbers: list[str]) -> tuple[str, str]:
    """Return a question and its answer."""
    several = len(numbers) > 1
    question = f"\nThe magic number{'s' * several} of {', '.join(names)} {'are' if several else 'is'}"
    return question, f" {', '.join(numbers)}."


def _draw_numbers(generator: np.random.Generator, size: int, digits: int) -> list[str]:
    """Draw different numbers that do not start with zero."""
    found: dict[str, None] = {}
    while len(found) < size:
        drawn = generator.integers([1, *[0] * (digits - 1)], 10)
        found["".join(map(str, drawn))] = None
    return list(found)


def _draw_filler(generator: np.random.Generator, room: int, count: Callable[[str], int]) -> list[str]:
    """Draw sentences that together have at most `room` tokens."""
    found: list[str] = []
    while True:
        kinds, things = generator.integers(len(_KINDS), size=2), generator.integers(len(_THINGS), size=2)
        first, second = (f"the {_KINDS[kind]} {_THINGS[thing]}" for kind, thing in zip(kinds, things, strict=True))
        sentence = f"{first.capitalize()} {_DOES[generator.integers(len(_DOES))]} {second}. "
        room -= count(sentence)
        if room < 0:
            return found
        found.append(sentence)


def _hide(filler: list[str], facts: list[str], depths: list[float]) -> str:
    """Return the sentences in order, with each fact inserted after its share of them."""
    place = [(round(depth * len(filler)), depth, k) for k, depth in enumerate(depths)]
    parts: list[str] = []
    done = 0
    for upto, _, k in sorted(place):
        parts += [*filler[done:upto], facts[k]]
        done = upto
    return "".join([*parts, *filler[done:]])


def score_answer(text: str, numbers: tuple[str, ...]) -> float:
    """Return the share of the numbers that appear as words of their own in the first sentence of a text."""
    said = set(text.split(".")[0].replace(",", " ").split())
    return sum(number in said for number in numbers) / len(numbers)
