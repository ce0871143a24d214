"""Answers with made-up log-probabilities, and a small run that generates and trains."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sse.config import RunConfig
from megatron_sse.data.problems import Problem
from megatron_sse.rl.advantages import Group
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.rollouts import Rollout

LENGTH = 32
MODEL: dict[str, Any] = {
    "num_layers": 3,
    "layers": "sse, gdn, softmax",
    "hidden_size": 32,
    "vocab_size": 257,
    "init_std": 0.3,
    "sse": {"num_heads": 2, "head_dim": 8, "num_partitions": 3, "num_writers": 2, "num_readers": 1},
    "softmax": {"num_heads": 4, "num_kv_heads": 2},
}


def make_groups(vocab_size: int = 257, seed: int = 0) -> list[Group]:
    """Return three groups of four answers of 1 to 9 tokens, with random log-probabilities; the last has no spread."""
    draw = np.random.default_rng(seed)
    groups = []
    for number, rewards in enumerate(([1.0, 0.0, 0.0, 1.0], [0.5, 0.0, -2.0, 1.0], [1.0] * 4)):
        tokens = draw.integers(0, vocab_size, draw.integers(1, 8)).tolist()
        prompt = Prompt(Problem("p", None, "1", f"p:{number}"), tokens, None)
        rollouts = []
        for _ in rewards:
            drawn = draw.integers(0, vocab_size, draw.integers(1, 10)).tolist()
            logp_T = -draw.exponential(2.0, len(drawn)).astype(np.float32)
            rollouts.append(Rollout(drawn, logp_T, is_cut=False))
        groups.append(Group(prompt, rollouts, list(rewards)))
    return groups


def policy_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Return a run on prompts in `folder` whose reward is whether an answer has an even number of letters."""
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        rows = [{"prompt": f"{number} " * (1 + number % 3), "answer": str(number)} for number in range(7)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "data": {"sequence_length": LENGTH},
        "training": {"steps": 3, "micro_batch_size": 1, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-2, "clip_grad": 1e9},
        "rl": {
            "prompts": str(prompts),
            "group_size": 4,
            "prompts_per_step": 3,
            "max_new_tokens": 8,
            "reward": "tests.rl.support:is_even",
        },
        "monitor": {"folder": str(folder / "run"), "tensorboard": False, "health_interval": 1000},
    }
    merged = {name: {**values.get(name, {}), **sections.get(name, {})} for name in values | sections}
    return RunConfig.model_validate(merged)


def is_even(prompt: str, completion: str, answer: str) -> float:
    return float(sum(map(ord, completion)) % 2 == 0)


def fails_on_rank_1(prompt: str, completion: str, answer: str) -> float:
    return math.inf if os.environ["RANK"] == "1" else 0.0
