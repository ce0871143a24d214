"""Rewards: what an answer is worth. Several are summed with their weights."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence

from megatron_sse.config.rl import EXACT, MATH, Reward
from megatron_sse.data.problems import Problem
from megatron_sse.errors import UserError
from megatron_sse.installed import require

# The reward of an answer that is right; sums of weighted rewards are rounded.
SOLVED = 1 - 1e-9
# Takes prompt, completion and answer.
Score = Callable[[str, str, str], float]


class Scorer:
    """The sum of weighted rewards. Making one imports what they need. Raises UserError.

    key: the setting or argument that names them, for errors.
    """

    def __init__(self, rewards: Sequence[Reward], key: str = "rl.reward") -> None:
        self.key = key
        self.scores = [(reward.function, _find(reward.function, key), reward.weight) for reward in rewards]

    def __call__(self, problem: Problem, completion: str) -> float:
        """Return the reward of a completion. Raises UserError where a function raises or returns no finite number."""
        return sum(weight * self._score(name, score, problem, completion) for name, score, weight in self.scores)

    def _score(self, name: str, score: Score, problem: Problem, completion: str) -> float:
        # A user's function may raise anything.
        try:
            value = float(score(problem.prompt, completion, problem.answer))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.key}: {name} raised {type(error).__name__} ({reason}) for the prompt of {problem.place}"
            ) from None
        if not math.isfinite(value):
            raise UserError(
                f"{self.key}: {name} returned {value}, allowed a finite number, for the prompt of {problem.place}"
            )
        return value


def _find(name: str, key: str) -> Score:
    if name == EXACT:
        return exact
    if name == MATH:
        require("math_verify", f"{key} {MATH}", "rl")
        return verify_math
    module, _, function = name.partition(":")
    # python -m has the folder where it starts on the path; the console script does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    # Importing a user's module runs it.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: {name} cannot be imported ({type(error).__name__}: {reason})") from None
    if not callable(found):
        raise UserError(f"{key}: got {name}, which is no function, allowed one of prompt, completion and answer")
    return found


def exact(prompt: str, completion: str, answer: str) -> float:
    """Return 1 where the last line that is not blank is the answer."""
    lines = completion.strip().splitlines()
    return float(bool(lines) and lines[-1].strip() == answer.strip())


def verify_math(prompt: str, completion: str, answer: str) -> float:
    """Return 1 where the completion's final expression equals the answer mathematically (the package math-verify)."""
    from math_verify import parse, verify

    # As LaTeX where it is not marked as such: what it finds then is the whole of the answer.
    gold = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$")
    return float(verify(gold, parse(completion)))
