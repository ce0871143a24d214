"""A run over length stages: settings that change between stages, and resuming within each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sse.config import RunConfig
from megatron_sse.errors import SharedUserError
from megatron_sse.model.attention import SoftmaxAttention
from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.training.loop import Signals
from tests.data.files import random_documents, write_tokens
from tests.training.support import small_run, start
from tests.workers import run_workers

# Three steps of 4 sequences of 16 tokens are followed by three of 2 sequences of 32, on other data.
STEPS = 6


def staged_run(folder: Path, sections: dict[str, dict[str, Any]]) -> RunConfig:
    """Return a run of two stages. sections: settings, and as "second" those of the second stage."""
    sections = {"parallel": {"context": 2}, **sections}
    changes = sections.pop("second", {})
    sections["checkpoint"] = {"interval": 1, **sections.get("checkpoint", {})}
    values = small_run(folder, **sections).model_dump()
    if not (folder / "long.bin").exists():
        write_tokens(str(folder / "long"), random_documents(40, 90, seed=1))
    second = {"train": str(folder / "long"), "global_batch_size": 2, "rotary_base": 5e4, "learning_rate": 1e-3}
    values["stages"] = [
        {"tokens": 3 * 64, "sequence_length": 16},
        {"tokens": 3 * 64, "sequence_length": 32, **second, **changes},
    ]
    values["data"]["sequence_length"] = values["training"]["steps"] = None
    return RunConfig.model_validate(values)


def run_from(folder: Path, resume: Path | None, sections: dict[str, dict[str, Any]]) -> list[tuple]:
    """Run from a checkpoint to the end; return, by step, the monitor's values, rotary base and sequence length."""
    run = start(staged_run(folder, sections), resume)
    seen: list[tuple] = []

    def note(step: int, losses: dict, rate: float, grad_norm: float, tokens: int, *rest: Any) -> None:
        attention = next(m for chunk in run.trainer.chunks for m in chunk.modules() if isinstance(m, SoftmaxAttention))
        seen.append((step, losses["loss"], rate, grad_norm, tokens, attention.rotary_base))

    run.monitor.step = note  # type: ignore[method-assign]
    run.run(Signals())
    destroy_groups()
    return seen


def refused(folder: Path, resume: Path, sections: dict[str, dict[str, Any]]) -> str:
    try:
        start(staged_run(folder, sections), resume)
    except SharedUserError as error:
        return str(error)
    finally:
        destroy_groups()
    return "accepted"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[tuple]]:
    """Return a folder with the checkpoints of all steps of an uninterrupted run, and its values by step."""
    folder = tmp_path_factory.mktemp("stages")
    staged_run(folder, {})
    seen = run_workers(2, run_from, folder, None, {})
    assert seen[0] == seen[1]
    return folder, seen[0]


def test_settings_change_between_stages(whole):
    folder, seen = whole
    assert [step for step, *_ in seen] == list(range(1, STEPS + 1))
    assert [tokens for *_, tokens, _ in seen] == [64] * STEPS
    assert [base for *_, base in seen] == [1e4] * 3 + [5e4] * 3
    rates = [rate for _, _, rate, *_ in seen]
    # The first stage follows the run's schedule (2 steps of warm-up, cosine to step 6), the second its own.
    assert rates[:3] == pytest.approx([5e-3, 1e-2, 1e-2 * (1 + 2**-0.5) / 2])
    assert rates[3:] == pytest.approx([5e-4, 1e-3, 0.0])
    saved = [yaml.safe_load((folder / f"run/checkpoints/iter_000000{step}/config.yaml").read_text()) for step in (3, 4)]
    assert [values["data"]["sequence_length"] for values in saved] == [16, 32]
    assert [values["model"]["softmax"]["rotary_base"] for values in saved] == [1e4, 5e4]
    assert all(values["stages"] is None for values in saved)


