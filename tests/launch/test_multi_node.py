"""A run on two simulated machines, by the commands of the docs, in which processes and launchers are killed."""

import os
import re
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.checkpoint.support import take_steps
from tests.launchers import free_port
from tests.training.support import small_run, start
from tests.workers import run_workers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "multi_node.md").read_text()
COMMANDS = re.findall(r"^    (NNODES=2 .*)$", PAGE, re.MULTILINE)
SECONDS_TO_END = 300
# The run is ended long before the last step.
SECTIONS: dict[str, dict[str, Any]] = {
    "training": {"steps": 5000, "global_batch_size": 4, "precision": "fp32"},
    "parallel": {"data": 2, "distributed_optimizer": True},
    "checkpoint": {"interval": 3, "keep_last": 2, "asynchronous": False},
    "monitor": {"tensorboard": True, "health_interval": 1000},
}


@dataclass
class Machine:
    """A launcher started by one of the docs' commands."""

    folder: Path
    number: int
    port: int
    said: list[str] = field(default_factory=list)

    def start(self) -> "Machine":
        command = COMMANDS[self.number].replace("10.0.0.1", "127.0.0.1").replace("29500", str(self.port))
        command = command.replace("configs/sse_h_2b.yaml", str(self.folder / "run.yaml"))
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.end_of_patience = threading.Timer(SECONDS_TO_END, self.process.kill)
        self.end_of_patience.start()
        return self

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until a line matches the pattern, and return the match."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern}:\n{''.join(self.said)}")

    def stop(self) -> None:
        self.process.kill()
        self.end_of_patience.cancel()

    def end(self) -> int:
        output, _ = self.process.communicate()
        self.said.append(output)
        return self.process.returncode

    @property
    def output(self) -> str:
        return "".join(self.said)


def pid_of(log: Path) -> int:
    return int(re.findall(r"process (\d+) on ", log.read_text())[-1])


def losses(folder: Path, last_step: int) -> list[float]:
    """Return the losses of each step of a run without faults."""
    trace = take_steps(start(small_run(folder, **SECTIONS)), last_step)
    return [step_losses["loss"] for step_losses, _ in trace]


def logged_losses(folder: Path) -> dict[int, set[float]]:
    """Return all losses that were logged for each step."""
    found: dict[int, set[float]] = {}
    for path in folder.glob("run/tensorboard/events*"):
        for event in EventAccumulator(str(path)).Reload().Scalars("train/loss"):
            found.setdefault(event.step, set()).add(event.value)
    return found


def test_a_run_without_a_trace_continues(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(small_run(tmp_path, **SECTIONS).to_yaml())
    port, logs = free_port(), tmp_path / "run/logs"
    first, second = machines = [Machine(tmp_path, number, port).start() for number in (0, 1)]
    try:
        first.wait_for("step 5/")
        os.kill(pid_of(logs / "rank_00001.log"), signal.SIGKILL)
        resumed = [int(first.wait_for(r"resumed from .*: (\d+) steps done")[1])]
        first.wait_for(f"step {resumed[0] + 4}/")
        os.kill(pid_of(logs / "rank_00000.log"), signal.SIGUSR1)

        second.process.kill()
        assert second.end() == -signal.SIGKILL
        # Before the node is there again, which would be a reason of its own.
        first.wait_for("restart 2 of 3")
        machines.append(third := Machine(tmp_path, 1, port).start())
        resumed.append(int(first.wait_for(r"resumed from .*: (\d+) steps done")[1]))
        first.wait_for(f"step {resumed[1] + 2}/")
        for machine in (first, third):
            machine.process.send_signal(signal.SIGTERM)
        assert [first.end(), third.end()] == [0, 0], first.output + third.output
    finally:
        for machine in machines:
            machine.stop()

    assert "Traceback" not in "".join(machine.output for machine in machines)
    assert len(re.findall(r"E rank 0: .+ \(ranks 0, 1\) lost its peers; no answer from rank 1", first.output)) == 2
    assert "W restart 1 of 3: rank 1 was killed by SIGKILL" in first.output
    assert "W restart 2 of 3: rank 0 ended with exit status 1" in first.output
    assert 3 <= resumed[0] < resumed[1]
    last_step = int(re.findall(r"step (\d+)/5000", first.output)[-1])
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"iter_{last_step:07d}\n"
    logged = logged_losses(tmp_path)
    [expected, _] = run_workers(2, losses, tmp_path, last_step)
    assert sorted(logged) == list(range(1, last_step + 1))
    for step, values in logged.items():
        assert [*values] == pytest.approx([expected[step - 1]] * len(values), rel=1e-6)
    check_logs(logs, last_step)


def check_logs(logs: Path, last_step: int) -> None:
    """Check that each process and launcher has one log file, with all of its starts."""
    assert sorted(path.name for path in logs.iterdir()) == [
        "node_0.log",
        "node_1.log",
        "rank_00000.log",
        "rank_00001.log",
    ]
    texts = {path.stem: path.read_text() for path in logs.iterdir()}
    for name in ("rank_00000", "rank_00001"):
        assert len(re.findall(f"{name}: process", texts[name])) == 3
        assert f"D step {last_step}\n" in texts[name] and len(re.findall("resumed from", texts[name])) == 2
    # The stack dump that SIGUSR1 causes.
    assert 'File "' in texts["rank_00000"] and "Current thread" in texts["rank_00000"]
    assert "restart 2 of 3" in texts["node_0"]
    assert "restart 1 of 3: rank 1 was killed by SIGKILL" in texts["node_1"]
