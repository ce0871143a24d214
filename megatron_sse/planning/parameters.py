"""Which weights a rank holds, by pipeline stage, and what DDP and the optimizer keep for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sse.config import RunConfig, uses_distributed_optimizer
from megatron_sse.config.weights import Weight, embedding_weight, final_norm_weight, layer_weights, output_weight
from megatron_sse.planning.sizes import FP32, Sizes

# Megatron-Core's distributed optimizer: every parameter starts at a multiple of this, and
ALIGNMENT = 64
# every bucket (one for each chunk and type) is a multiple of this and of the data-parallel size.
BUCKET_MULTIPLE = 128


@dataclass(frozen=True)
class Chunk:
    """The layers of one virtual pipeline stage: their kinds, and whether embedding and output are in it."""

    kinds: list[str]
    is_first: bool
    is_last: bool


def stage_chunks(config: RunConfig, stage: int) -> list[Chunk]:
    """Return the chunks of a pipeline stage, one for each virtual stage."""
    parallel, kinds = config.parallel, config.model.layer_kinds()
    number = parallel.pipeline * parallel.virtual_pipeline
    length = len(kinds) // number
    # Two stages with two chunks each: stage 0 has the chunks 0 and 2 of the model, stage 1 the chunks 1 and 3.
    places = [virtual * parallel.pipeline + stage for virtual in range(parallel.virtual_pipeline)]
    return [Chunk(kinds[place * length :][:length], place == 0, place == number - 1) for place in places]


def chunk_weights(config: RunConfig, chunk: Chunk) -> list[Weight]:
    """Return all parameters of a chunk."""
    model = config.model
    weights = [embedding_weight(model)] if chunk.is_first else []
    weights += [weight for kind in chunk.kinds for weight in layer_weights(model, kind)]
    if chunk.is_last:
        weights.append(final_norm_weight(model))
        # A tied output is the embedding itself, or on another stage a copy of it.
        if not (model.tie_embeddings and chunk.is_first):
            weights.append(output_weight(model))
    return weights


@dataclass(frozen=True)
class Buffer:
    """A chunk's parameters of one type, as DDP lays them out.

    size: elements. padded: the same with the gaps that the distributed optimizer leaves; equal to size without it.
    width: bytes of a parameter.
    """

    size: int
    padded: int
    width: int


def chunk_buffers(sizes: Sizes, chunk: Chunk) -> list[Buffer]:
    """Return DDP's buffers of a chunk on one rank, one for each type."""
    buffers, config = [], sizes.config
    weights = chunk_weights(config, chunk)
    for is_fp32 in (False, True):
        held = [weight.local_size(config.parallel.tensor) for weight in weights if _is_fp32(config, weight) == is_fp32]
        if not held:
            continue
        padded = sum(held)
        if uses_distributed_optimizer(config):
            padded = sum(_round_up(size, ALIGNMENT) for size in held)
            padded = _round_up(padded, math.lcm(sizes.gradient_ranks, BUCKET_MULTIPLE))
        buffers.append(Buffer(sum(held), padded, FP32 if is_fp32 else sizes.element))
    return buffers


def _is_fp32(config: RunConfig, weight: Weight) -> bool:
    return weight.fp32 or config.training.precision == "fp32"


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
