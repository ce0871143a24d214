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
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_sse.errors import INTERRUPT_EXIT, USER_ERROR_EXIT, UserError
from megatron_sse.installed import require
from megatron_sse.tools.recall_arms import ARMS, arm_settings, find_arms, tabulate_arms
from megatron_sse.tools.studies.results import Key, Result, find_results
from megatron_sse.tools.studies.runs import ROOT, Run, check_same, check_writable, make_run, train_all
from megatron_sse.tools.studies.sizes import num_parameters, state_elements

# Number of checkpoints of a run, which are measured.
POINTS = 8


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    options = _parse(arguments)
    try:
        require("matplotlib", "plots", "plot")
        from megatron_sse.tools.recall_report import write_report

        for name in ("seeds", "workers", "steps", "samples"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(f"--{name}: got {getattr(options, name)}, allowed 1 or more")
        arms = find_arms(options.arms)
        failed = 0 if options.report else _train(options, _plan(options, arms), options.workers)
        missing = [(arm, seed) for arm in arms for seed in range(options.seeds)]
        print(write_report(options.output, read_results(options.output), missing))
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
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... of each arm; default 5")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--steps", type=int, help="steps of training; default the file's")
    parser.add_argument("--samples", type=int, default=100, help="sequences to measure on; default 100")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "recall_mqar.yaml")
    parser.add_argument("--report", action="store_true", help="write the report without training")
    parser.add_argument("settings", metavar="section.key=value", nargs="*", help="setting for all arms")
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace, arms: list[str]) -> list[Run]:
    """Return all runs, ordered by seed so that every arm has a result early, and print how the arms are matched.

    Raises UserError where a run cannot be made, or was started with other settings.
    """
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
    results = list(find_results(output, key).values())
    # Arms that the study no longer has are left out.
    found = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    found = {arm: results for arm, results in found.items() if results}
    if not found:
        raise UserError(f"--output: {output} has no results")
    return found


def _train(options: argparse.Namespace, runs: list[Run], workers: int) -> int:
    """Train the runs that have no result yet, and return how many failed."""

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
    return train_all(runs, done, workers, finish, lambda result: f"accuracy {result['accuracy']:.3f}")


if __name__ == "__main__":
    # SIGTERM ends the study like an interrupt, together with the processes that it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
