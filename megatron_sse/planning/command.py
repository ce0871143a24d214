"""The command `megatron-sse plan`."""

from __future__ import annotations

from dataclasses import replace

from megatron_sse.config import RunConfig, check_world_size, longest_stage
from megatron_sse.costs.gpus import GPUS, Gpu
from megatron_sse.planning.documents import count_documents
from megatron_sse.planning.report import describe_layout, describe_search
from megatron_sse.planning.request import Request, parse_bytes
from megatron_sse.planning.search import Layout, longest_sequence, search_layouts, work_out


def run(request: Request) -> int:
    """Print what the run needs; returns the exit status, 1 if it does not fit. Raises UserError."""
    request.check()
    config, gpu = request.run_config, find_gpu(request)
    if config.stages is not None:
        number = longest_stage(config).number + 1
        print(f"for stage {number} of {len(config.stages)}, which has the longest sequences")
    if config.rl is not None:
        print("every answer of rl is counted as a sequence of its own; the time to generate it is not counted")
    if config.training.distill is not None:
        print("the teacher of training.distill is not counted: its weights, logits and forward passes")
    if request.search:
        config, num_gpus = _planned_run(config, request.gpus)
        documents = count_documents(config, request.documents)
        layouts = search_layouts(config, num_gpus, gpu, request.gpus_per_node, documents)
        print("\n".join(describe_search(layouts, num_gpus, gpu)))
        return 0 if layouts and layouts[0].fits(gpu) else 1
    layout = plan_run(config, request.gpus, gpu, request.gpus_per_node, request.documents)
    sizes = layout.sizes
    print("\n".join(describe_layout(layout, gpu, longest_sequence(sizes.config, sizes.data_size, gpu))))
    return 0 if layout.fits(gpu) else 1


def plan_run(config: RunConfig, num_gpus: int | None, gpu: Gpu, per_node: int, documents: int | None = None) -> Layout:
    """Return what a run needs on `num_gpus` GPUs, by default as many as its layout needs; with stages, what the one
    with the longest sequences needs. Raises UserError where they do not divide.

    documents: of a sequence, by default as count_documents finds.
    """
    config, num_gpus = _planned_run(config, num_gpus)
    documents = count_documents(config, documents)
    return work_out(config, check_world_size(config, num_gpus), gpu, per_node, documents)


def _planned_run(config: RunConfig, num_gpus: int | None) -> tuple[RunConfig, int]:
    """Return the settings to plan for and the number of GPUs."""
    if config.stages is not None:
        config = longest_stage(config).config
    return config, num_gpus or config.parallel.replica_size * (config.parallel.data or 1)


def find_gpu(request: Request) -> Gpu:
    """Return the GPU that is asked for, with the numbers that are given in place of its own."""
    gpu = GPUS[request.gpu]
    return replace(
        gpu,
        flops=gpu.flops if request.tflops is None else request.tflops * 1e12,
        bandwidth=gpu.bandwidth if request.bandwidth is None else request.bandwidth * 1e12,
        memory=gpu.memory if request.memory is None else parse_bytes(request.memory),
    )
