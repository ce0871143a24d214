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
from pathlib import Path
from typing import Any

from megatron_sse.config import load_config
from megatron_sse.data.checks import check_token_file
from megatron_sse.errors import INTERRUPT_EXIT, USER_ERROR_EXIT, UserError
from megatron_sse.installed import require
from megatron_sse.tools.language_arms import ARMS, LEARNING_RATES, arm_settings, find_arms
from megatron_sse.tools.language_corpus import TEST, TRAINING, make_corpus
from megatron_sse.tools.studies.rates import (
    parse_rates,
    rate_folder,
    rate_key,
    rate_settings,
    run_key,
    train_by_rate,
)
from megatron_sse.tools.studies.results import Result, find_results
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
    rates = parse_rates(options.rates)
    config = load_config(options.config, options.settings)
    if any(source.prefix == TRAINING for source in config.data.train):
        make_corpus(config.model.vocab_size)
    check_token_file("--test", options.test, config.model.vocab_size)
    check_writable(options.output)
    measure = ("megatron_sse.tools.language_measure", "--test", options.test, "--tokens", str(options.tokens))

    def make(arm: str, rate: float, seed: int) -> Run:
        own = [*settings[arm], *rate_settings(rate, seed)]
        folder = options.output / arm / rate_folder(rate, seed)
        return make_run(run_key(arm, rate, seed), folder, options.config, own, POINTS, measure)

    def train(runs: list[Run]) -> int:
        done = find_results(options.output, rate_key)
        for run in runs:
            check_same(options.output, run, done.get(run.key))
        return train_all(runs, done, options.workers, _finish, lambda made: f"validation loss {made['validation']:.4f}")

    return train_by_rate(
        arms, rates, options.seeds, make, train, lambda: find_results(options.output, rate_key).values()
    )


def _finish(run: Run, measured: dict[str, Any]) -> Result:
    config = run.config
    sizes = {"parameters": num_parameters(config.model), "state_elements": state_elements(config)}
    training, rate = config.training, config.optimizer.learning_rate
    names = {"arm": run.folder.parent.name, "learning_rate": rate, "seed": training.seed}
    return (
        names | sizes | {"tokens": config.data.sequence_length * training.global_batch_size * training.steps} | measured
    )


def read_results(output: Path) -> dict[str, list[Result]]:
    """Return the results of each arm, arms in their order. Raises UserError where there are none."""
    results = list(find_results(output, rate_key).values())
    found = {arm: [result for result in results if result["arm"] == arm] for arm in ARMS}
    found = {arm: results for arm, results in found.items() if results}
    if not found:
        raise UserError(f"--output: {output} has no results")
    return found


if __name__ == "__main__":
    # SIGTERM ends the study like an interrupt, together with the processes that it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
