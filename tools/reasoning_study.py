"""The study of reasoning: SSE, SSE-H, GLA and softmax imitate worked answers, then learn from rewards.

    python -m megatron_sse.tools.reasoning_study --output docs/evidence_reasoning

It needs the data of the two files of settings (docs/reason.md makes it). Each arm of ARMS has as many parameters as the
files' model, through the width of its MLP. It imitates as the file of --config says, in OUTPUT/ARM/sft; its checkpoints
are measured on the held-out problems, and from the first that solves a share as in --between, so from about equal ones,
it learns from rewards as the file of --rl says, with several seeds, in OUTPUT/ARM/seed_S. The same command resumes
after an interrupt: finished runs are skipped, others resume at their last checkpoint. Settings after the options hold
for all arms in both files, but the steps of imitation are those of --steps. The report (report.md, results.json and
a picture, which needs the `plot` extra) covers all results in OUTPUT; `--report` writes it without training. Exit
status 0; 1 where a run failed, 2 for a wrong request.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_sse.config import RunConfig, load_config
from megatron_sse.errors import UserError
from megatron_sse.tools.reasoning_measure import CHOSEN
from megatron_sse.tools.studies.command import find_arms, make_parser, run_main, run_study
from megatron_sse.tools.studies.results import Key, Result, find_results
from megatron_sse.tools.studies.runs import ROOT, Run, check_same, check_writable, make_run, train_all
from megatron_sse.tools.studies.sizes import TOLERANCE, match_parameters, num_parameters, state_elements

# Settings on top of the files', whose own model is SSE-H. A section that a model has no layers for is empty, since its
# settings would be ignored.
BASE = "sse_h"
ARMS: dict[str, list[str]] = {
    "sse": ["model.layers=sse", "model.softmax={}"],
    BASE: [],
    "gla": ["model.layers=sse", "model.softmax={}", "model.sse.num_partitions=0"],
    "softmax": ["model.layers=softmax", "model.sse={}"],
}
SFT = "sft"
# Checkpoints of each half; those of the first are measured.
SFT_POINTS, RL_POINTS = 16, 4
MEASURE = "megatron_sse.tools.reasoning_measure"


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    options = parse(arguments)

    def report() -> str:
        from megatron_sse.tools.reasoning_report import write_report

        wanted = [(arm, seed) for arm in find_arms(options.arms, ARMS) for seed in range(options.seeds)]
        return write_report(options.output, read_results(options.output), wanted)

    return run_study(options, ("seeds", "workers", "steps"), lambda: _train(options), report)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = make_parser(__doc__, ARMS, 3, ROOT / "configs" / "rl_arithmetic_sft.yaml")
    parser.add_argument("--rl", type=Path, default=ROOT / "configs" / "rl_arithmetic.yaml")
    parser.add_argument("--steps", type=int, default=400, help="steps of imitation; default 400")
    about = "share solved where imitation ends; default 0.5 0.6"
    parser.add_argument("--between", type=float, nargs=2, default=[0.5, 0.6], metavar=("LOW", "HIGH"), help=about)
    return parser.parse_args(arguments)


def arm_settings(name: str, path: Path, settings: list[str]) -> list[str]:
    """Return the settings of an arm: those for all arms, its own, and the width of the MLP that matches parameters.

    Raises UserError where no width does.
    """
    wanted = num_parameters(load_config(path, settings).model)
    own = [*settings, *ARMS[name]]
    if name != BASE:
        own = match_parameters(path, own, wanted)
    if abs(num_parameters(load_config(path, own).model) / wanted - 1) > TOLERANCE:
        raise UserError(f"--config: {name} cannot have {wanted:,} parameters; give {path} a model with a wider MLP")
    return own


def plan(options: argparse.Namespace, done: dict[Key, Result]) -> tuple[list[Run], list[Run]]:
    """Return the runs that imitate, and those that learn from rewards, ordered by seed.

    Raises UserError where a run cannot be made, or was started with other settings.
    """
    low, high = options.between
    if not 0 <= low < high <= 1:
        raise UserError(f"--between: got {low} {high}, allowed two rising numbers from 0 to 1")
    imitating, learning, arms = [], [], find_arms(options.arms, ARMS)
    settings = {arm: arm_settings(arm, options.config, options.settings) for arm in arms}
    for arm in arms:
        own = [*settings[arm], f"training.steps={options.steps}"]
        about = _check_halves(options, load_config(options.config, own), load_config(options.rl, settings[arm]))
        folder = options.output / arm / SFT
        imitating.append(make_run((arm, SFT), folder, options.config, own, SFT_POINTS, (MEASURE, *about)))
        if (result := done.get((arm, SFT))) and result["between"] != options.between:
            raise UserError(f"--between: got {options.between}, but the result of {folder} has {result['between']}")
    for seed in range(options.seeds):
        for arm in arms:
            chosen = json.dumps(str(options.output / arm / SFT / CHOSEN))
            own = [*settings[arm], f"training.seed={seed}", f"checkpoint.load_weights={chosen}"]
            folder = options.output / arm / f"seed_{seed}"
            learning.append(make_run(_key(arm, seed), folder, options.rl, own, RL_POINTS, (MEASURE,)))
    for run in [*imitating, *learning]:
        check_same(options.output, run, done.get(run.key))
    check_writable(options.output)
    return imitating, learning


def _check_halves(options: argparse.Namespace, sft: RunConfig, rl: RunConfig) -> list[str]:
    """Return what the first half is measured with. Raises UserError where the files do not fit together."""
    if rl.rl is None or rl.rl.validation_prompts is None or rl.model != sft.model:
        allowed = f"one with rl.validation_prompts and the model of {options.config}"
        raise UserError(f"--rl: got {options.rl}, allowed {allowed}")
    about = ["--prompts", rl.rl.validation_prompts, "--max-tokens", str(rl.rl.max_new_tokens)]
    return [*about, "--between", *map(str, options.between)]


def _key(arm: str, seed: int | None) -> Key:
    """Return what names a run. seed: None for imitation."""
    return arm, SFT if seed is None else f"seed {seed}"


def key(result: Result) -> Key:
    """Return what names the run of a result."""
    return _key(result["arm"], result["seed"])


def read_results(output: Path) -> dict[str, list[Result]]:
    """Return the results of each arm, arms in their order, imitation first, then by seed. Raises UserError for none."""
    results = list(find_results(output, key).values())
    found = {arm: [result for result in results if result["arm"] == arm] for arm in ARMS}
    found = {arm: results for arm, results in found.items() if results}
    if not found:
        raise UserError(f"--output: {output} has no results")
    return {arm: sorted(results, key=lambda r: (r["seed"] is not None, r["seed"])) for arm, results in found.items()}


def _train(options: argparse.Namespace) -> int:
    """Train the runs that have no result yet, and return how many failed."""
    done = find_results(options.output, key)
    imitating, learning = plan(options, done)

    def finish(run: Run, points: list[dict[str, Any]]) -> Result:
        seed = run.config.training.seed if run.config.rl else None
        return {
            "arm": run.key[0],
            "seed": seed,
            "between": options.between,
            "parameters": num_parameters(run.config.model),
            "state_elements": state_elements(run.config),
            "points": points,
        }

    def say(result: Result) -> str:
        return f"accuracy {result['points'][-1]['accuracy']:.3f} at step {result['points'][-1]['step']}"

    # A clone has the results of imitation, but not the weights, which only runs without results need.
    waiting = {run.key[0] for run in learning if run.key not in done}
    lost = {run.key for run in imitating if run.key[0] in waiting and not (run.folder / CHOSEN).is_dir()}
    usable = {each: result for each, result in done.items() if each not in lost}
    failed = train_all(imitating, usable, options.workers, finish, say)
    ready = [run for run in learning if (options.output / run.key[0] / SFT / CHOSEN).is_dir() or run.key in done]
    return failed + train_all(ready, done, options.workers, finish, say)


if __name__ == "__main__":
    run_main(main)