@pytest.mark.parametrize("steps_before", [2, 3, 4])
def test_a_resume_lands_in_the_right_place(whole, steps_before):
    """A run resumed before, at or after the border between stages is bitwise the same."""
    folder, seen = whole
    resume = folder / f"run/checkpoints/iter_000000{steps_before}"
    sections = {"monitor": {"folder": str(folder / f"resumed{steps_before}")}}
    resumed = run_workers(2, run_from, folder, resume, sections)
    assert resumed[0] == seen[steps_before:]


def with_batch(size: int) -> dict[str, dict[str, Any]]:
    """Return settings with another batch in the first stage; data that changes is accepted."""
    training = {"steps": 8, "global_batch_size": size, "micro_batch_size": 1, "precision": "fp32"}
    return {"training": training, "checkpoint": {"changed_data": "accept"}}


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("steps_before", [1, 2, 3, 4])
def test_another_batch_does_not_move_a_run_in_its_stages(whole, size, steps_before):
    """Sequences would be skipped (8) or seen twice (2), in the stage or before it: this is refused, always (F38)."""
    folder, _ = whole
    resume = folder / f"run/checkpoints/iter_000000{steps_before}"
    saved = json.loads((resume / "data.json").read_text())
    stage, done = divmod(steps_before - 1, 3)
    samples = (done + 1) * (4, 2)[stage]
    tokens = samples * (16, 32)[stage]
    assert saved["position"] == {"stage": stage, "steps": done + 1, "samples": samples, "tokens": tokens}
    (text,) = set(run_workers(2, refused, folder, resume, with_batch(size)))
    then = f"step {done + 1} of stage {stage + 1}, after {samples} of its sequences ({tokens} tokens)"
    assert text.startswith(f"stages: got other stages than those that {resume} was saved with, at {then}; now "), text
    # A checkpoint of an older version does not say where it was, but how many samples were seen.
    older = folder / f"older{size}{steps_before}"
    shutil.copytree(resume, older)
    (older / "data.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "position"}))
    (text,) = set(run_workers(2, refused, folder, older, with_batch(size)))
    assert text.startswith(f"stages: got other stages than those that {older} was saved with, at "), text


def test_stages_to_come_may_change(whole):
    folder, _ = whole
    resume = folder / "run/checkpoints/iter_0000003"
    assert set(run_workers(2, refused, folder, resume, {"second": {"global_batch_size": 4}})) == {"accepted"}
    # The stage under way may become longer, but not end before where the run is.
    resume = folder / "run/checkpoints/iter_0000005"
    assert set(run_workers(2, refused, folder, resume, {"second": {"tokens": 6 * 64}})) == {"accepted"}


def test_other_data_is_refused_unless_accepted(whole):
    folder, _ = whole
    resume = folder / "run/checkpoints/iter_0000002"
    (text,) = set(run_workers(2, refused, folder, resume, {"training": {"seed": 6}}))
    assert "other data" in text and "training.seed 5 then, 6 now" in text and "changed_data: accept" in text
    before = json.loads((resume / "data.json").read_text())
    assert before["stage"] == 0 and before["files"][0]["prefix"].endswith("train")
    for name, step, others in [("train", 2, 5), ("long", 5, 2)]:
        tokens = (folder / f"{name}.bin").read_bytes()
        (folder / f"{name}.bin").write_bytes(bytes([tokens[0] ^ 1]) + tokens[1:])
        checkpoints = {step: folder / f"run/checkpoints/iter_000000{step}" for step in (step, others)}
        (text,) = set(run_workers(2, refused, folder, checkpoints[step], {}))
        assert f"{name} has other contents than" in text
        # Changes to the other stage's file are accepted: the model has seen nothing of it, or is done with it.
        assert set(run_workers(2, refused, folder, checkpoints[others], {})) == {"accepted"}
        accept = {"checkpoint": {"changed_data": "accept"}}
        assert set(run_workers(2, refused, folder, checkpoints[step], accept)) == {"accepted"}
        (folder / f"{name}.bin").write_bytes(tokens)
