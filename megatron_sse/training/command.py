"""The command `megatron-sse train`: one process of a training run."""

import logging
import os

from megatron_sse.config import ignored_settings
from megatron_sse.config.derive import describe_run
from megatron_sse.interrupts import end_with_launcher
from megatron_sse.logs import flush_console, open_log
from megatron_sse.training.request import Request

logger = logging.getLogger(__name__)


def run(request: Request) -> int:
    """Train the model; returns the exit status. Raises UserError."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    rank, config = int(os.environ.get("RANK", "0")), request.run_config
    description = describe_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    open_log(config, f"rank_{rank:05d}")
    if rank == 0:
        for line in description:
            logger.info(line)
        for line in ignored_settings(config):
            logger.warning(line)
    # Imported late: a world size that does not fit is reported before Megatron-Core is loaded.
    from megatron_sse.launch.prepare import prepare_data
    from megatron_sse.training.loop import train

    if "RANK" not in os.environ:
        prepare_data(config)
    try:
        return train(config)
    finally:
        flush_console()
