"""A small hybrid run on random tokens, for the tests of the trainer."""

from pathlib import Path
from typing import Any

from megatron_sse.config import RunConfig
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.groups import init_groups
from megatron_sse.training.loop import Run
from tests.data.files import random_documents, run_config, write_tokens

DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "monitor": {"health_interval": 1000},
}


def small_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Return a run in `folder`, with a token file and other settings by section."""
    prefix = str(folder / "train")
    if not Path(prefix + ".bin").exists():
        write_tokens(prefix, random_documents(200, 24))
    merged = {name: {**DEFAULTS.get(name, {}), **sections.get(name, {})} for name in DEFAULTS | sections}
    merged["monitor"].setdefault("folder", str(folder / "run"))
    merged["data"] = {"train": prefix, "sequence_length": 16} | sections.get("data", {})
    return run_config(prefix, **merged)


def start(config: RunConfig, resume: Path | None = None) -> Run:
    """Set up the run on this rank of a worker pool."""
    parallel = config.parallel
    groups = init_groups(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
    return Run(config, groups, cpu(), resume)


def cpu() -> Device:
    return setup_device(0)
