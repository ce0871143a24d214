"""The description of the data in a checkpoint, which shows when a run is resumed on other data."""

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sse.checkpoint.manifest import read_manifest
from megatron_sse.checkpoint.names import DATA
from megatron_sse.config import RunConfig, StageRun, stage_of_step
from megatron_sse.config.problem import show
from megatron_sse.data.fingerprint import describe_data
from megatron_sse.errors import SharedUserError

logger = logging.getLogger(__name__)


def check_same_data(checkpoint: Path, config: RunConfig, stages: list[StageRun]) -> None:
    """Compare the data that a checkpoint was trained on with this run's; all ranks together.

    Raises SharedUserError where they differ; only logs a warning where checkpoint.changed_data is accept.
    """
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, "; ".join(changed_data(checkpoint, stages)))
    text = next((other for other in every if other), None)
    if text is None:
        return
    if config.checkpoint.changed_data == "refuse":
        raise SharedUserError(
            f"{checkpoint}: was trained on other data than this run's: {text}; restore the data and its settings, or "
            "set checkpoint.changed_data: accept to continue with another order of samples"
        )
    if dist.get_rank() == 0:
        logger.warning("%s: was trained on other data: %s; the order of samples changes", checkpoint, text)


def changed_data(checkpoint: Path, stages: list[StageRun]) -> list[str]:
    """Return how the data of a checkpoint's last stage differs from this run's, one text for each difference.

    Files are compared by content, not by name. The list is empty where the checkpoint does not describe its data.
    """
    try:
        saved: dict[str, Any] = json.loads((checkpoint / DATA).read_text())
    except FileNotFoundError:
        return []
    now = describe_data(stage_of_step(stages, read_manifest(checkpoint).step))
    found = [
        f"{key} {show(saved.get(key))} then, {show(value)} now"
        for key, value in now.items()
        if key != "files" and saved.get(key) != value
    ]
    for old, new in zip(saved["files"], now["files"], strict=False):
        if old["hash"] != new["hash"]:
            found.append(f"{new['prefix']} has other contents than {old['prefix']} had")
    if len(saved["files"]) != len(now["files"]):
        found.append(f"{len(saved['files'])} files then, {len(now['files'])} now")
    return found
