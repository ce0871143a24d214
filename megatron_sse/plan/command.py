"""The command `megatron-sse plan`."""

from __future__ import annotations

from dataclasses import replace

from megatron_sse.config import check_world_size, longest_stage
from megatron_sse.costs.gpus import GPUS, Gpu
from megatron_sse.plan.report import describe_layout, describe_search
from megatron_sse.plan.request import Request, parse_bytes
from megatron_sse.plan.search import longest_sequence, search_layouts, work_out


def run(request: Request) -> int:
    """Print what the run needs; returns the exit status, 1 if it does not fit. Raises UserError."""
    request.check()
    config, gpu = request.run_config, find_gpu(request)
    if config.stages is not None:
        stage = longest_stage(config)
        print(f"for stage {stage.number + 1} of {len(config.stages)}, which has the longest sequences")
        config = stage.config
    parallel = config.parallel
    num_gpus = request.gpus or parallel.replica_size * (parallel.data or 1)
    if request.search:
        layouts = search_layouts(config, num_gpus, gpu, request.gpus_per_node)
        print("\n".join(describe_search(layouts, num_gpus)))
        return 0 if layouts else 1
    data_size = check_world_size(config, num_gpus)
    layout = work_out(config, data_size, gpu, request.gpus_per_node)
    print("\n".join(describe_layout(layout, gpu, longest_sequence(config, data_size, gpu))))
    return 0 if layout.fits(gpu) else 1


def find_gpu(request: Request) -> Gpu:
    """Return the GPU that is asked for, with the numbers that are given in place of its own."""
    gpu = GPUS[request.gpu]
    return replace(
        gpu,
        flops=gpu.flops if request.tflops is None else request.tflops * 1e12,
        bandwidth=gpu.bandwidth if request.bandwidth is None else request.bandwidth * 1e12,
        memory=gpu.memory if request.memory is None else parse_bytes(request.memory),
    )
