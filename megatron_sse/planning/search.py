"""Search of other layouts and lengths of the same run: those that fit, the fastest at the ceilings first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from megatron_sse.config import RunConfig, check_world_size
from megatron_sse.config.schema import RECOMPUTED_PARTS
from megatron_sse.costs.gpus import Gpu
from megatron_sse.errors import UserError
from megatron_sse.planning.ceilings import StepTime, step_time
from megatron_sse.planning.documents import count_documents
from megatron_sse.planning.memory import Memory, rank_memory
from megatron_sse.planning.sizes import Sizes
from megatron_sse.planning.traffic import step_traffic

# Share of the memory left free for CUDA's context, NCCL's buffers and fragmentation.
HEADROOM = 0.1
LONGEST = 1 << 26
# What is tried for training.recompute.
RECOMPUTE = ("none", "mlp", "mixer", list(RECOMPUTED_PARTS), "full")


@dataclass(frozen=True)
class Layout:
    """A layout with its needs, stage by stage, and the time of the slowest stage."""

    sizes: Sizes
    memory: list[Memory]
    sent: list[dict[str, int]]
    time: StepTime

    @property
    def peak(self) -> int:
        return max(memory.total for memory in self.memory)

    def fits(self, gpu: Gpu) -> bool:
        return self.peak <= (1 - HEADROOM) * gpu.memory


def work_out(config: RunConfig, data_size: int, gpu: Gpu, per_node: int, documents: int = 1) -> Layout:
    """Return memory, traffic and time of one layout. documents: of a sequence."""
    sizes = Sizes(config, data_size, documents=documents, gpus_per_node=per_node)
    stages = range(config.parallel.pipeline)
    memory = [rank_memory(sizes, stage) for stage in stages]
    sent = [step_traffic(sizes, stage) for stage in stages]
    times = [step_time(sizes, memory[stage], sent[stage], stage, gpu) for stage in stages]
    return Layout(sizes, memory, sent, max(times, key=lambda time: time.total))


def search_layouts(config: RunConfig, num_gpus: int, gpu: Gpu, per_node: int, documents: int = 1) -> list[Layout]:
    """Return the layouts of `num_gpus` GPUs that fit, the fastest first; where none fits, the one that lacks least.

    Micro-batch and global batch stay. documents: of a sequence.
    """
    found = list(work_out_all(config, num_gpus, gpu, per_node, documents))
    fitting = [layout for layout in found if layout.fits(gpu)]
    return sorted(fitting, key=lambda layout: layout.time.total) or sorted(found, key=lambda layout: layout.peak)[:1]


def work_out_all(config: RunConfig, num_gpus: int, gpu: Gpu, per_node: int, documents: int = 1) -> Iterator[Layout]:
    """Yield all layouts of `num_gpus` GPUs into which the model, its sequences and its batch divide."""
    for changed in _variants(config, num_gpus):
        try:
            data_size = check_world_size(changed, num_gpus)
        except UserError:
            continue
        yield work_out(changed, data_size, gpu, per_node, documents)


def _variants(config: RunConfig, num_gpus: int) -> Iterator[RunConfig]:
    divisors = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    for tensor, pipeline, context in product(divisors, repeat=3):
        if num_gpus % (tensor * pipeline * context):
            continue
        for virtual, recompute in product((1, 2) if pipeline > 1 else (1,), RECOMPUTE):
            parallel = {
                "tensor": tensor,
                "sequence": tensor > 1,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "context": context,
                "context_per_node": None,
                "data": None,
            }
            try:
                yield with_settings(config, parallel=parallel, training={"recompute": recompute})
            except ValidationError:
                continue


def with_settings(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return the run with other settings. Raises ValidationError where they do not fit together."""
    values = config.model_dump()
    for name, settings in sections.items():
        values[name] |= settings
    return RunConfig.model_validate(values)


def longest_sequence(config: RunConfig, data_size: int, gpu: Gpu) -> int:
    """Return the number of tokens of the longest sequence of one document that fits in this layout; with
    rl.share_prefixes, of as many answers as plan counts.

    0 for none, at most LONGEST.
    """
    parallel = config.parallel
    # Lengths must be divisible by this, whichever layout of the sequence is chosen.
    step = 2 * parallel.context * (parallel.tensor if parallel.sequence else 1)

    def fits(steps: int) -> bool:
        longer = with_settings(config, data={"sequence_length": steps * step})
        sizes = Sizes(longer, data_size, documents=1 if config.rl is None else count_documents(longer, None))
        stages = range(parallel.pipeline)
        return max(rank_memory(sizes, stage).total for stage in stages) <= (1 - HEADROOM) * gpu.memory

    # An answer has to fit into a sequence with its prompt.
    least = 0 if config.rl is None else config.rl.max_new_tokens // step
    # Bisection: memory grows with the length.
    low, high = least, LONGEST // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * step if low > least else 0
