"""Launchers of several machines: restarts, errors that are not retried, and how each learns of the others' end."""

import itertools
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from megatron_sse.launch.meeting import Meeting
from megatron_sse.launch.nodes import Nodes
from tests.launchers import Launcher, free_port, start_launcher


def start_all(folder: Path, script: str, count: int = 2, max_restarts: int = 2) -> list[Launcher]:
    port = free_port()
    return [start_launcher(folder, script, rank, count, port, 1, max_restarts) for rank in range(count)]


def test_a_killed_process_starts_all_again(tmp_path: Path) -> None:
    """When a process is killed, all start again, also rank 0, which would wait for it forever."""
    script = 'say(f\'{rank} of {os.environ["WORLD_SIZE"]} at {os.environ["MASTER_PORT"]}\')\n'
    script += "again = os.path.exists('again')\nif rank == 1 and not again: open('again', 'w').close(); die()\n"
    script += "if not again: wait()\n"
    first, second = start_all(tmp_path, f"os.chdir({str(tmp_path)!r})\n" + script)
    assert [first.end(), second.end()] == [0, 0], first.output + second.output
    for node in (first, second):
        assert node.output.count("restart ") == node.output.count("W restart 1 of 2: rank 1 was killed by SIGKILL") == 1
    # Each start has a store of its own.
    places = [[line for line in node.output.splitlines() if " of 2 at " in line] for node in (first, second)]
    assert [len(lines) for lines in places] == [2, 2]
    assert places[0][0] != places[0][1]
    assert [line.replace("0 of", "1 of") for line in places[0]] == places[1]


def test_only_the_agent_of_ours_restarts_for_another_node() -> None:
    """torch's agent asks the meeting once more behind ours, and would restart with no cause, uncounted."""
    store = HashStore()
    first, second = (Meeting(Nodes(2, rank, "localhost", 1), store, "", 1.0) for rank in (0, 1))
    assert not first.is_waited_for()
    with pytest.raises(RendezvousTimeoutError):
        second.seconds_to_meet = 0
        second.next_rendezvous()
    assert first.is_waited_for()
    assert first.num_nodes_waiting() == 0


def test_restarts_are_counted(tmp_path: Path) -> None:
    first, second = start_all(tmp_path, "sys.exit(7 if rank == 1 else wait())", max_restarts=1)
    assert [first.end(), second.end()] == [7, 7], first.output + second.output
    for node in (first, second):
        assert node.output.count("restart ") == 1
        assert "restart 1 of 1: rank 1 ended with exit status 7" in node.output
    assert "ended with another node: rank 1 ended with exit status 7" in first.output


def test_a_users_error_is_not_tried_again(tmp_path: Path) -> None:
    first, second = start_all(tmp_path, "sys.exit('wrong' and 2 if rank == 1 else wait())")
    assert [first.end(), second.end()] == [2, 2], first.output + second.output
    assert "restart" not in first.output + second.output
    assert first.output.splitlines()[1:] == ["ended with another node: rank 1 ended with exit status 2"]


def test_an_interrupt_ends_all(tmp_path: Path) -> None:
    """After an interrupt the other launchers lose their peers and do not start again."""
    script = "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\nsay('ready')\nwait()\n"
    first, second = nodes = start_all(tmp_path, script)
    for node in nodes:
        node.wait_for("ready")
    first.send(signal.SIGINT)
    assert [first.end(), second.end()] == [130, 130], first.output + second.output
    assert "ended with another node: node 0 got SIGINT" in second.output
    assert "restart" not in second.output and "Traceback" not in first.output + second.output


def test_sigterm_waits_for_the_processes_and_starts_nothing(tmp_path: Path) -> None:
    """After SIGTERM a process that fails while saving is not restarted, and then no machine exits with 0."""
    script = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5 * rank))\nsay('ready')\nwait()\n"
    first, second = nodes = start_all(tmp_path, script)
    for node in nodes:
        node.wait_for("ready")
        node.send(signal.SIGTERM)
    assert [first.end(), second.end()] == [5, 5], first.output + second.output
    assert "restart" not in first.output + second.output


