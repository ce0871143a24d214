"""The study of recall: trains every arm of tools/recall_arms.py with several seeds, and writes a report.

    python -m megatron_sse.tools.recall_study --output docs/evidence --workers 2

Each run takes minutes on one core, and each arm has 5 runs; `--arms n8k1,gla --seeds 1` is a first look. Each run is
trained by `megatron-sse train` in OUTPUT/ARM/seed_S, on one thread, with a log in train.log; then its checkpoints are
measured (tools/recall_measure.py) and removed, and result.json stays. The same command resumes after an interrupt:
finished runs are skipped, even if only OUTPUT/results.json has them; others resume at their last checkpoint.
Settings after the options, such as data.sequence_length=192, hold for all arms. The report (report.md, results.json and
plots, which need the `plot` extra) covers all results in OUTPUT; `--report` writes it without training. Exit status 0;
1 where a run failed, 2 for a wrong request.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_sse.errors import UserError
from megatron_sse.tools.recall_arms import ARMS, arm_settings, tabulate_arms
from megatron_sse.tools.studies.command import find_arms, group_by_arm, make_parser, run_main, run_study
from megatron_sse.tools.studies.results import Key, Result, find_results
from megatron_sse.tools.studies.runs import ROOT, Run, check_same, check_writable, make_run, train_all
from megatron_sse.tools.studies.sizes import num_parameters, state_elements

# Number of checkpoints of a run, which are measured.
POINTS = 8


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    parser = make_parser(__doc__, ARMS, 5, ROOT / "configs" / "recall_mqar.yaml")
    parser.add_argument("--steps", type=int, help="steps of training; default the file's")
    parser.add_argument("--samples", type=int, default=100, help="sequences to measure on; default 100")
    options = parser.parse_args(arguments)

    def report() -> str:
        from megatron_sse.tools.recall_report import write_report

        arms = find_arms(options.arms, ARMS)
        wanted = [(arm, seed) for arm in arms for seed in range(options.seeds)]
        return write_report(options.output, read_results(options.output), wanted)

    return run_study(options, ("seeds", "workers", "steps", "samples"), lambda: _train(options), report)


def _plan(options: argparse.Namespace) -> list[Run]:
    """Return all runs, ordered by seed so that every arm has a result early, and print how the arms are matched.

    Raises UserError where a run cannot be made, or was started with other settings.
    """
    arms = find_arms(options.arms, ARMS)
    common = [*options.settings, *([] if options.steps is None else [f"training.steps={options.steps}"])]
    settings = {arm: arm_settings(arm, options.config, common) for arm in arms}
    print(tabulate_arms(arms, options.config, common), flush=True)
    measure = ("megatron_sse.tools.recall_measure", "--samples", str(options.samples))
    runs, results = [], find_results(options.output, key)
    for seed in range(options.seeds):
        for arm in arms:
            folder = options.output / arm / f"seed_{seed}"
            own = [*settings[arm], f"training.seed={seed}"]
            run = make_run(_key(arm, seed), folder, options.config, own, POINTS, measure)
            if not any(source.mqar for source in run.config.data.train):
                raise UserError(f"--config: got {options.config}, allowed one whose data.train is mqar")
            check_same(options.output, run, results.get(run.key))
            runs.append(run)
    check_writable(options.output)
    return runs


def _key(arm: str, seed: int) -> Key:
    return arm, f"seed {seed}"


def key(result: Result) -> Key:
    """Return what names the run of a result."""
    return _key(result["arm"], result["seed"])


def read_results(output: Path) -> dict[str, list[Result]]:
    """Return the results of each arm by seed, arms in their order. Raises UserError where there are none."""
    return group_by_arm(find_results(output, key).values(), ARMS, output)


def _train(options: argparse.Namespace) -> int:
    """Train the runs that have no result yet, and return how many failed. Raises UserError."""
    runs = _plan(options)

    def finish(run: Run, points: list[dict[str, Any]]) -> Result:
        arm, model = run.folder.parent.name, run.config.model
        return {
            "arm": arm,
            "seed": run.config.training.seed,
            "accuracy": points[-1]["accuracy"],
            "loss": points[-1]["loss"],
            "parameters": num_parameters(model),
            "state_elements": state_elements(run.config),
            "partitions": model.sse.num_partitions if "sse" in model.layer_kinds() else 0,
            "points": points,
            "samples": options.samples,
        }

    done = find_results(options.output, key)
    return train_all(runs, done, options.workers, finish, lambda result: f"accuracy {result['accuracy']:.3f}")


if __name__ == "__main__":
    run_main(main)
