"""Processes that die, stop, fail or are terminated, during a step and during a save (F1 to F6, F14, F15)."""

import errno
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.checkpoint.folders import find_all_damage
from tests.checkpoint.processes import SAVE, STEP, Fault, Processes
from tests.training.support import small_run

TRAINING = {"steps": 6, "global_batch_size": 2, "precision": "fp32"}
PARALLEL = {"distributed_optimizer": True}


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write the YAML file of a run on two ranks, which both write checkpoints, after steps 2, 4 and 6."""
    # With TensorBoard, as users have it.
    defaults = {"training": TRAINING, "parallel": PARALLEL, "monitor": {"tensorboard": True}}
    sections = defaults | {"checkpoint": {"interval": 2}} | sections
    path = folder / "run.yaml"
    path.write_text(small_run(folder, **sections).to_yaml())
    return path


def newest(folder: Path) -> str:
    """Return the checkpoint that `latest` names; check that all are intact and nothing else is left."""
    checkpoints = folder / "run/checkpoints"
    for path in checkpoints.glob("iter_*"):
        assert find_all_damage(path, hashes=True) == []
    return (checkpoints / "latest").read_text().strip()


LOG_OF_RANK_1 = "run/logs/rank_00001.log"
LOST = r"rank 0: .* in .+ \(ranks 0, 1\) lost its peers; no answer from rank 1"
INTERRUPTED = "interrupted; nothing saved since the last checkpoint"

# Fault: exit codes, expected output, newest checkpoint afterwards.
FAULTS: dict[str, tuple[Fault, tuple[int, int], str, str]] = {
    "F1 killed in a step": (Fault("kill", STEP), (1, -9), LOST, "iter_0000002"),
    "F1 killed in a save": (Fault("kill", SAVE), (1, -9), LOST, "iter_0000002"),
    "F2 terminated in a step": (Fault("terminate", STEP), (0, 0), "ending the run: SIGTERM", "iter_0000003"),
    "F2 terminated in a save": (Fault("terminate", SAVE), (0, 0), "ending the run: SIGTERM", r"iter_000000[45]"),
    "F4 exception in a step": (Fault("raise", STEP), (1, 1), "rank 1 failed: ValueError: injected", "iter_0000002"),
    "F4 exception in a save": (
        Fault("raise", SAVE),
        (0, 0),
        r"E checkpoint not saved: .*ValueError\('injected'\) \(rank 1\); .*; training continues",
        "iter_0000006",
    ),
    "F5 aborted in a step": (Fault("abort", STEP), (1, -6), LOST, "iter_0000002"),
    "F5 aborted in a save": (Fault("abort", SAVE), (1, -6), LOST, "iter_0000002"),
    "F6 interrupted in a step": (Fault("interrupt", STEP, (0, 1)), (130, 130), INTERRUPTED, "iter_0000002"),
    "F6 interrupted in a save": (Fault("interrupt", SAVE, (0, 1)), (130, 130), INTERRUPTED, "iter_0000002"),
    "F14 no space": (
        Fault(errno.ENOSPC, SAVE),
        (0, 0),
        r"E checkpoint not saved: .*__1_0.distcp: No space left on device \(rank 1\); .*; training continues",
        "iter_0000006",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_hangs_and_nothing_good_is_lost(name: str, tmp_path: Path) -> None:
    fault, codes, message, latest = FAULTS[name]
    # A fault in a step: the checkpoint before it is still completed.
    config = write_run(tmp_path, checkpoint={"interval": 2, "asynchronous": fault.point == SAVE})
    ended, output = Processes(config, fault).start().end()
    if ended[1] == -signal.SIGSEGV and "Fatal Python error: Aborted" in (tmp_path / LOG_OF_RANK_1).read_text():
        # It was aborted: Python's faulthandler then writes the stacks of all threads, and may fail on one that runs.
        ended[1] = -signal.SIGABRT
    assert ended == list(codes), output
    assert re.search(message, output), output
    assert re.fullmatch(latest, newest(tmp_path)), output
    assert output.count("Traceback") == (fault == Fault("raise", STEP)), output
    if fault == Fault("raise", STEP):
        assert output.index("ValueError: injected") < output.index("rank 1 failed: ValueError: injected")
    if fault.act == "terminate":
        steps = re.findall(r"step (\d)/6", output)
        assert newest(tmp_path) == f"iter_{int(steps[-1]):07d}"
        _, output = Processes(config, None).start().end()
        assert f"{steps[-1]} steps done" in output and f"step {int(steps[-1]) + 1}/6" in output


def test_a_stopped_process_is_named_with_its_group(tmp_path: Path) -> None:
    """A stopped process is named with its group, in a step and in a save (F3); both runs at once."""
    runs = []
    for point in (STEP, SAVE):
        (tmp_path / point).mkdir()
        saving = {"interval": 2, "asynchronous": point == SAVE}
        config = write_run(tmp_path / point, parallel=PARALLEL | {"timeout_minutes": 0.1}, checkpoint=saving)
        runs.append(Processes(config, Fault("stop", point)).start())
    # All processes are ended before the first assertion, since a stopped one would stay.
    ended = [run.end(stopped=(1,)) for run in runs]
    for point, (codes, output) in zip((STEP, SAVE), ended, strict=True):
        assert codes == [1, -signal.SIGKILL], output
        assert re.search(r"rank 0: .* in .+ \(ranks 0, 1\) timed out; no answer from rank 1", output), output
        assert newest(tmp_path / point) == "iter_0000002" and "Traceback" not in output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of one MiB, with room for one checkpoint, as the run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted")
    yield tmp_path
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """On a full disk every save after the first fails; the run continues and ends with an error (F14)."""
    codes, output = Processes(write_run(small_disk), None).start().end()
    assert codes == [1, 1], output
    assert len(re.findall("E checkpoint not saved: .*: No space left on device", output)) == 2, output
    assert "step 6/6" in output and "Traceback" not in output
    assert newest(small_disk) == "iter_0000002"


def test_a_folder_that_becomes_read_only(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder is an error before the first step; later, existing checkpoints stay (F15)."""
    run = Processes(write_run(small_disk, training=TRAINING | {"steps": 2}), None).start()
    assert run.end()[0] == [0, 0]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk / "run")], check=True)
    codes, output = Processes(write_run(small_disk), None, world_size=1).start().end()
    assert codes == [2]
    assert re.search("monitor.folder: got .*, allowed a folder that can be written to .Read-only file system.", output)
    assert newest(small_disk) == "iter_0000002"


def test_a_disk_that_left_overs_fill(small_disk: Path) -> None:
    """What an interrupted save left behind is deleted before the space is judged."""
    left = small_disk / "run/checkpoints/partial_iter_0000002"
    left.mkdir(parents=True)
    with pytest.raises(OSError, match="No space left"), (left / "__0_0.distcp").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    config = write_run(small_disk, training=TRAINING | {"steps": 2})
    codes, output = Processes(config, None, world_size=1).start().end()
    assert codes == [0], output
    assert newest(small_disk) == "iter_0000002" and not left.exists()