def test_waiting_for_the_other_machines_can_be_ended(tmp_path: Path) -> None:
    for signum, rank in itertools.product((signal.SIGTERM, signal.SIGINT), (0, 1)):
        folder = tmp_path / f"{signum}{rank}"
        folder.mkdir()
        node = start_launcher(folder, "", rank, 2, free_port())
        node.wait_for(f"node {rank} of 2, waiting")
        node.send(signum)
        assert node.end() == 128 + signum, node.output
        assert "Traceback" not in node.output


def test_two_machines_of_one_number(tmp_path: Path) -> None:
    port = free_port()
    nodes = []
    for name, rank in (("a", 0), ("b", 1), ("c", 1)):
        (tmp_path / name).mkdir()
        nodes.append(start_launcher(tmp_path / name, "", rank, 3, port))
    assert [node.end() for node in nodes] == [2, 2, 2], [node.output for node in nodes]
    for node in nodes:
        assert "NODE_RANK: got 0, 1, 1 on 3 nodes, allowed each number from 0 to 2 once" in node.output


def test_the_first_node_waits_for_all_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a second one with a number that another has, which would else lose the store before it reads why."""
    store = HashStore()
    first, *others = (Meeting(Nodes(3, rank, "localhost", 1), store, "", 1.0) for rank in (0, 1, 1))
    waiting = list(others)
    monkeypatch.setattr(time, "sleep", lambda _: waiting.pop().end(2, "later"))
    first.end(2, "two with one number")
    assert not waiting
    assert others[0].why_ended() == (2, "two with one number")


def test_wrong_places(tmp_path: Path) -> None:
    port = free_port()
    message = "MASTER_ADDR, MASTER_PORT: got {}:{}, allowed a free port and an address under which this node, the "
    message += "first one, can be reached ("
    with socket.create_server(("", port)):
        launcher = start_launcher(tmp_path, "", 0, 2, port)
        assert launcher.end() == 2
    assert message.format("localhost", port) + "Address already in use" in launcher.output
    (tmp_path / "other").mkdir()
    launcher = start_launcher(tmp_path / "other", "", 0, 2, port, address="no.such.host.invalid")
    assert launcher.end() == 2
    assert message.format("no.such.host.invalid", port) in launcher.output
    for folder in (tmp_path, tmp_path / "other"):
        assert len((folder / "output0").read_text().splitlines()) == 2


def test_the_first_machine_may_be_lost(tmp_path: Path) -> None:
    """The first machine's launcher is killed, which ends the rendezvous store, and is started again."""
    script = "say(f'ready {restart}')\nif not os.path.exists('again'): wait()\n"
    first, second = nodes = start_all(tmp_path, f"os.chdir({str(tmp_path)!r})\n" + script)
    for node in nodes:
        node.wait_for("ready")
    first.send(signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    second.wait_for("restart 1 of 2")
    (tmp_path / "again").touch()
    port = int(second.output.partition("localhost:")[2].partition("\n")[0])
    first = start_launcher(tmp_path, f"os.chdir({str(tmp_path)!r})\n" + script, 0, 2, port, 1, 2)
    assert [first.end(), second.end()] == [0, 0], first.output + second.output
    assert f"restart 1 of 2: contact with localhost:{port} was lost" in second.output
    assert "ready 1" in second.output


def test_a_launcher_that_died_while_waiting_is_not_counted(tmp_path: Path) -> None:
    """The second of three machines dies before the third comes: the round starts only when it is back."""
    port = free_port()
    first = start_launcher(tmp_path, "", 0, 3, port)
    second = start_launcher(tmp_path, "", 1, 3, port)
    second.wait_for("node 1 of 3, waiting")
    meeting = TCPStore("localhost", port, is_master=False)
    meeting.wait(["round/0/1"], timedelta(seconds=60))
    second.send(signal.SIGKILL)
    assert second.end() == -signal.SIGKILL
    third = start_launcher(tmp_path, "say('started')", 2, 3, port)
    meeting.wait(["round/0/2", "round/0/call"], timedelta(seconds=60))
    assert not meeting.check(["round/0/start"])
    again = start_launcher(tmp_path, "say('started')", 1, 3, port)
    assert [node.end() for node in (first, again, third)] == [0, 0, 0], first.output + again.output + third.output
