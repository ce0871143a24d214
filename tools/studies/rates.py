"""Learning rates of a study: every arm is trained with each of them and one seed, and the best one gets more seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from megatron_sse.errors import UserError
from megatron_sse.tools.studies.results import Key, Result
from megatron_sse.tools.studies.runs import Run


def parse_rates(text: str) -> list[float]:
    """Return the learning rates in a string with commas. Raises UserError."""
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f"--rates: got {text}, allowed different numbers between 0 and 1, such as 1e-3,3e-3")
    return rates


def train_by_rate(
    arms: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    make: Callable[[str, float, int], Run],
    train: Callable[[list[Run]], int],
    read: Callable[[], Iterable[Result]],
) -> int:
    """Train seed 0 of all arms with all rates, then the other seeds with each arm's best, and return how many failed.

    make: the run of an arm, a rate and a seed. train: trains runs, and returns how many failed. read: all results.
    """
    failed = train([make(arm, rate, 0) for rate in rates for arm in arms])
    best = best_rates(read(), rates)
    more = [make(arm, best[arm], seed) for seed in range(1, seeds) for arm in arms if arm in best]
    return failed + train(more)


def best_rates(results: Iterable[Result], rates: Sequence[float]) -> dict[str, float]:
    """Return for each arm the rate with the least validation loss with seed 0, once all rates have one."""
    losses: dict[str, dict[float, float]] = {}
    for result in results:
        if result["seed"] == 0:
            losses.setdefault(result["arm"], {})[result["learning_rate"]] = result["validation"]
    complete = {arm: by_rate for arm, by_rate in losses.items() if set(by_rate) >= set(rates)}
    return {arm: min(by_rate, key=lambda rate: by_rate[rate]) for arm, by_rate in complete.items()}


def chosen(results: list[Result]) -> list[Result]:
    """Return an arm's results, by seed, with the rate that is best with seed 0."""
    best = min((result for result in results if result["seed"] == 0), key=lambda result: result["validation"])
    same = [result for result in results if result["learning_rate"] == best["learning_rate"]]
    return sorted(same, key=lambda result: result["seed"])


def rate_settings(rate: float, seed: int) -> list[str]:
    """Return the settings of a run."""
    return [f"optimizer.learning_rate={rate:g}", f"training.seed={seed}"]


def rate_folder(rate: float, seed: int) -> str:
    """Return the name of a run's folder inside its arm's."""
    return f"lr_{rate:g}_seed_{seed}"


def rate_key(result: Result) -> Key:
    """Return what names the run of a result."""
    return run_key(result["arm"], result["learning_rate"], result["seed"])


def run_key(arm: str, rate: float, seed: int) -> Key:
    """Return what names a run."""
    return arm, f"learning rate {rate:g}", f"seed {seed}"
