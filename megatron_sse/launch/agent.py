"""The processes of this machine under torch's elastic agent, which restarts them together with the others'."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from megatron_sse.errors import CLOSED_PIPE_EXIT, INTERRUPT_EXIT, NOT_FINITE_EXIT, USER_ERROR_EXIT, UserError
from megatron_sse.interrupts import starting_processes
from megatron_sse.launch.meeting import Meeting, meet
from megatron_sse.launch.nodes import Nodes
from megatron_sse.parallel.stores import stay_on_this_machine

logger = logging.getLogger(__name__)

# No restart after these: the failure would come again, or somebody interrupted the run.
FINAL_EXITS = (USER_ERROR_EXIT, NOT_FINITE_EXIT, INTERRUPT_EXIT)


class Agent(LocalElasticAgent):
    """torch's agent; it logs why it restarts the processes, and does not restart them where that is useless."""

    def __init__(self, spec: WorkerSpec, meeting: Meeting, restarts_left: int):
        super().__init__(spec, DefaultLogsSpecs())
        self.meeting = meeting
        self._remaining_restarts = restarts_left
        self.is_ending, self.is_done = False, False
        # Exit status and cause of the last failure.
        self.status, self.reason = 0, ""

    @property
    def restarts_left(self) -> int:
        return self._remaining_restarts

    def on_terminate(self, signum: int, frame: FrameType | None) -> None:
        """Pass SIGTERM on: a run saves and ends by itself, while torch would kill it after 30 seconds."""
        self.is_ending = True
        state = self._worker_group.state
        if state == WorkerState.HEALTHY:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signum)
        elif state != WorkerState.SUCCEEDED:
            raise SignalException("ended while starting", signal.Signals(signum))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        store = worker_group.store
        assert store is not None
        result = super()._monitor_workers(worker_group)
        if result.failures:
            self.status, self.reason = first_failure(result.failures)
            # The first cause counts; processes that lose contact fail as a consequence.
            self.reason = store.compare_set("reason", "", self.reason).decode()
            if self.is_ending or self.status in FINAL_EXITS:
                self._remaining_restarts = 0
            return result
        if result.state == WorkerState.SUCCEEDED and self._all_are_done(worker_group):
            return result
        # Checked even if the processes of this machine have succeeded: they restart with the others.
        if self.meeting.is_closed():
            raise RendezvousClosedError
        if self.meeting.is_waited_for():
            self.status, self.reason = 1, store.compare_set("reason", "", "a node was started again").decode()
            return RunResult(WorkerState.UNHEALTHY)
        return RunResult(WorkerState.HEALTHY)

    def _all_are_done(self, worker_group: WorkerGroup) -> bool:
        assert worker_group.store is not None
        number = worker_group.store.add("done", 0 if self.is_done else 1)
        self.is_done = True
        return number == worker_group.group_world_size

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with starting_processes():
            return super()._start_workers(worker_group)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        total = worker_group.spec.max_restarts
        logger.warning("restart %d of %d: %s", total - self._remaining_restarts, total, self.reason)
        self.is_done = False
        super()._restart_workers(worker_group)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, str]:
    """Return exit status and cause of a failure: of a process that must not be started again, else of the first."""
    final = [rank for rank in failures if failures[rank].exitcode in FINAL_EXITS]
    rank = (final or sorted(failures, key=lambda rank: failures[rank].timestamp))[0]
    failure = failures[rank]
    if failure.exitcode < 0:
        return 128 - failure.exitcode, f"rank {rank} was killed by {failure.signal_name()}"
    return failure.exitcode, f"rank {rank} ended with exit status {failure.exitcode}"


def run_processes(
    arguments: Sequence[str], nodes: Nodes, per_node: int, max_restarts: int, timeout_minutes: float
) -> int:
    """Run `python arguments` in `per_node` processes on this machine, as torchrun does; return the exit status of the
    first process that failed, or 128 + the number of a signal. If the first machine is lost, wait for it to be started
    again while restarts are left."""
    # The processes, or the code below, report everything that torch would log here.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    if nodes.count == 1:
        stay_on_this_machine()
    restarts_left = max_restarts
    while True:
        agent = None
        # Until the agent handles it.
        signal.signal(signal.SIGTERM, _stop)
        try:
            meeting = meet(nodes, timeout_minutes)
            agent = Agent(_describe(arguments, meeting, per_node, max_restarts), meeting, restarts_left)
            return _run(agent, meeting)
        except KeyboardInterrupt:
            return INTERRUPT_EXIT
        except SignalException as stop:
            return 128 + stop.sigval
        except RendezvousTimeoutError as error:
            print(error, file=sys.stderr)
            return 1
        except (RendezvousConnectionError, DistError) as error:
            lost = f"contact with {nodes.place} was lost"
            restarts_left = 0 if agent is None or agent.is_ending or nodes.rank == 0 else agent.restarts_left
            if not restarts_left:
                print(f"{lost} ({' '.join(str(error).split())})", file=sys.stderr)
                return 1
            restarts_left -= 1
            logger.warning("restart %d of %d: %s", max_restarts - restarts_left, max_restarts, lost)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SignalException("ended while meeting", signal.Signals(signum))


def _describe(arguments: Sequence[str], meeting: Meeting, per_node: int, max_restarts: int) -> WorkerSpec:
    return WorkerSpec(
        role="default",
        local_world_size=per_node,
        rdzv_handler=meeting,
        entrypoint=sys.executable,
        args=("-u", *arguments),
        max_restarts=max_restarts,
        # Between machines each look asks the first one.
        monitor_interval=0.1 if meeting.nodes.count == 1 else 0.5,
    )


def _run(agent: Agent, meeting: Meeting) -> int:
    """Run the agent until its processes end, and tell the other machines if they failed."""
    nodes = meeting.nodes
    signal.signal(signal.SIGTERM, agent.on_terminate)
    try:
        result = agent.run()
        if result is not None and result.state == WorkerState.SUCCEEDED:
            return 0
        status, reason = agent.status or 1, agent.reason
        # A rank prints its own UserError; a killed process prints nothing, and nobody reads a closed pipe.
        if status > 128 and status != CLOSED_PIPE_EXIT:
            print(reason, file=sys.stderr)
        elif result is not None and result.state == WorkerState.UNHEALTHY:
            print(f"no restarts are left: {reason}", file=sys.stderr)
    except SignalException as stop:
        status, reason = 128 + stop.sigval, f"node {nodes.rank} got {stop.sigval.name}"
    except KeyboardInterrupt:
        status, reason = INTERRUPT_EXIT, f"node {nodes.rank} got SIGINT"
    except RendezvousClosedError:
        status, reason = meeting.why_ended()
        print(f"ended with another node: {reason}", file=sys.stderr)
    except RendezvousTimeoutError:
        status, reason = 1, f"parallel.timeout_minutes: not all {nodes.count} nodes met in time"
        print(reason, file=sys.stderr)
    except UserError as error:
        meeting.end(USER_ERROR_EXIT, str(error))
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    meeting.end(status, reason)
    return status
