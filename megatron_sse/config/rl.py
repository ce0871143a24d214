"""The settings of reinforcement learning on prompts with answers that can be checked."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megatron_sse.config.problem import show
from megatron_sse.config.section import Count, Name, NonNegative, Positive, Section, Size0

Algorithm = Literal["grpo", "dr_grpo", "dapo", "gspo"]
# Rewards that have a name; others are given as module:function.
EXACT, MATH = NAMED_REWARDS = ("exact", "math")
# Answers that are generated at the same time on a process, where no setting says how many.
ANSWERS_AT_ONCE = 256
# DAPO's bound above the ratio (arXiv 2503.14476, 4.1).
_DAPO_HIGH = 0.28


def _check_reward(name: str) -> str:
    module, colon, function = name.partition(":")
    is_function = colon and function.isidentifier() and all(map(str.isidentifier, module.split(".")))
    if name not in NAMED_REWARDS and not is_function:
        text = f"got {show(name)}, allowed {', '.join(NAMED_REWARDS)} or module:function"
        raise PydanticCustomError("setting", "{text}", {"text": text})
    return name


class Reward(Section):
    """A function that scores what was generated, and the factor of its scores in the sum."""

    function: Annotated[Name, AfterValidator(_check_reward)]
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0


def _as_rewards(value: Any) -> Any:
    """Return a list of rewards; one name becomes a list of one."""
    if isinstance(value, str):
        return [{"function": value}]
    if not (isinstance(value, list) and value):
        text = f"got {show(value)}, allowed a reward or a list of {{function: ..., weight: ...}}"
        raise PydanticCustomError("setting", "{text}", {"text": text})
    return value


Rewards = Annotated[list[Reward], BeforeValidator(_as_rewards)]


class RLConfig(Section):
    prompts: Name
    validation_prompts: Name | None = None
    reward: Rewards = Field(default_factory=lambda: [Reward(function=EXACT)])
    group_size: Annotated[int, Field(ge=2, le=1 << 16)] = 8
    prompts_per_step: Count
    max_new_tokens: Count
    answers_at_once: Count = ANSWERS_AT_ONCE
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    algorithm: Algorithm = "grpo"
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    # None: that of the algorithm.
    clip_high: Positive | None = None
    resample_rounds: Size0 = 0
    overlong_buffer: Size0 = 0
    kl: NonNegative = 0.0
    updates_per_batch: Count = 1
    balance_loss: NonNegative = 0.0
    replay_routing: bool = False
    share_prefixes: bool = False

    @property
    def rollouts_per_step(self) -> int:
        """Answers that are generated in a step."""
        return self.prompts_per_step * self.group_size

    @property
    def upper_clip(self) -> float:
        """How far a ratio may lie above 1: rl.clip_high, or what the algorithm's paper has."""
        if self.clip_high is not None:
            return self.clip_high
        return _DAPO_HIGH if self.algorithm == "dapo" else self.clip
