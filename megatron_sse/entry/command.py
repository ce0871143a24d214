"""The command `megatron-sse train`: starts the processes of a training run, and is each of them."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

from megatron_sse.config import RunConfig, ignored_settings
from megatron_sse.config.derive import describe_run
from megatron_sse.entry.request import Request
from megatron_sse.lease import Lease, LeaseLostError, hold
from megatron_sse.light_import import importing
from megatron_sse.logs import flush_console, open_log
from megatron_sse.run_folder import LEASE

logger = logging.getLogger(__name__)


def run(request: Request) -> int:
    """Start the run's processes, or be one of them where a launcher has set RANK; return the exit status.

    Raises UserError.
    """
    try:
        return _run_process(request.run_config) if "RANK" in os.environ else _start_processes(request)
    finally:
        flush_console()


def _start_processes(request: Request) -> int:
    # Imported late: torch.
    with importing():
        from megatron_sse.launch.start import start
    from megatron_sse.monitor.trackers import check_trackers

    check_trackers(request.run_config)
    return start(request.run_config, ["-m", "megatron_sse", request.command, request.config, *request.overrides])


def _run_process(config: RunConfig) -> int:
    rank = int(os.environ["RANK"])
    description = describe_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    if rank:
        return _train(config, rank, description, None)
    with hold(Path(config.monitor.folder), "monitor.folder", LEASE, _end_run) as lease:
        return _train(config, rank, description, lease)


def _end_run(error: LeaseLostError) -> None:
    """End the run, without another checkpoint, as another one has its folder."""
    logger.error("%s", error)
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config: RunConfig, rank: int, description: list[str], lease: Lease | None) -> int:
    open_log(config, f"rank_{rank:05d}")
    if rank == 0:
        for line in description:
            logger.info(line)
        for line in ignored_settings(config):
            logger.warning(line)
    with importing():
        train = _find_loop(config)
    return train(config, lease)


def _find_loop(config: RunConfig) -> Callable[[RunConfig, Lease | None], int]:
    """Return what trains.

    Imported late: a world size that does not fit is reported before Megatron-Core is loaded.
    """
    if config.rl is not None:
        from megatron_sse.rl.run import train_policy

        return train_policy
    if config.training.distill is not None:
        from megatron_sse.distill.run import distill

        return distill
    from megatron_sse.training.loop import train

    return train
