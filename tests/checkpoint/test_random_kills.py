"""Processes of a run killed at random times, from the first process on: the same command always goes on from there."""

import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sse.checkpoint.manifest import read_manifest
from tests.checkpoint.processes import Processes
from tests.checkpoint.test_processes import newest, write_run

KILLS = 30
SETTINGS = {
    "training": {"steps": 24, "global_batch_size": 2, "precision": "fp32"},
    "parallel": {"data": 2, "distributed_optimizer": True, "timeout_minutes": 0.3},
    "checkpoint": {"interval": 2, "keep_last": 2},
}


def states(folder: Path) -> dict[str, str]:
    """Return the hashes of the tensors in a run's newest checkpoint, which is intact."""
    manifest = read_manifest(folder / "run/checkpoints" / newest(folder))
    return {name: file.sha256 for name, file in manifest.files.items() if name.endswith(".distcp")}


def killed(config: Path, delay: float, rank: int) -> tuple[list[int | None], str]:
    """Start a run, kill one of its processes after some seconds, and return exit codes and output."""
    config.with_suffix(".log").unlink(missing_ok=True)
    run = Processes(config, None).start()
    # The time is the fault here, and waits for nothing.
    time.sleep(delay)
    run.running[rank].kill()
    return run.end()


@pytest.mark.slow
def test_random_kills(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Show the counts with --junitxml=FILE."""
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    config = write_run(tmp_path, **SETTINGS)
    started = time.monotonic()
    codes, output = Processes(config, None).start().end()
    seconds = time.monotonic() - started
    assert codes == [0, 0], output
    expected = states(tmp_path)
    assert len(expected) == 2
    shutil.rmtree(tmp_path / "run")
    before_first_step = complete = 0
    for number in range(KILLS):
        delay, rank = draw.uniform(0, seconds), draw.randrange(2)
        codes, output = killed(config, delay, rank)
        place = f"seed {seed}, kill {number} of rank {rank} after {delay:.2f} s: {codes}\n{output}"
        assert "Traceback" not in output, place
        if codes == [0, 0]:
            complete += 1
            assert states(tmp_path) == expected, place
            shutil.rmtree(tmp_path / "run")
            continue
        # The other one ends by itself; one that was done already keeps its status.
        assert codes[rank] in (-9, 0) and codes[1 - rank] in (0, 1), place
        before_first_step += not re.search(r"step \d+/", output)
        if (tmp_path / "run/checkpoints/latest").exists():
            newest(tmp_path)
    codes, output = Processes(config, None).start().end()
    assert codes == [0, 0] and states(tmp_path) == expected, output
    assert not [path for path in (tmp_path / "run").rglob("*") if re.search("partial|removed|lease|tmp", path.name)]
    counts = {"seed": seed, "kills": KILLS, "before the first step": before_first_step, "after the end": complete}
    for name, value in counts.items():
        record_property(name, value)
