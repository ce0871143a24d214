"""Learning rates of a study: every arm is trained with each of them and one seed, and the best one gets more seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_sse.errors import UserError
from megatron_sse.tools.studies.results import Key, Result, find_results
from megatron_sse.tools.studies.runs import Run, check_same, train_all


def parse_rates(text: str) -> list[float]:
    """Return the learning rates in a string with commas. Raises UserError."""
    try:
        # Folders have the six digits of %g.
        rates = [float(f"{float(rate):g}") for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f"--rates: got {text}, allowed different numbers between 0 and 1, such as 1e-3,3e-3")
    return rates


def add_rates(parser: argparse.ArgumentParser, default: Sequence[float]) -> None:
    """Add the option --rates, which parse_rates reads."""
    text = ",".join(f"{rate:g}" for rate in default)
    parser.add_argument("--rates", metavar="LIST", default=text, help=f"learning rates to choose from; default {text}")


def train_by_rate(
    options: argparse.Namespace,
    arms: Sequence[str],
    rates: Sequence[float],
    make: Callable[[str, float, int], Run],
    finish: Callable[[Run, Any], Result],
) -> int:
    """Train seed 0 of all arms with all rates, then the other seeds with each arm's best, and return how many failed.

    options: those of all studies (command.py). make: the run of an arm, a rate and a seed. finish: makes its result of
    what was measured. Raises UserError where a run was started, or has a result, with other settings.
    """

    def train(runs: list[Run]) -> int:
        done = find_results(options.output, rate_key)
        for run in runs:
            check_same(options.output, run, done.get(run.key))
        return train_all(runs, done, options.workers, finish, lambda made: f"validation loss {made['validation']:.4f}")

    failed = train([make(arm, rate, 0) for rate in rates for arm in arms])
    best = best_rates(find_results(options.output, rate_key).values(), rates)
    for arm in sorted(set(arms) - set(best)):
        print(f"{arm}: no more seeds, since not every learning rate has a result", flush=True)
    more = [make(arm, best[arm], seed) for seed in range(1, options.seeds) for arm in arms if arm in best]
    return failed + train(more)


def best_rates(results: Iterable[Result], rates: Sequence[float]) -> dict[str, float]:
    """Return for each arm the rate with the least validation loss with seed 0, once all rates have one."""
    losses: dict[str, dict[float, float]] = {}
    for result in results:
        if result["seed"] == 0:
            losses.setdefault(result["arm"], {})[result["learning_rate"]] = result["validation"]
    complete = {arm: by_rate for arm, by_rate in losses.items() if set(by_rate) >= set(rates)}
    return {arm: min(by_rate, key=lambda rate: by_rate[rate]) for arm, by_rate in complete.items()}


def choose_rates(found: dict[str, list[Result]], output: Path) -> dict[str, list[Result]]:
    """Return the results of each arm that has some of seed 0, with its best rate. Raises UserError where none has."""
    best = {arm: chosen(own) for arm, own in found.items() if any(result["seed"] == 0 for result in own)}
    if not best:
        raise UserError(f"--output: {output} has no results of seed 0")
    return best


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
