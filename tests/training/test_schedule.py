"""Learning-rate schedules at their first, last and turning steps."""

import pytest

from megatron_sse.config import OptimizerConfig
from megatron_sse.training.schedule import learning_rate

STEPS = 100


def settings(schedule: str, **more: float) -> OptimizerConfig:
    return OptimizerConfig.model_validate(
        {"learning_rate": 1.0, "min_learning_rate": 0.1, "schedule": schedule, "warmup_steps": 10, **more}
    )


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_the_warm_up_is_linear_and_reaches_the_full_rate(schedule: str) -> None:
    rates = [learning_rate(settings(schedule, decay_steps=20), step, STEPS) for step in range(1, 11)]
    assert rates == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", {11: 0.99973, 55: 0.55, 100: 0.1, 120: 0.1}),
        ("constant", {11: 1.0, 55: 1.0, 100: 1.0}),
        ("wsd", {11: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 120: 0.1}),
    ],
)
def test_the_rate_after_the_warm_up(schedule: str, rates: dict[int, float]) -> None:
    given = settings(schedule, decay_steps=20)
    assert {step: learning_rate(given, step, STEPS) for step in rates} == pytest.approx(rates, rel=1e-4)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert learning_rate(settings("constant", warmup_steps=0), 1, STEPS) == 1.0


def test_a_warm_up_as_long_as_the_run_is_allowed() -> None:
    assert learning_rate(settings("cosine", warmup_steps=STEPS), STEPS, STEPS) == 1.0


def test_the_rate_falls_step_by_step() -> None:
    rates = [learning_rate(settings("cosine"), step, STEPS) for step in range(10, STEPS + 1)]
    assert rates == sorted(rates, reverse=True)
