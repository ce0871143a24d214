"""Problems with answers that can be checked: how many a model solves, with one try and with several."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_sse.config import RunConfig
from megatron_sse.config.rl import ANSWERS_AT_ONCE, EXACT, Reward
from megatron_sse.errors import UserError
from megatron_sse.evaluation.request import Request
from megatron_sse.inference.sampling import KeyedSampler, make_key
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.pretrained.open import Model
from megatron_sse.pretrained.text import open_tokenizer
from megatron_sse.rl.prompts import Prompt, Texts, read_prompts
from megatron_sse.rl.rewards import SOLVED, Scorer
from megatron_sse.rl.rollouts import generate

# Tokens of an answer, where neither the request nor the model's run says how many.
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Solved:
    """Results of a model on a file of prompts, over several tries of each.

    pass_at_1: share of tries with a reward of 1. pass_at_k: share of prompts that one try at least solves. majority:
    share of prompts whose most frequent last line is of a try with a reward of 1. length: tokens of a try. cut_off:
    share of tries without an end.
    """

    file: str
    prompts: int
    tries: int
    temperature: float
    reward: float
    pass_at_1: float
    pass_at_k: float
    majority: float
    length: float
    cut_off: float


@dataclass(frozen=True)
class Solving:
    """A request to solve problems, with its files read and checked."""

    file: str
    prompts: list[Prompt]
    texts: Texts
    scorer: Scorer
    max_tokens: int
    sampler: KeyedSampler
    tries: int
    at_once: int
    seed: int


def prepare(request: Request, model: Model, config: RunConfig, longest: int) -> Solving:
    """Read what is asked for; what is not is as in the run that made the model. Raises UserError.

    longest: tokens of a prompt with its answer.
    """
    rl = model.config.rl
    file = request.prompts or (None if rl is None else rl.validation_prompts)
    if file is None:
        raise UserError(
            "--prompts: not given, and the model's run has no rl.validation_prompts; give a JSONL or Parquet file"
        )
    reward = request.reward or EXACT
    try:
        rewards = [Reward(function=reward)] if request.reward or rl is None else rl.reward
    except ValueError:
        raise UserError(f"--reward: got {reward!r}, allowed exact, math or module:function") from None
    max_tokens = request.max_tokens or (MAX_TOKENS if rl is None else rl.max_new_tokens)
    if max_tokens >= longest:
        key = "--max-tokens" if request.max_tokens else "rl.max_new_tokens of the model's run"
        raise UserError(f"{key}: got {max_tokens}, allowed less than {longest}, with --any-length more")
    temperature = request.temperature
    if temperature is None:
        temperature = 1.0 if rl is None else rl.temperature
    texts = Texts(open_tokenizer(model), model)
    vocab_size = config.model.vocab_size
    key = "--prompts" if request.prompts else "rl.validation_prompts of the model's run"
    why = f"what answers of {max_tokens} tokens leave"
    prompts = read_prompts(key, file, texts, vocab_size, longest - max_tokens, why)
    sampler = KeyedSampler(vocab_size, temperature, request.top_p)
    # The likeliest tokens are the same in every try.
    tries = request.samples if temperature else 1
    scorer = Scorer(rewards, "--reward" if request.reward else "rl.reward of the model's run")
    at_once = ANSWERS_AT_ONCE if rl is None else rl.answers_at_once
    return Solving(file, prompts, texts, scorer, max_tokens, sampler, tries, at_once, request.seed)


def solve(net: LanguageModel, job: Solving) -> Solved:
    """Let a model answer each prompt several times. Raises UserError where a reward fails."""
    keys = [[make_key(job.seed, number, each) for each in range(job.tries)] for number in range(len(job.prompts))]
    rollouts = generate(net, job.prompts, keys, job.max_tokens, job.sampler, job.at_once)
    rewards, majority = [], []
    for prompt, group in zip(job.prompts, rollouts, strict=True):
        texts = [job.texts.decode(prompt, rollout.tokens) for rollout in group]
        rewards.append([job.scorer(prompt.problem, text) for text in texts])
        lines = [(text.strip().splitlines() or [""])[-1].strip() for text in texts]
        [(chosen, _)] = Counter(lines).most_common(1)
        majority.append(rewards[-1][lines.index(chosen)] >= SOLVED)
    solved = np.array(rewards) >= SOLVED
    flat = [rollout for group in rollouts for rollout in group]
    return Solved(
        job.file,
        len(job.prompts),
        job.tries,
        job.sampler.temperature,
        reward=float(np.mean(rewards)),
        pass_at_1=float(solved.mean()),
        pass_at_k=float(solved.any(1).mean()),
        majority=float(np.mean(majority)),
        length=float(np.mean([len(rollout.tokens) for rollout in flat])),
        cut_off=float(np.mean([rollout.is_cut for rollout in flat])),
    )
