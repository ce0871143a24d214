"""States from which every step is skipped (F37): they do not replace good checkpoints, and no run resumes from them."""

import json
import re
from pathlib import Path

import pytest

from tests.checkpoint.processes import BATCH, EVERY, STEP, WEIGHTS, Fault, Processes
from tests.checkpoint.test_processes import write_run

TRAINING = {"steps": 6, "global_batch_size": 2, "precision": "fp32", "max_skipped_steps": 2}
SAVING = {"interval": 1, "keep_last": 1}


def run(config: Path, fault: Fault | None) -> tuple[int | None, str]:
    (code,), output = Processes(config, fault, world_size=1).start().end()
    assert "Traceback" not in output, output
    return code, output


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run/checkpoints").iterdir())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "in the background"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, asynchronous: bool) -> None:
    config = write_run(tmp_path, training=TRAINING, parallel={}, checkpoint=SAVING | {"asynchronous": asynchronous})
    code, output = run(config, Fault("nan", WEIGHTS, (0,)))
    assert code == 3, output
    assert re.search("E checkpoint not saved: not finite: .*; .* are unchanged; training continues", output), output
    assert checkpoints(tmp_path) == ["iter_0000002", "latest"]
    assert output.count("step 4/6") == 1 and "no checkpoint after step 4, which was skipped" in output
    assert f"checkpoint: {tmp_path}/run/checkpoints/iter_0000002 (run the same command to resume from it)" in output
    code, output = run(config, None)
    assert code == 0 and "2 steps done" in output and "iter_0000006 (all 6 steps are done" in output, output


def test_a_state_that_only_leads_to_skipped_steps_is_passed_over(tmp_path: Path) -> None:
    """The weights are finite, but the loss is not: this shows only after the checkpoint was saved."""
    config = write_run(tmp_path, training=TRAINING, parallel={}, checkpoint=SAVING)
    code, output = run(config, Fault("1e30", WEIGHTS, (0,)))
    assert code == 3, output
    # keep_last is 1, but nothing is known yet in favour of the newer one.
    assert checkpoints(tmp_path) == ["iter_0000002", "iter_0000003", "latest"]
    assert f"checkpoint: {tmp_path}/run/checkpoints/iter_0000002 (run the same command to resume from it)" in output
    code, output = run(config, None)
    assert code == 0 and "2 steps done" in output, output
    assert "iter_0000003 is ignored: every step from it was skipped" in output
    assert (tmp_path / "run/checkpoints/latest").read_text() == "iter_0000006\n"
    # The last one is not proven, so the one before stays, too.
    assert checkpoints(tmp_path) == ["iter_0000005", "iter_0000006", "latest"]


def test_a_resumed_state_that_only_leads_to_skipped_steps_is_passed_over(tmp_path: Path) -> None:
    saving = {"interval": 2, "asynchronous": False}
    config = write_run(tmp_path, training=TRAINING, parallel={}, checkpoint=saving)
    assert run(config, Fault("kill", STEP, (0,), step=5))[0] == -9
    assert checkpoints(tmp_path) == ["iter_0000002", "iter_0000004", "latest"]
    # Every batch makes the loss nan.
    code, output = run(config, Fault("nan", BATCH, (0,), step=EVERY))
    assert code == 3 and "4 steps done" in output, output
    assert "iter_0000002 (run the same command" in output
    code, output = run(config, None)
    assert code == 0 and "2 steps done" in output, output


def test_the_last_step_was_skipped(tmp_path: Path) -> None:
    """The state is saved, but no run resumes from it by itself."""
    config = write_run(tmp_path, training=TRAINING, parallel={}, checkpoint={"interval": 2, "keep_last": 1})
    code, output = run(config, Fault("nan", BATCH, (0,), step=6))
    assert code == 0, output
    assert "the last 1 steps were skipped: the same command does not resume from the checkpoint after step 6" in output
    assert f"checkpoint: {tmp_path}/run/checkpoints/iter_0000004 (run the same command to resume from it)" in output
    manifest = json.loads((tmp_path / "run/checkpoints/iter_0000006/manifest.json").read_text())
    assert manifest["finite"] is False and (tmp_path / "run/checkpoints/latest").read_text() == "iter_0000004\n"
    code, output = run(config, None)
    assert code == 0 and "4 steps done" in output, output
    manifest = json.loads((tmp_path / "run/checkpoints/iter_0000006/manifest.json").read_text())
    assert manifest["finite"] is True and (tmp_path / "run/checkpoints/latest").read_text() == "iter_0000006\n"
