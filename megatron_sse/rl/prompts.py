"""The prompts of a run as tokens, and the order in which steps take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sse.config import RunConfig
from megatron_sse.data.problems import Problem, read_problems
from megatron_sse.data.tokenizer import VOCAB_SIZE
from megatron_sse.errors import UserError
from megatron_sse.inference.prompts import check_tokens
from megatron_sse.pretrained.chat import Chat, open_chat
from megatron_sse.pretrained.open import Model, open_model
from megatron_sse.pretrained.text import ByteTokenizer, Tokenizer, open_tokenizer


@dataclass(frozen=True)
class Prompt:
    """A problem with its prompt as tokens. end: the token that ends its answer."""

    problem: Problem
    tokens: list[int]
    end: int | None


class Texts:
    """From problems to tokens and back, with the tokenizer and the chat template of a model."""

    def __init__(self, tokenizer: Tokenizer, model: Model | None) -> None:
        self.tokenizer, self.model = tokenizer, model
        self._chat: Chat | None = None

    def encode(self, problem: Problem) -> Prompt:
        """Return a problem's prompt. Raises UserError."""
        if problem.messages is None:
            return Prompt(problem, self.tokenizer.encode(problem.prompt), self.tokenizer.end)
        chat = self._open_chat(problem)
        return Prompt(problem, chat.encode(problem.messages, f"{problem.place}: messages"), chat.end)

    def decode(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        """Return the text of an answer, without its end."""
        text = self.tokenizer.decode([token for token in tokens if token != prompt.end])
        return text if prompt.problem.messages is None else text.removesuffix(self._open_chat(prompt.problem).closing)

    def _open_chat(self, problem: Problem) -> Chat:
        if self._chat is None:
            if self.model is None:
                raise UserError(
                    f"{problem.place}: messages: need checkpoint.load_weights, whose chat template renders them; give "
                    "it, or a prompt"
                )
            key = f"{problem.place}: messages"
            self._chat = open_chat(self.model, self.tokenizer, key, "give a prompt in place of the messages")
        return self._chat


def open_texts(config: RunConfig, checkpoint: Path | None) -> Texts:
    """Return the texts of the checkpoint that a run starts or resumes from; byte tokens without one.

    Raises UserError.
    """
    if checkpoint is not None:
        model = open_model("checkpoint.load_weights", checkpoint)
        return Texts(open_tokenizer(model), model)
    if config.model.vocab_size == VOCAB_SIZE:
        return Texts(ByteTokenizer(), None)
    raise UserError(
        f"checkpoint.load_weights: got null, allowed a checkpoint with a tokenizer: {config.model.vocab_size} tokens "
        f"are not the {VOCAB_SIZE} byte tokens"
    )


def read_prompts(key: str, file: str, texts: Texts, vocab_size: int, longest: int, why: str) -> list[Prompt]:
    """Return the prompts of a JSONL file as tokens.

    longest: tokens that a prompt may have. why: what bounds them, for the message. Raises UserError; also where no
    token ends an answer.
    """
    prompts = []
    for problem in read_problems(key, file):
        prompt = texts.encode(problem)
        if not 1 <= len(prompt.tokens) <= longest:
            raise UserError(
                f"{problem.place}: got a prompt of {len(prompt.tokens)} tokens, allowed 1 to {longest}, {why}"
            )
        check_tokens(problem.place, prompt.tokens, vocab_size)
        if prompt.end is None:
            raise UserError(
                f"{problem.place}: the tokenizer has no token that ends an answer, so that none would end; give it an "
                "eos_token, or a chat template that ends answers with a special token"
            )
        prompts.append(prompt)
    return prompts


def read_run_prompts(config: RunConfig, texts: Texts) -> tuple[list[Prompt], list[Prompt]]:
    """Return a run's prompts, and those held out (none where there are none). Raises UserError."""
    rl = config.rl
    assert rl is not None
    longest = config.data.sequence_length - rl.max_new_tokens
    why = "what rl.max_new_tokens leaves of data.sequence_length"
    vocab_size = config.model.vocab_size
    prompts = read_prompts("rl.prompts", rl.prompts, texts, vocab_size, longest, why)
    if rl.validation_prompts is None:
        return prompts, []
    return prompts, read_prompts("rl.validation_prompts", rl.validation_prompts, texts, vocab_size, longest, why)


def choose(count: int, first: int, number: int, seed: int) -> list[int]:
    """Return which of `count` prompts are at the places `first` to `first + number - 1` of a run.

    Each epoch takes every prompt once, in an order of its own; the place is all that a checkpoint has to keep.
    """
    orders: dict[int, np.ndarray] = {}
    chosen = []
    for place in range(first, first + number):
        epoch, at = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        chosen.append(int(orders[epoch][at]))
    return chosen
