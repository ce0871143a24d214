"""The launcher: processes per machine, machines by environment, signals and exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_sse.config import RunConfig, load_config
from megatron_sse.errors import UserError
from megatron_sse.launch import Nodes, build_command, count_processes, find_nodes, first_host

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}


def load(*overrides: str) -> RunConfig:
    sizes = ["hidden_size=192", "sse.num_heads=12", "softmax.num_heads=12"]
    layout = ["parallel.tensor=2", "parallel.context=1", "training.global_batch_size=24", "training.micro_batch_size=1"]
    return load_config(QUICKSTART, [*(f"model.{size}" for size in sizes), *layout, *overrides])


# overrides, nodes, GPUs per node: processes per node
COUNTS = [
    ("", 1, 0, 2),
    ("parallel.data=3", 1, 0, 6),
    ("parallel.tensor=1", 1, 0, 1),
    ("", 1, 8, 8),
    ("parallel.data=1", 1, 8, 2),
    ("", 2, 8, 8),
    ("parallel.tensor=3 model.ffn_hidden_size=576", 1, 8, 6),
    ("training.global_batch_size=2", 1, 8, 4),
    ("parallel.data=2", 2, 0, 2),
]


@pytest.mark.parametrize(("overrides", "nodes", "gpus", "expected"), COUNTS)
def test_processes_per_node(overrides: str, nodes: int, gpus: int, expected: int) -> None:
    assert count_processes(load(*overrides.split()), nodes, gpus) == expected


WRONG_COUNTS = [
    ("parallel.tensor=4", 1, 2, "parallel: got a layout of 4 processes, allowed 2, one per GPU"),
    ("parallel.data=8", 1, 8, "parallel: got a layout of 16 processes, allowed 8, one per GPU"),
    ("parallel.tensor=1", 2, 0, "parallel: got a layout of 1 processes, allowed a multiple of 2 nodes"),
    ("training.global_batch_size=2", 2, 4, "training.global_batch_size: got 2, allowed a multiple of 4 .*"),
]


@pytest.mark.parametrize(("overrides", "nodes", "gpus", "message"), WRONG_COUNTS)
def test_layouts_that_do_not_fit_the_machines(overrides: str, nodes: int, gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        count_processes(load(*overrides.split()), nodes, gpus)


def test_nodes_by_environment() -> None:
    assert find_nodes({}) == Nodes(1, 0, "localhost", 29500)
    explicit = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    assert find_nodes(explicit) == Nodes(2, 1, "first", 1234)
    assert find_nodes(SLURM) == Nodes(2, 1, "gpu07", 29500)
    assert find_nodes(SLURM | explicit) == Nodes(2, 1, "first", 1234)
    assert find_nodes(SLURM | {"MASTER_ADDR": "other"}).address == "other"


WRONG_NODES = [
    ({"NNODES": "two"}, "NNODES: got two, allowed a number from 1 to"),
    ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK: got nothing, allowed a number from 0 to 1"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK: got 2, allowed a number from 0 to 1"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: not set, allowed the first node's address"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT: got 70000, allowed a number from 1 to 65535"),
    (SLURM | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID: got a second task on this node"),
    ({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, "SLURM_JOB_NODELIST: not set"),
]


@pytest.mark.parametrize(("environment", "message"), WRONG_NODES)
def test_wrong_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        find_nodes(environment)


HOSTS = {
    "login1": "login1",
    "a,b": "a",
    "gpu[03-07,12],login1": "gpu03",
    "gpu[9,11]": "gpu9",
    "rack[1-2]n[03-04]": "rack1n03",
    "node-a-[1-3].cluster": "node-a-1.cluster",
    "": "",
}


@pytest.mark.parametrize("node_list", HOSTS)
def test_first_host(node_list: str) -> None:
    assert first_host(node_list) == HOSTS[node_list]


def test_commands() -> None:
    one = build_command(["a.yaml", "training.steps=3"], Nodes(1, 0, "localhost", 29500), 2)
    assert one == "--nproc-per-node=2 --standalone -m megatron_sse train a.yaml training.steps=3".split()
    two = build_command(["a.yaml"], Nodes(2, 1, "gpu07", 1234), 8)
    assert two[:3] == ["--nproc-per-node=8", "--nnodes=2", "--node-rank=1"]
    assert two[3:5] == ["--master-addr=gpu07", "--master-port=1234"]


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    """torchrun by the launcher on two processes that run `script`; each prints a line once it is ready."""
    path = folder / "script.py"
    path.write_text("import os, signal, sys, threading\nrank = int(os.environ['RANK'])\n" + script)
    call = "import sys; from megatron_sse.launch import run_torchrun; sys.exit(run_torchrun(sys.argv[1:]))"
    command = [sys.executable, "-c", call, "--nproc-per-node=2", "--standalone", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def send_when_ready(process: subprocess.Popen[str], signum: int) -> list[psutil.Process]:
    """Send a signal once both processes have printed a line; returns what ran below the launcher."""
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signum)
    return below


WAIT = "print('ready', flush=True)\nthreading.Event().wait()\n"


def test_exit_status_of_a_users_error(tmp_path: Path) -> None:
    process = start("sys.exit('one line' and 2 if rank == 0 else 0)", tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors


def test_killed_process_is_named(tmp_path: Path) -> None:
    process = start("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n" + WAIT, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in errors and "Traceback" not in errors


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start("try:\n  " + WAIT.replace("\n", "\n  ") + "\nexcept KeyboardInterrupt: sys.exit(130)", tmp_path)
    below = send_when_ready(process, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert len(below) >= 2 and not any(child.is_running() for child in below)
    assert "Traceback" not in errors


def test_termination_lets_the_processes_finish(tmp_path: Path) -> None:
    script = "done = threading.Event()\nsignal.signal(signal.SIGTERM, lambda *_: done.set())\n"
    script += "print('ready', flush=True)\nwhile not done.wait(0.05): pass\nopen(f'saved{rank}', 'w').close()\n"
    process = start(f"os.chdir({str(tmp_path)!r})\n" + script, tmp_path)
    send_when_ready(process, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
