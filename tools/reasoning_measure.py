"""Measures a run of the study of reasoning, and writes points by step as JSON.

    python -m megatron_sse.tools.reasoning_measure RUN OUTPUT [--prompts F --max-tokens N --between LOW HIGH]

With --between, it is a run that imitates: its checkpoints answer the problems with the likeliest tokens, from the first
one to the first that solves a share from LOW to HIGH; to the last one where none does. That one is moved to RUN/chosen.
Without it, it is a run that learns from rewards, and its points are what it has reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_sse.checkpoint.folders import list_checkpoints
from megatron_sse.checkpoint.names import ITERATION
from megatron_sse.evaluation.request import SOLVE, Request
from megatron_sse.evaluation.solve import prepare, solve
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import open_model
from megatron_sse.run_folder import CHECKPOINTS, METRICS

# Where the checkpoint is that reinforcement learning starts from.
CHOSEN = "chosen"
# What the report shows of a run's metrics, and its names for it.
SCALARS = {
    "validation/pass_at_1": "accuracy",
    "validation/length": "held_out_length",
    "rl/reward": "reward",
    "rl/length": "length",
    "rl/entropy": "entropy",
    "rl/logprob_error": "error",
}


def choose_checkpoint(folder: Path, prompts: str, max_tokens: int, low: float, high: float) -> list[dict[str, float]]:
    """Return a point for each measured checkpoint of a run, and move the last of these to CHOSEN."""
    points: list[dict[str, float]] = []
    # An earlier start may have been stopped between its choice and its result.
    for earlier in (folder / CHOSEN).glob(f"{ITERATION}*"):
        if not (folder / CHECKPOINTS / earlier.name).exists():
            shutil.move(earlier, folder / CHECKPOINTS)
    checkpoints = list_checkpoints(folder / CHECKPOINTS)[::-1]
    with inference_groups(1) as (groups, device):
        for checkpoint in checkpoints:
            model = open_model("RUN", checkpoint)
            config = inference_config(model, None)
            request = Request(
                checkpoint=str(checkpoint), tasks=(SOLVE,), prompts=prompts, temperature=0.0, max_tokens=max_tokens
            )
            net = build_and_load(model, config, groups, device)
            solved = solve(net, prepare(request, model, config, config.data.sequence_length))
            step = int(checkpoint.name.removeprefix(ITERATION))
            points.append({"step": step, "accuracy": solved.pass_at_1, "held_out_length": solved.length})
            if low <= solved.pass_at_1 <= high:
                break
    shutil.rmtree(folder / CHOSEN, ignore_errors=True)
    (folder / CHOSEN).mkdir()
    shutil.move(checkpoints[len(points) - 1], folder / CHOSEN)
    return points


def read_curves(path: Path) -> list[dict[str, Any]]:
    """Return a point for each step of a file of metrics; of a step that was taken again, what was reported last."""
    points: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        scalars = json.loads(line)
        point = points.setdefault(scalars["step"], {"step": scalars["step"]})
        point |= {SCALARS[tag]: scalars[tag] for tag in SCALARS.keys() & scalars.keys()}
    return [points[step] for step in sorted(points)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompts")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--between", type=float, nargs=2)
    options = parser.parse_args()
    if options.between is None:
        points = read_curves(options.run / METRICS)
    else:
        points = choose_checkpoint(options.run, options.prompts, options.max_tokens, *options.between)
    options.output.write_text(json.dumps(points))


if __name__ == "__main__":
    main()
