"""The command `megatron-sse plan`."""

from __future__ import annotations

import re

from megatron_sse.config import RunConfig, check_world_size, longest_stage
from megatron_sse.errors import UserError
from megatron_sse.plan.ceilings import find_gpu
from megatron_sse.plan.report import describe_layout, describe_search
from megatron_sse.plan.search import longest_sequence, search_layouts, work_out

_UNITS = {"GiB": 2**30, "GB": 1e9, "MiB": 2**20, "MB": 1e6}


def plan(
    config: RunConfig,
    gpu_name: str,
    num_gpus: int | None = None,
    memory: str | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    gpus_per_node: int = 8,
    search: bool = False,
) -> int:
    """Print what the run needs on `num_gpus` GPUs and return 0 if it fits, 1 if not. Raises UserError.

    Args:
        gpu_name, memory, tflops, bandwidth: the GPU, and numbers that replace its own (memory such as 80GiB).
        num_gpus: default as many as the layout needs.
        search: print all layouts that fit instead, the fastest first; return 0 if there is one.
    """
    for name, number in (("gpus", num_gpus), ("gpus-per-node", gpus_per_node)):
        if number is not None and number < 1:
            raise UserError(f"--{name}: got {number}, allowed 1 or more")
    gpu = find_gpu(gpu_name, tflops, bandwidth, None if memory is None else parse_bytes(memory))
    if config.stages is not None:
        stage = longest_stage(config)
        print(f"for stage {stage.number + 1} of {len(config.stages)}, which has the longest sequences")
        config = stage.config
    parallel = config.parallel
    num_gpus = num_gpus or parallel.replica_size * (parallel.data or 1)
    if search:
        layouts = search_layouts(config, num_gpus, gpu, gpus_per_node)
        print("\n".join(describe_search(layouts, num_gpus)))
        return 0 if layouts else 1
    data_size = check_world_size(config, num_gpus)
    layout = work_out(config, data_size, gpu, gpus_per_node)
    print("\n".join(describe_layout(layout, gpu, longest_sequence(config, data_size, gpu))))
    return 0 if layout.fits(gpu) else 1


def parse_bytes(text: str) -> float:
    """Return the bytes of a text such as 80GiB or 80GB. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text)
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise UserError(f"--memory: got {text}, allowed a number with {', '.join(_UNITS)}, such as 80GiB")
    return float(match[1]) * _UNITS[match[2]]
