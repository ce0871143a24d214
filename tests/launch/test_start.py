"""The launcher of one machine: its number of processes, signals, restarts and exit status."""

import os
import signal
from pathlib import Path
from unittest import mock

import psutil
import pytest

from megatron_sse.config import RunConfig, count_processes, load_config
from megatron_sse.errors import UserError
from megatron_sse.launch.nodes import Nodes
from megatron_sse.launch.start import MEMORY, THREADS, build_command, set_environment, start_command
from tests.launchers import start_launcher

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def load(*overrides: str) -> RunConfig:
    sizes = ["hidden_size=192", "sse.num_heads=12", "softmax.num_heads=12"]
    layout = ["parallel.tensor=2", "parallel.context=1", "training.global_batch_size=24", "training.micro_batch_size=1"]
    return load_config(QUICKSTART, [*(f"model.{size}" for size in sizes), *layout, *overrides])


# Overrides, nodes, GPUs per node, expected processes per node.
COUNTS = [
    ("", 1, 0, 2),
    ("parallel.data=3", 1, 0, 6),
    ("parallel.tensor=1", 1, 0, 1),
    ("", 1, 8, 8),
    ("parallel.data=1", 1, 8, 2),
    ("", 2, 8, 8),
    ("parallel.tensor=3 parallel.sequence=false model.ffn_hidden_size=576", 1, 8, 6),
    ("training.global_batch_size=2", 1, 8, 4),
    ("parallel.data=2", 2, 0, 2),
]


@pytest.mark.parametrize(("overrides", "nodes", "gpus", "expected"), COUNTS)
def test_processes_per_node(overrides: str, nodes: int, gpus: int, expected: int) -> None:
    assert count_processes(load(*overrides.split()), nodes, gpus) == expected


WRONG_COUNTS = [
    ("parallel.tensor=4", 1, 2, "parallel: got a layout of 4 processes, allowed 2, one per GPU"),
    ("parallel.data=8", 1, 8, "parallel: got a layout of 16 processes, allowed 8, one per GPU"),
    ("parallel.tensor=1", 2, 0, "parallel: got a layout of 1 process, allowed a multiple of 2 nodes"),
    ("parallel.data=100000 training.global_batch_size=100000", 1, 0, "parallel: got a layout of 200,000 processes, .*"),
    ("training.global_batch_size=2", 2, 4, "training.global_batch_size: got 2, allowed a multiple of 4 .*"),
]


@pytest.mark.parametrize(("overrides", "nodes", "gpus", "message"), WRONG_COUNTS)
def test_layouts_that_do_not_fit_the_machines(overrides: str, nodes: int, gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        count_processes(load(*overrides.split()), nodes, gpus)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({MEMORY: "glibc.pthread.rseq=0"}, "glibc.pthread.rseq=0:glibc.malloc.hugetlb=1"),
        ({MEMORY: "glibc.malloc.hugetlb=2"}, "glibc.malloc.hugetlb=2"),
    ],
)
def test_processes_on_cpus_take_huge_pages(given: dict[str, str], expected: str) -> None:
    others = {name: value for name, value in os.environ.items() if name not in (THREADS, MEMORY)}
    with mock.patch.dict(os.environ, others | given, clear=True):
        set_environment(per_node=8, num_gpus=8)
        assert os.environ.get(MEMORY) == given.get(MEMORY) and os.environ[THREADS] == "1"
        set_environment(per_node=1, num_gpus=0)
        assert os.environ[MEMORY] == expected


def test_commands() -> None:
    program = "-m megatron_sse train a.yaml training.steps=3".split()
    one = build_command(program, Nodes(1, 0, "localhost", 29500), 2, 0)
    assert one == "--nproc-per-node=2 -m megatron_sse train a.yaml training.steps=3".split()
    two = build_command(program[:-1], Nodes(2, 1, "gpu07", 1234), 8, 3)
    place = "--nnodes=2 --node-rank=1 --master-addr=gpu07 --master-port=1234 --max-restarts=3"
    assert two == f"--nproc-per-node=8 {place} -m megatron_sse train a.yaml".split()


def test_a_command_in_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^--tensor 3: got 3 processes, allowed 2, one per GPU$"):
        start_command(3, "--tensor 3", [])


def test_exit_status_of_a_users_error(tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, "sys.exit('one line' and 2 if rank == 0 else 0)", per_node=2, max_restarts=3)
    assert launcher.end() == 2
    assert launcher.output == ""


def test_killed_process_is_named(tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, "die() if rank == 1 else wait()", per_node=2)
    assert launcher.end() == 128 + signal.SIGKILL
    assert launcher.output == "rank 1 was killed by SIGKILL\n"


def test_a_killed_process_starts_its_neighbours_again(tmp_path: Path) -> None:
    script = "say(f'{rank} {restart}')\nif not restart: die() if rank == 1 else wait()\n"
    launcher = start_launcher(tmp_path, script, per_node=2, max_restarts=3)
    assert launcher.end() == 0
    *before, restart, first, second = launcher.output.splitlines()
    assert "1 0" in before and restart.endswith("W restart 1 of 3: rank 1 was killed by SIGKILL")
    assert {first, second} == {"0 1", "1 1"}


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    script = "try:\n  say('ready')\n  wait()\nexcept KeyboardInterrupt: sys.exit(130)"
    launcher = start_launcher(tmp_path, script, per_node=2, max_restarts=3)
    launcher.wait_for("ready\nready\n")
    below = psutil.Process(launcher.process.pid).children(recursive=True)
    launcher.send(signal.SIGINT)
    assert launcher.end() == 130
    assert len(below) >= 2 and not any(child.is_running() for child in below)
    assert launcher.output == "ready\nready\n"


def test_termination_lets_the_processes_finish(tmp_path: Path) -> None:
    script = "done = threading.Event()\nsignal.signal(signal.SIGTERM, lambda *_: done.set())\n"
    script += "say('ready')\nwhile not done.wait(0.05): pass\nsay('saved')\n"
    launcher = start_launcher(tmp_path, script, per_node=2, max_restarts=3)
    launcher.wait_for("ready\nready\n")
    launcher.send(signal.SIGTERM)
    assert launcher.end() == 0
    assert launcher.output == "ready\nready\nsaved\nsaved\n"
