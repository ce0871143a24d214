"""The time of a step at a GPU's ceilings: a lower bound, since no run reaches all of them."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from megatron_sse.config import RunConfig, recomputed_parts
from megatron_sse.costs.flops import (
    forward_flops_per_token,
    mixer_flops,
    mlp_flops,
    output_flops,
    train_flops_per_token,
)
from megatron_sse.costs.gpus import Gpu
from megatron_sse.planning.hand_off import step_hand_off
from megatron_sse.planning.memory import Memory, kept_of_step, passes_under_way
from megatron_sse.planning.sizes import Sizes
from megatron_sse.planning.traffic import AXES

GIB = 2**30


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the busiest GPU.

    products: matrix products. memory: traffic to and from memory, which overlaps the products, so that only the longer
    counts. idle: pipeline stages waiting for others. The rest: sending over each axis.
    """

    products: float
    memory: float
    idle: float
    tensor: float
    pipeline: float
    context: float
    data: float

    @property
    def total(self) -> float:
        _, _, idle, *sent = astuple(self)
        return max(self.products, self.memory) + idle + sum(sent)


def step_time(sizes: Sizes, memory: Memory, sent: dict[str, int], stage: int, gpu: Gpu) -> StepTime:
    """Return the time of a step from the memory and the sent bytes of a stage."""
    config = sizes.config
    training, parallel = config.training, config.parallel
    tokens = training.global_batch_size * config.data.sequence_length
    num_gpus = sizes.data_size * parallel.replica_size
    flops = train_flops_per_token(config.model, sizes.document) * tokens / num_gpus
    # Forward, backward (2 x forward), and what the backward pass computes again.
    products = flops * (1 + recomputed_share(sizes) / 3) / gpu.flops
    moved = _bytes_moved(sizes, memory, stage) / gpu.bandwidth
    # Share of a pipeline's steady time for filling and draining it; virtual stages divide it.
    bubble = (parallel.pipeline - 1) / (parallel.virtual_pipeline * sizes.num_micro_batches)
    speeds = _link_speeds(sizes, gpu)
    handed_off, seconds = step_hand_off(sizes, stage, gpu)
    times = {axis: sent[axis] / speeds[axis] for axis in AXES}
    # Its bytes are few, so that latencies count, and two_level sends most of them inside a machine.
    times["context"] += seconds - handed_off / speeds["context"]
    return StepTime(
        products=products,
        memory=moved,
        idle=max(products, moved) * bubble,
        **times,
    )


def recomputed_share(sizes: Sizes) -> float:
    """Return the share of a forward pass's operations that the backward pass computes again: at least the logits."""
    model = sizes.config.model
    forward = forward_flops_per_token(model, sizes.document)
    if sizes.config.training.recompute == "full":
        return 1.0
    parts = {
        "mixer": sum(mixer_flops(model, kind, sizes.document) for kind in model.layer_kinds()),
        "mlp": model.num_layers * mlp_flops(model),
    }
    return (output_flops(model) + sum(parts[part] for part in recomputed_parts(sizes.config))) / forward


def _bytes_moved(sizes: Sizes, memory: Memory, stage: int) -> float:
    """Return the bytes moved to and from memory in a step.

    These are the weights in each pass, activations (written, read, and the same for their gradients), and everything
    that the optimizer holds.
    """
    without = replace(sizes, config=_without_recompute(sizes))
    passes = passes_under_way(without, stage) / sizes.config.parallel.virtual_pipeline
    kept = sum(kept_of_step(without, stage)) / passes
    forwards = 1 + recomputed_share(sizes)
    per_micro_batch = (1 + forwards) * memory.weights + (3 + forwards) * kept
    return sizes.num_micro_batches * per_micro_batch + 2 * (memory.weights + memory.gradients + memory.optimizer)


def _without_recompute(sizes: Sizes) -> RunConfig:
    config = sizes.config
    return config.model_copy(update={"training": config.training.model_copy(update={"recompute": "none"})})


def _link_speeds(sizes: Sizes, gpu: Gpu) -> dict[str, float]:
    """Return bytes per second by axis. Neighbouring ranks differ in tensor, then context, data, pipeline."""
    parallel, span = sizes.config.parallel, 1
    speeds = {}
    for axis, size in (
        ("tensor", parallel.tensor),
        ("context", parallel.context),
        ("data", sizes.data_size),
        ("pipeline", parallel.pipeline),
    ):
        # Ranks of this axis lie `span` apart at most: they share a machine if that many GPUs fit in one.
        span *= size
        speeds[axis] = gpu.link if span <= sizes.gpus_per_node else gpu.network
    return speeds
