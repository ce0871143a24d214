"""Learning rates of a study: every arm is trained with each of them and one seed, and the best one gets more seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sse.errors import UserError
from megatron_sse.tools.studies.command import find_arms, group_by_arm
from megatron_sse.tools.studies.results import Key, Result, find_results
from megatron_sse.tools.studies.runs import Run, check_same, check_writable, make_run, train_all
from megatron_sse.tools.studies.sizes import num_parameters, state_elements

# Checkpoints of a run, from which it resumes.
POINTS = 4


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
    settings: Mapping[str, list[str]],
    measure: tuple[str, ...],
    finish: Callable[[Any], Result],
) -> int:
    """Train seed 0 of all arms with all rates, then the other seeds with each arm's best, and return how many failed.

    options: those of all studies (command.py). settings: of each arm. measure: as in runs.Run. finish: makes of what
    was measured the result's own entries, among them "validation", the loss that rates are chosen by. Raises UserError
    where a run was started, measured, or has a result, with other settings.
    """
    rates = parse_rates(options.rates)
    check_writable(options.output)

    def make(arm: str, rate: float, seed: int) -> Run:
        own = [*settings[arm], f"optimizer.learning_rate={rate:g}", f"training.seed={seed}"]
        folder = options.output / arm / f"lr_{rate:g}_seed_{seed}"
        return make_run(_name(arm, rate, seed), folder, options.config, own, POINTS, measure)

    def train(runs: list[Run]) -> int:
        done = find_results(options.output, rate_key)
        for run in runs:
            check_same(options.output, run, done.get(run.key))
        return train_all(
            runs,
            done,
            options.workers,
            lambda run, measured: _describe(run) | finish(measured),
            lambda result: f"validation loss {result['validation']:.4f}",
        )

    failed = train([make(arm, rate, 0) for rate in rates for arm in settings])
    best = best_rates(find_results(options.output, rate_key).values(), rates)
    for arm in sorted(set(settings) - set(best)):
        print(f"{arm}: no more seeds, since not every learning rate has a result", flush=True)
    more = [(arm, seed) for seed in range(1, options.seeds) for arm in settings if arm in best]
    return failed + train([make(arm, best[arm], seed) for arm, seed in more])


def _describe(run: Run) -> Result:
    """Return what every result of such a study has: names, sizes and the tokens that were trained on."""
    config = run.config
    names = {"arm": run.key[0], "learning_rate": config.optimizer.learning_rate, "seed": config.training.seed}
    sizes = {"parameters": num_parameters(config.model), "state_elements": state_elements(config)}
    tokens = config.data.sequence_length * config.training.global_batch_size * config.training.steps
    return names | sizes | {"tokens": tokens}


def read_results(options: argparse.Namespace, arms: Collection[str]) -> dict[str, list[Result]]:
    """Return the results of each arm by seed. Raises UserError for unknown arms in --arms and where there are none."""
    find_arms(options.arms, arms)
    return group_by_arm(find_results(options.output, rate_key).values(), arms, options.output)


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


def rate_key(result: Result) -> Key:
    """Return what names the run of a result."""
    return _name(result["arm"], result["learning_rate"], result["seed"])


def _name(arm: str, rate: float, seed: int) -> Key:
    return arm, f"learning rate {rate:g}", f"seed {seed}"
