"""The study of language modelling: trains every arm of tools/language_arms.py on real text, and writes a report.

    python -m megatron_sse.tools.language_study --output docs/evidence_language --workers 2

The text is that of Python's own standard library (tools/language_corpus.py), made on the first start. Each arm is
trained with every learning rate and seed 0. The learning rate with the least validation loss then gets the other seeds.
A run takes about five minutes on one core. It is trained by `megatron-sse train` in OUTPUT/ARM/lr_X_seed_S, on one
thread, with a log in train.log; then it is measured on the test text (tools/language_measure.py), its checkpoints are
removed, and result.json stays. The same command resumes after an interrupt: finished runs are skipped, even if only
OUTPUT/results.json has them; others resume at their last checkpoint. Settings after the options hold for all arms. The
report (report.md, results.json and plots, which need the `plot` extra) covers all results in OUTPUT; `--report` writes
it without training. Exit status 0; 1 where a run failed, 2 for a wrong request.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_sse.data.checks import check_token_file
from megatron_sse.errors import INTERRUPT_EXIT, USER_ERROR_EXIT, UserError
from megatron_sse.installed import require
from megatron_sse.tools.language_arms import ARMS, LEARNING_RATES, arm_settings, find_arms
from megatron_sse.tools.language_corpus import TEST, TRAINING, make_corpus
from megatron_sse.tools.studies.results import Key, Result, find_results
from megatron_sse.tools.studies.runs import ROOT, Run, check_same, check_writable, make_run, train_all
from megatron_sse.tools.studies.sizes import num_parameters, state_elements

# Checkpoints on the way, from which an interrupted run resumes; only the last one is measured.
POINTS = 4


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    options = _parse(arguments)
    try:
        require("matplotlib", "plots", "plot")
        from megatron_sse.tools.language_report import write_report

        for name in ("seeds", "workers", "tokens"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name}: got {getattr(options, name)}, allowed 1 or more")
        arms = find_arms(options.arms)
        failed = 0 if options.report else _train(options, arms)
        print(write_report(options.output, read_results(options.output)))
        return 1 if failed else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPT_EXIT


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and report")
    parser.add_argument("--arms", metavar="LIST", help=f"arms to train; default all: {', '.join(ARMS)}")
    rates = ",".join(f"{rate:g}" for rate in LEARNING_RATES)
    parser.add_argument(
        "--rates", metavar="LIST", default=rates, help=f"learning rates to choose from; default {rates}"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each arm; default 3")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--test", metavar="PREFIX", default=TEST, help=f"token file to measure on; default {TEST}")
    parser.add_argument("--tokens", type=int, default=1 << 18, help="tokens of it; default 262144")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "language_study.yaml")
    parser.add_argument("--report", action="store_true", help="write the report without training")
    parser.add_argument("settings", metavar="section.key=value", nargs="*", help="setting for all arms")
    return parser.parse_args(arguments)


def _train(options: argparse.Namespace, arms: list[str]) -> int:
    """Train the runs that have no result yet, and return how many failed. Raises UserError."""
    settings = {arm: arm_settings(arm, options.config, options.settings) for arm in arms}
    try:
        rates = [float(rate) for rate in options.rates.split(",")]
    except ValueError:
        raise UserError(f"--rates: got {options.rates}, allowed numbers with commas, such as 1e-3,3e-3") from None
    first = [_run(options, settings[arm], arm, rate, 0) for rate in rates for arm in arms]
    if any(source.prefix == TRAINING for source in first[0].config.data.train):
        make_corpus(first[0].config.model.vocab_size)
    check_token_file("--test", options.test, first[0].config.model.vocab_size)
    check_writable(options.output)
    failed = _train_some(options, first)
    best = best_rates(find_results(options.output, key).values(), rates)
    more = [(arm, seed) for seed in range(1, options.seeds) for arm in arms if arm in best]
    return failed + _train_some(options, [_run(options, settings[arm], arm, best[arm], seed) for arm, seed in more])


def _run(options: argparse.Namespace, settings: list[str], arm: str, rate: float, seed: int) -> Run:
    own = [*settings, f"optimizer.learning_rate={rate:g}", f"training.seed={seed}"]
    measure = ("megatron_sse.tools.language_measure", "--test", options.test, "--tokens", str(options.tokens))
    folder = options.output / arm / f"lr_{rate:g}_seed_{seed}"
    return make_run(_key(arm, rate, seed), folder, options.config, own, POINTS, measure)


def _train_some(options: argparse.Namespace, runs: list[Run]) -> int:
    done = find_results(options.output, key)
    for run in runs:
        check_same(options.output, run, done.get(run.key))
    return train_all(runs, done, options.workers, _finish, lambda result: f"validation loss {result['validation']:.4f}")


def _finish(run: Run, measured: dict[str, Any]) -> Result:
    config = run.config
    sizes = {"parameters": num_parameters(config.model), "state_elements": state_elements(config)}
    training, rate = config.training, config.optimizer.learning_rate
    names = {"arm": run.folder.parent.name, "learning_rate": rate, "seed": training.seed}
    return (
        names | sizes | {"tokens": config.data.sequence_length * training.global_batch_size * training.steps} | measured
    )


def best_rates(results: Iterable[Result], rates: list[float]) -> dict[str, float]:
    """Return for each arm the learning rate with the least validation loss with seed 0, once all of them have one."""
    losses: dict[str, dict[float, float]] = {}
    for result in results:
        if result["seed"] == 0:
            losses.setdefault(result["arm"], {})[result["learning_rate"]] = result["validation"]
    complete = {arm: by_rate for arm, by_rate in losses.items() if set(by_rate) >= set(rates)}
    return {arm: min(by_rate, key=lambda rate: by_rate[rate]) for arm, by_rate in complete.items()}


def _key(arm: str, rate: float, seed: int) -> Key:
    return arm, f"learning rate {rate:g}", f"seed {seed}"


def key(result: Result) -> Key:
    """Return what names the run of a result."""
    return _key(result["arm"], result["learning_rate"], result["seed"])


def read_results(output: Path) -> dict[str, list[Result]]:
    """Return the results of each arm, arms in their order. Raises UserError where there are none."""
    results = list(find_results(output, key).values())
    found = {arm: [result for result in results if result["arm"] == arm] for arm in ARMS}
    found = {arm: results for arm, results in found.items() if results}
    if not found:
        raise UserError(f"--output: {output} has no results")
    return found


if __name__ == "__main__":
    # SIGTERM ends the study like an interrupt, together with the processes that it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
