"""Runs of a few steps: resumed, with a reference and several updates, and without anything to learn."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sse.config import RunConfig
from megatron_sse.data.problems import Problem
from megatron_sse.errors import UserError
from megatron_sse.parallel.groups import destroy_groups, init_groups
from megatron_sse.plot.read import read_scalars
from megatron_sse.rl import run as run_module
from megatron_sse.rl.advantages import Group
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.reference import find_reference
from megatron_sse.rl.rollouts import Rollout
from megatron_sse.rl.run import PolicyRun, describe_held_out, open_problems
from megatron_sse.training.loop import Signals, UselessRunError
from megatron_sse.training.step import NOT_FINITE
from tests.rl.support import policy_config
from tests.training.support import cpu
from tests.workers import run_workers


def finish(config: Any, resume: Path | None = None) -> PolicyRun:
    run = PolicyRun(open_problems(config), config, init_groups(), cpu(), resume)
    run.run(Signals())
    destroy_groups()
    return run


def weights(run: PolicyRun) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.net.parameters()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """Return what was reported in each step, but for times."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {key: row[key] for key in row if key.startswith(("rl/", "train/"))} for row in rows}


def stop_and_resume(folder: Path) -> None:
    """Check a run that is resumed after two of four steps, then one from its weights with a reference."""
    training = {"steps": 4, "micro_batch_size": 2, "precision": "fp32"}
    rl = {"validation_prompts": str(folder / "a/prompts.jsonl")}
    whole = finish(policy_config(folder / "a", training=training, checkpoint={"interval": 2}, rl=rl))
    middle = folder / "a/run/checkpoints/iter_0000002"
    resumed = finish(policy_config(folder / "b", training=training, rl=rl), middle)
    assert equal(weights(whole), weights(resumed))
    ours, theirs = scalars(folder / "b"), scalars(folder / "a")
    # Step 0 is reported by the run that began, alone.
    assert set(theirs) == {0, 1, 2, 3, 4}
    assert set(ours) == {3, 4} and all(ours[step] == theirs[step] for step in ours)
    for name in ("step_0000003.jsonl", "step_0000004.jsonl"):
        samples = [(folder / part / "run/samples" / name).read_text() for part in "ab"]
        assert samples[0] == samples[1] and len(samples[0].splitlines()) == 4
    with_reference(folder, folder / "a/run/checkpoints")


def with_reference(folder: Path, checkpoints: Path) -> None:
    """Check a run with a reference, and that this stays the same where its run has gone on."""
    checkpoint = folder / "sft" / "iter_0000002"
    shutil.copytree(checkpoints / checkpoint.name, checkpoint)
    rl = {"kl": 0.1, "updates_per_batch": 2, "prompts": str(folder / "a/prompts.jsonl"), "group_size": 4}
    rl |= {"prompts_per_step": 3, "max_new_tokens": 8, "reward": "tests.rl.support:is_even"}
    sections = {
        "rl": rl | {"validation_prompts": rl["prompts"]},
        "checkpoint": {"load_weights": str(checkpoint.parent)},
    }
    sections["monitor"] = {"tensorboard": True}
    config = policy_config(folder / "c", training={"steps": 2, "precision": "fp32"}, **sections)
    run = PolicyRun(open_problems(config), config, init_groups(), cpu(), None, checkpoint)
    assert run.reference is not None
    before = weights(run)
    score = run.reference.score

    def score_and_check(batches: Any, temperature: float) -> None:
        held = weights(run)
        score(batches, temperature)
        assert equal(weights(run), held)

    run.reference.score = score_and_check  # type: ignore[method-assign]
    validate, validated = run._validate, []

    def validate_and_note(step: int, make_validation: Any) -> None:
        validated.append((step, equal(weights(run), before)))
        validate(step, make_validation)

    run._validate = validate_and_note  # type: ignore[method-assign]
    run.run(Signals())
    destroy_groups()
    found = scalars(folder / "c")
    # The first update starts at the reference; what is reported is the divergence in the second.
    assert all(found[step]["rl/kl"] > 0 and 1 <= found[step]["rl/logprob_error"] < 1.00001 for step in (1, 2))
    # Step 0 is that of the weights that the run starts from.
    assert not equal(weights(run), before) and validated == [(0, True), (2, False)]
    first, *_, last = [json.loads(line) for line in (folder / "c/run/metrics.jsonl").read_text().splitlines()]
    assert first["step"] == 0 and 0 <= first["validation/pass_at_1"] <= 1 and "rl/reward" not in first
    assert 0 <= last["validation/pass_at_1"] <= 1 and last["validation/length"] == 8
    assert [step for step, _ in read_scalars(folder / "c/run")["validation/pass_at_1"]] == [0, 2]
    reference_stays(config, before, checkpoints)


def reference_stays(config: RunConfig, reference: list[Tensor], checkpoints: Path) -> None:
    """Check that a resumed run has the same reference, or is refused."""
    assert config.checkpoint.load_weights is not None
    sft, resume = Path(config.checkpoint.load_weights), Path(config.monitor.folder) / "checkpoints/iter_0000002"
    shutil.copytree(checkpoints / "iter_0000004", sft / "iter_0000004")
    assert find_reference(config, None) == sft / "iter_0000004"
    run = PolicyRun(open_problems(config), config, init_groups(), cpu(), resume)
    assert run.reference is not None and equal([part for _, part in run.reference.parts], reference)
    destroy_groups()
    shutil.rmtree(sft / "iter_0000002")
    with pytest.raises(UserError, match="load_weights: got .*sft.*, and rl.kl has been measured from another model"):
        open_problems(config)
    accepting = config.checkpoint.model_copy(update={"changed_data": "accept"})
    assert find_reference(config.model_copy(update={"checkpoint": accepting}), resume) == sft / "iter_0000004"


def test_resumed_and_with_a_reference(tmp_path: Path) -> None:
    run_workers(1, stop_and_resume, tmp_path)


def nothing_to_learn(folder: Path) -> list[str]:
    """Return the log of a run whose rewards are all alike, which must not change the weights."""
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_sse.monitor.monitor")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    training = {"steps": 1, "precision": "fp32"}
    config = policy_config(folder, training=training, rl={"reward": "exact"})
    run = PolicyRun(open_problems(config), config, init_groups(), cpu(), None)
    before = weights(run)
    run.run(Signals())
    logger.removeHandler(handler)
    assert equal(weights(run), before)
    # Answers of a model with a nan are all alike, too.
    with torch.no_grad():
        next(run.net.parameters()).fill_(torch.nan)
    assert run._take_step(2, iter(())).skip is NOT_FINITE
    destroy_groups()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UselessRunError, match="differ by a factor of 1.0000"):
        patch.setattr(run_module, "STOP_ABOVE", 0.5)
        finish(policy_config(folder / "other", training=training))
    return log


def test_no_group_has_a_spread_and_probabilities_that_differ(tmp_path: Path) -> None:
    [log] = run_workers(1, nothing_to_learn, tmp_path)
    [line] = [line for line in log if "reward" in line]
    assert "NO UPDATE: no group has rewards that differ" in line and "100 % cut at rl.max_new_tokens" in line


def test_a_rounded_sum_of_rewards_is_solved() -> None:
    prompt = Prompt(Problem("2+2=", None, "4", "p.jsonl:1"), [1], None)
    rewards = [0.6 + 0.3 + 0.1, 0.6]
    assert rewards[0] < 1
    group = Group(prompt, [Rollout([1], np.zeros(1), is_cut=False)] * 2, rewards)
    assert describe_held_out([group])["validation/pass_at_1"] == 0.5
