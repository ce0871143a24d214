"""check-parallel: correct layouts pass, faulty ones fail, and no process is left behind."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sse.check_parallel import command, processes
from megatron_sse.cli import main
from megatron_sse.config import load_config
from tests.check_parallel import broken

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SMALL = ["model.layers=sse, softmax", "model.num_layers=2"]


def run(folder: Path, layouts: list[str], prepare: Callable[[], None]) -> tuple[int, dict[str, Any]]:
    """Return the exit status and the content of the JSON file."""
    path = folder / "numbers.json"
    status = broken.check_broken(load_config(QUICKSTART, SMALL), layouts, path, prepare)
    return status, json.loads(path.read_text())


def wrong_tensors(numbers: dict[str, Any], layout: str) -> set[str]:
    errors = numbers["layouts"][layout]["errors"]
    return {name for name, error in errors.items() if error > numbers["allowed"][name]}


def test_quickstart_passes(capfd: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "check_parallel.md").read_text()
    [layouts] = re.findall(
        "^    .venv/bin/megatron-sse check-parallel configs/quickstart.yaml --layouts (.*)$", page, re.M
    )
    assert main(["check-parallel", QUICKSTART, "--layouts", layouts, "training.steps=7"]) == 0
    lines = capfd.readouterr().out.splitlines()
    verdicts = {line.split()[0]: line for line in lines[-6:-1]}
    assert lines[-1] == "unpinned routing of the first router: same in tp2-sequence, cp2-zigzag, pp2, dp2"
    for name in ("tp2-sequence", "cp2-zigzag", "pp2", "dp2"):
        assert " same: worst " in verdicts[name]
        for index, number in re.findall(r"decoder\.layers\.(\d+)\..* \(layer (\d+)\)", verdicts[name]):
            assert int(number) == int(index) + 1
        assert ("decoder.layers" in verdicts[name]) == verdicts[name].endswith(")")
    assert verdicts["pp2-virtual"].endswith(
        "not possible: parallel.virtual_pipeline: got 2, allowed a divisor of the 3 layers of a pipeline stage"
    )
    assert "sequence        data.sequence_length 1024 -> 128" in lines
    [heads] = [line for line in lines if "noise" in line]
    assert heads.split() == ["noise", "tp2-sequence", "cp2-zigzag", "pp2", "dp2"]
    rows = ["embedding", *(f"layer {n} sse" for n in range(1, 6)), "layer 6 softmax", "output", "loss", "gradient norm"]
    for row in rows:
        assert any(line.startswith(row) for line in lines), row


def test_forgotten_router_sum_is_seen(tmp_path: Path) -> None:
    status, numbers = run(tmp_path, ["tp2", "cp2"], broken.router_sum_forgotten)
    assert status == 1
    assert numbers["layouts"]["cp2"]["verdict"] == "same"
    wrong = wrong_tensors(numbers, "tp2")
    assert "gradient of decoder.layers.0.self_attention.router.proj.weight" in wrong
    assert not any(name.startswith("output") for name in wrong)


def test_unpinned_routing_is_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, numbers = run(tmp_path, ["cp2"], broken.picks_depend_on_the_layout)
    assert status == 1
    # All tokens move. Everything else agrees, since the step replays the recorded picks.
    tokens = 4 * 128
    assert numbers["layouts"]["cp2"]["moved_picks"] == tokens
    assert wrong_tensors(numbers, "cp2") == set()
    assert f"unpinned routing DIFFERENT for {tokens} tokens" in capfd.readouterr().out


def test_failing_rank_is_shown_and_the_next_layout_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, numbers = run(tmp_path, ["cp2", "dp2"], broken.rank_1_fails)
    assert status == 1
    assert {name: layout["verdict"] for name, layout in numbers["layouts"].items()} == {"cp2": "failed", "dp2": "same"}
    out = capfd.readouterr().out
    assert "cp2          FAILED on rank 1:\nTraceback" in out
    assert "ArithmeticError: seeded failure" in out


def _spawned(process: psutil.Process) -> list[psutil.Process]:
    """Return the computing processes that multiprocessing started."""
    return [child for child in process.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_leaves_no_processes(number: int, status: int) -> None:
    command = [sys.executable, "-m", "megatron_sse", "check-parallel", QUICKSTART, *SMALL, "--layouts", "cp2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Background jobs of a shell ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    output = ""
    while not output.endswith("runs one process"):
        assert (character := process.stdout.read(1)), process.communicate()
        output += character
    # At this point both processes are starting and have not received a job yet.
    while len(children := _spawned(psutil.Process(process.pid))) < 2:
        assert process.poll() is None
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == status
    assert errors == "", errors
    assert psutil.wait_procs(children, timeout=10)[1] == []


WRONG = [
    (["--layouts", "tp2,cp2zigzag"], "--layouts: got 'cp2zigzag', allowed tp2, tp2-sequence, cp2, "),
    (["--layouts", "tp2"], "--layouts: none is possible; tp2: model.sse.num_heads: got 9, allowed a multiple of "),
    (["--tolerance", "-1"], "--tolerance: got -1.0, allowed a number from 0\n"),
    (
        ["--json", "nowhere/numbers.json"],
        "--json: folder nowhere not found; create it first\n",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_user_errors_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    heads = ["model.sse.num_heads=9", "parallel.tensor=1"]
    assert main(["check-parallel", QUICKSTART, *heads, *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1
    assert captured.out == ""


def test_processes_are_set_up_for_the_largest_tensor_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process sets its GPU up once, with the connections that a run with tensor parallelism has."""
    set_up: list[tuple[int, int]] = []

    class Started(Exception):
        pass

    def start(size: int, prepare: Callable[[], None], tensor: int) -> None:
        monkeypatch.setattr(processes, "setup_device", lambda rank, tensor: set_up.append((rank, tensor)) or 1 / 0)
        processes._answer(1, pickle.dumps((2, 0, len, ())), tensor)
        raise Started

    monkeypatch.setattr(command, "Processes", start)
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(Started):
        main(["check-parallel", QUICKSTART, "--layouts", "cp2,tp2", *SMALL])
    assert set_up == [(1, 2)]
