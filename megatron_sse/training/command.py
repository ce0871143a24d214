"""The command `megatron-sse train`: one process of a training run."""

import gc
import logging
import os
import signal
from pathlib import Path

from megatron_sse.config import RunConfig, ignored_settings
from megatron_sse.config.derive import describe_run
from megatron_sse.interrupts import end_with_launcher
from megatron_sse.lease import Lease, LeaseLostError, hold
from megatron_sse.logs import flush_console, open_log
from megatron_sse.run_folder import LEASE
from megatron_sse.training.request import Request

logger = logging.getLogger(__name__)


def run(request: Request) -> int:
    """Train the model; returns the exit status. Raises UserError."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    rank, config = int(os.environ.get("RANK", "0")), request.run_config
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
    # Imported late: a world size that does not fit is reported before Megatron-Core is loaded.
    from megatron_sse.launch.prepare import prepare_data
    from megatron_sse.training.loop import train

    # Imported modules stay. Each full garbage collection would look through them, while the other ranks wait.
    gc.freeze()
    if "RANK" not in os.environ:
        prepare_data(config)
    try:
        return train(config, lease)
    finally:
        flush_console()
