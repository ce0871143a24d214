"""The message of a process that lost contact with others: which ones failed, and what it was waiting for."""

import logging
import os
import re
import time
import traceback
from types import TracebackType

import psutil
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from megatron_sse.parallel.groups import this_rank

logger = logging.getLogger(__name__)

# Processes that lost a peer report within this time of each other; one that does not report is taken for lost.
SECONDS_TO_ANSWER = 2.0
_LOST = re.compile("[Gg]loo|NCCL|Connection (closed|reset)|[Tt]imed out|Broken pipe")


def is_lost_peer(error: BaseException) -> bool:
    """Check whether a collective failed because another process ended or stopped."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


def leave_for_peers(error: BaseException) -> None:
    """Store this process's error for the others, which lose contact when it ends; log its traceback."""
    logger.debug("failed", exc_info=error)
    _leave(f"{type(error).__name__}: {_one_line(error)}")


def name_lost_peers(error: BaseException) -> str:
    """Return a line with the rank, what it was waiting for, and which other processes failed first or do not answer."""
    rank = this_rank()
    timed_out = re.search("[Tt]imed out|[Tt]imeout", str(error))
    if not dist.is_initialized():
        reason = "not all processes met within parallel.timeout_minutes" if timed_out else "the others were lost"
        return f"rank {rank}: while the processes met, {reason} ({_one_line(error)})"
    world_size = dist.get_world_size()
    _leave("")
    end = time.monotonic() + SECONDS_TO_ANSWER
    failed, silent = [], []
    for other in range(world_size):
        if other == rank:
            continue
        while (said := _find(other)) is None and time.monotonic() < end:
            time.sleep(0.05)
        if said is None:
            silent.append(str(other))
        elif said:
            failed.append(f"rank {other} failed: {said}")
    causes = failed or ([f"no answer from rank {', '.join(silent)}"] if silent else ["contact was lost"])
    reason = "timed out" if timed_out else "lost its peers"
    return f"rank {rank}: {_describe_wait(error.__traceback__)} {reason}; {'; '.join(causes)}"


def seconds_since_launch() -> float:
    """Return the age of the launcher, which starts this process and restarts it after a fault; 0 without a launcher."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0.0
    return time.time() - psutil.Process(os.getppid()).create_time()


def _describe_wait(trace: TracebackType | None) -> str:
    """Return the collective that failed, with its group from the innermost frame that has one."""
    call, group = "a wait", None
    for frame, _ in traceback.walk_tb(trace):
        values = frame.f_locals
        known = next((values[name] for name in ("group", "pg", "process_group", "pp_group") if name in values), None)
        if isinstance(known, ProcessGroup):
            group = known
        if frame.f_globals.get("__name__") == distributed_c10d.__name__ and not frame.f_code.co_name.startswith("_"):
            if frame.f_code.co_name != "wrapper":
                call = frame.f_code.co_name
    # A group that is being made has no ranks yet.
    if group is None or group not in distributed_c10d._world.pg_group_ranks:
        return call
    name = "the group of all processes" if group.group_desc == "default_pg" else group.group_desc
    ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
    return f"{call} in {name} (ranks {ranks})"


def _one_line(error: BaseException) -> str:
    """Return what an error says, without the C++ call stack that torch appends."""
    return " ".join(str(error).partition("Exception raised from")[0].split())


def _leave(text: str) -> None:
    try:
        distributed_c10d._get_default_store().set(_key(dist.get_rank()), f"!{text}")
    # The store may be gone with the process that kept it.
    except (RuntimeError, ValueError):
        pass


def _find(rank: int) -> str | None:
    try:
        store = distributed_c10d._get_default_store()
        return store.get(_key(rank)).decode()[1:] if store.check([_key(rank)]) else None
    except (RuntimeError, ValueError):
        return None


def _key(rank: int) -> str:
    return f"megatron_sse/failed/{rank}"
