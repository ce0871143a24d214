"""What a run listens to, and what happens to what strangers send there."""

import base64
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from megatron_sse.errors import UserError
from megatron_sse.launch.meeting import meet
from megatron_sse.launch.nodes import Nodes
from tests.launchers import free_port, start_command, start_launcher
from tests.training.support import small_run

# The keys under which torch's rendezvous kept its pickles.
PICKLED = ["/torch.rendezvous.megatron_sse", "torch.rendezvous.megatron_sse"]
SECTIONS: dict[str, dict[str, Any]] = {
    "training": {"steps": 5000, "global_batch_size": 4, "precision": "fp32"},
    "parallel": {"data": 2},
    "monitor": {"tensorboard": True, "health_interval": 1000},
}


class Trap:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def listeners(process: psutil.Process) -> list[tuple[str, int]]:
    """Return address and port of all that a process and its children listen to."""
    found = []
    for each in (process, *process.children(recursive=True)):
        found += [tuple(one.laddr) for one in each.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    return found


def send_pickle(port: int, marker: Path) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
    for key in PICKLED:
        store.set(key, base64.b64encode(pickle.dumps(Trap(marker))))


@pytest.fixture
def plain_environment() -> dict[str, str]:
    """Variables without those by which a user chooses interfaces, and with one that would change what torchrun does."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    return kept | {"OMP_NUM_THREADS": "1", "PET_NO_PYTHON": "1"}


@pytest.fixture
def run(tmp_path: Path, plain_environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "run.yaml").write_text(small_run(tmp_path, **SECTIONS).to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sse", "train", str(tmp_path / "run.yaml")],
        env=plain_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        yield process
        process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def test_a_run_on_one_machine_cannot_be_reached(run: subprocess.Popen[str], tmp_path: Path) -> None:
    """A run listens on the loopback interface only, and does not run the code of a pickle that is sent there."""
    wait_for(run, "step 2/")
    launcher = psutil.Process(run.pid)
    assert {address for address, _ in listeners(launcher)} == {"127.0.0.1"}
    # Gloo takes the address of the machine's name otherwise, which is not the loopback interface everywhere.
    for child in launcher.children():
        chosen = child.environ()
        assert chosen["GLOO_SOCKET_IFNAME"] == chosen["NCCL_SOCKET_IFNAME"] == "lo"
    own = [one.laddr.port for one in launcher.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert len(own) == 1
    send_pickle(own[0], tmp_path / "marker")
    wait_for(run, "step 9/")
    run.send_signal(signal.SIGTERM)
    assert run.stdout is not None
    output = run.stdout.read()
    assert run.wait() == 0, output
    assert not (tmp_path / "marker").exists()


def test_processes_of_a_command_cannot_be_reached(tmp_path: Path) -> None:
    """A command that runs a model in several processes starts them itself. They listen on the loopback interface only,
    and end with it. Here they form a group, as those of the command do, and do nothing else."""
    script = "say(' '.join(sys.argv[2:]))\nimport torch.distributed as dist\ndist.init_process_group('gloo')"
    script += "\nsay('ready')\nwait()\n"
    command = ["generate", "no_model", "--prompt", "a", "--context", "2"]
    launcher = start_command(tmp_path, script, command)
    launcher.wait_for("ready\nready\n")
    process = psutil.Process(launcher.process.pid)
    children = process.children()
    assert len(children) == 2
    assert {address for address, _ in listeners(process)} == {"127.0.0.1"}
    launcher.send(signal.SIGTERM)
    assert launcher.end() == 128 + signal.SIGTERM
    line = f"-m megatron_sse {' '.join(command)}\n"
    assert launcher.output.startswith(line + line) and not any(child.is_running() for child in children)


@pytest.mark.parametrize(("address", "given"), [("127.0.0.1", "localhost"), ("::1", "::1")])
def test_machines_meet_at_one_interface(tmp_path: Path, address: str, given: str) -> None:
    """Two machines listen at the address they meet at, IPv6 included, and read no pickle there."""
    port = free_port()
    script = "say('at ' + os.environ['MASTER_ADDR'])\nimport torch.distributed as dist\ndist.init_process_group('gloo')"
    script += f"\nsay('ready')\nwhile not os.path.exists({str(tmp_path / 'end')!r}): time.sleep(0.1)\n"
    first, second = nodes = [start_launcher(tmp_path, script, rank, 2, port, address=given) for rank in (0, 1)]
    for node in nodes:
        node.wait_for("ready")
    pids = [node.process.pid for node in nodes]
    own = [
        tuple(one.laddr)[:2] for one in psutil.Process(pids[0]).net_connections() if one.status == psutil.CONN_LISTEN
    ]
    assert {found for found, _ in own} == {address} and (address, port) in own
    assert not [one for one in psutil.Process(pids[1]).net_connections() if one.status == psutil.CONN_LISTEN]
    if address == "127.0.0.1":
        send_pickle(port, tmp_path / "marker")
    (tmp_path / "end").touch()
    assert [first.end(), second.end()] == [0, 0], first.output + second.output
    assert f"at {given}\n" in first.output and not (tmp_path / "marker").exists()


def test_the_name_of_a_machine_may_be_loopback_to_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that /etc/hosts binds to 127.0.1.1, as on Debian, is another address to the other machines."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: look_up({"gpu07": "127.0.1.1"}.get(host, host), *rest, **more),
    )
    meeting = meet(Nodes(2, 0, "gpu07", free_port()), 1)
    assert meeting.interface == ""
    assert "MASTER_ADDR: gpu07 is 127.0.1.1 on this node, so its ports are open on all interfaces" in caplog.text


def test_a_place_of_another_machine_is_refused() -> None:
    # An address that the standards reserve for examples.
    with pytest.raises(UserError, match=r"^MASTER_ADDR, MASTER_PORT: got \[2001:db8::1\]:\d+, allowed a free port and"):
        meet(Nodes(2, 0, "2001:db8::1", free_port()), 1)
