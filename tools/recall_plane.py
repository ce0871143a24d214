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
from megatron_sse.tools.studies.command import find_arms, make_parser, run_main, run_study
from megatron_sse.tools.studies.rates import add_rates, read_results, train_by_rate
from megatron_sse.tools.studies.results import Result
from megatron_sse.tools.studies.runs import ROOT


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    parser = make_parser(__doc__, ARMS, 3, ROOT / "configs" / "recall_mqar.yaml")
    add_rates(parser, LEARNING_RATES)
    parser.add_argument("--samples", type=int, default=100, help="sequences to measure on; default 100")
    options = parser.parse_args(arguments)

    def report() -> str:
        from megatron_sse.tools.plane_report import write_report

        return write_report(options.output, read_results(options, ARMS))

    return run_study(options, ("seeds", "workers", "samples"), lambda: _train(options), report)


def _train(options: argparse.Namespace) -> int:
    """Train the runs that have no result yet, and return how many failed. Raises UserError."""
    settings = {arm: arm_settings(arm, options.config, options.settings) for arm in find_arms(options.arms, ARMS)}
    measure = ("megatron_sse.tools.recall_measure", "--samples", str(options.samples))
    return train_by_rate(options, settings, measure, _finish)


def _finish(points: list[dict[str, Any]]) -> Result:
    return {"validation": points[-1]["loss"], "accuracy": points[-1]["accuracy"], "points": points}


if __name__ == "__main__":
    run_main(main)
