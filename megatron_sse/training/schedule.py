"""The learning rate as a pure function of the step."""

import math

from megatron_sse.config import OptimizerConfig


def learning_rate(settings: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of step `step` (counted from 1) in a run of `num_steps`.

    It rises linearly to optimizer.learning_rate over the warm-up. Then cosine: it falls to the minimum at the last
    step; wsd: it stays, and falls linearly to the minimum over the last decay_steps steps; constant: it stays.
    """
    highest, lowest, warmup = settings.learning_rate, settings.min_learning_rate, settings.warmup_steps
    if step <= warmup:
        return highest * step / warmup
    if settings.schedule == "cosine":
        progress = min(1.0, (step - warmup) / (num_steps - warmup))
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2
    if settings.schedule == "wsd":
        if step <= num_steps - settings.decay_steps:
            return highest
        progress = min(1.0, (step - num_steps + settings.decay_steps) / settings.decay_steps)
        return highest + (lowest - highest) * progress
    assert settings.schedule == "constant"
    return highest
