"""A run over length stages: settings that change between stages, and resuming within each."""

import json
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
    sections = {"parallel": {"context": 2}, **sections}
    sections["checkpoint"] = {"interval": 1, **sections.get("checkpoint", {})}
    values = small_run(folder, **sections).model_dump()
    if not (folder / "long.bin").exists():
        write_tokens(str(folder / "long"), random_documents(40, 90, seed=1))
    second = {"train": str(folder / "long"), "global_batch_size": 2, "rotary_base": 5e4, "learning_rate": 1e-3}
    values["stages"] = [
        {"tokens": 3 * 64, "sequence_length": 16},
        {"tokens": 3 * 64, "sequence_length": 32, **second},
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
