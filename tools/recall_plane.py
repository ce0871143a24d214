"""The study of recall against the size of the state: how it is reached, by heads, by values or by partitions.

    python -m megatron_sse.tools.recall_plane --output docs/evidence_plane --workers 2

An arm is a number of pairs, a number of state elements of a layer, and a way to reach it. All arms have as many
parameters to within 2 percent, by the width of the MLP. Each is trained with every learning rate and seed 0, and the
rate with the least loss then gets the other seeds. As with tools/recall_study.py, each run has a folder, finished runs
leave result.json there, and the same command resumes. Rates are chosen on the sequences that accuracies are measured
on, which are not trained on. The report is report.md, results.json and a plot; `--report` writes it without training.
Exit status 0; 1 where a run failed, 2 for a wrong request.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_sse.tools.plane_arms import ARMS, LEARNING_RATES, arm_settings
from megatron_sse.tools.studies.command import find_arms, group_by_arm, make_parser, run_main, run_study
from megatron_sse.tools.studies.rates import (
    add_rates,
    parse_rates,
    rate_folder,
    rate_key,
    rate_settings,
    run_key,
    train_by_rate,
)
from megatron_sse.tools.studies.results import Result, find_results
from megatron_sse.tools.studies.runs import ROOT, Run, check_writable, make_run
from megatron_sse.tools.studies.sizes import num_parameters, state_elements

# Checkpoints of a run, which are measured.
POINTS = 4


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    parser = make_parser(__doc__, ARMS, 3, ROOT / "configs" / "recall_mqar.yaml")
    add_rates(parser, LEARNING_RATES)
    parser.add_argument("--samples", type=int, default=100, help="sequences to measure on; default 100")
    options = parser.parse_args(arguments)

    def report() -> str:
        from megatron_sse.tools.plane_report import write_report

        find_arms(options.arms, ARMS)
        results = find_results(options.output, rate_key).values()
        return write_report(options.output, group_by_arm(results, ARMS, options.output))

    return run_study(options, ("seeds", "workers", "samples"), lambda: _train(options), report)


def _train(options: argparse.Namespace) -> int:
    """Train the runs that have no result yet, and return how many failed. Raises UserError."""
    arms, rates = find_arms(options.arms, ARMS), parse_rates(options.rates)
    settings = {arm: arm_settings(arm, options.config, options.settings) for arm in arms}
    check_writable(options.output)
    measure = ("megatron_sse.tools.recall_measure", "--samples", str(options.samples))

    def make(arm: str, rate: float, seed: int) -> Run:
        own = [*settings[arm], *rate_settings(rate, seed)]
        folder = options.output / arm / rate_folder(rate, seed)
        return make_run(run_key(arm, rate, seed), folder, options.config, own, POINTS, measure)

    return train_by_rate(options, arms, rates, make, _finish)


def _finish(run: Run, points: list[dict[str, Any]]) -> Result:
    config, last = run.config, points[-1]
    names = {"arm": run.folder.parent.name, "learning_rate": config.optimizer.learning_rate}
    names |= {"seed": config.training.seed, "validation": last["loss"], "accuracy": last["accuracy"]}
    sizes = {"parameters": num_parameters(config.model), "state_elements": state_elements(config)}
    tokens = config.data.sequence_length * config.training.global_batch_size * config.training.steps
    return names | sizes | {"tokens": tokens, "points": points}


if __name__ == "__main__":
    run_main(main)
