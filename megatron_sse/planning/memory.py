"""Bytes that a rank holds at the fullest moment of a step, by pipeline stage."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megatron_sse.config import uses_distributed_optimizer
from megatron_sse.planning.activations import Kept, end_activations, layer_activations
from megatron_sse.planning.parameters import chunk_buffers, stage_chunks
from megatron_sse.planning.sizes import FP32, Sizes

# How many copies of a rank's states exclusive_scan holds at most, without and with the delta rule; counted by
# tests/parallel/test_handoff_volume.py.
HAND_OFF_COPIES = {False: 4.2, True: 5.1}


@dataclass(frozen=True)
class Memory:
    """Memory of a rank in bytes.

    optimizer: moments, in bf16 runs also the fp32 weights. activations: kept for the backward passes to come, without
    states. hand_off: buffers of one hand-off. working: gradients of the largest activations.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    states: int
    hand_off: int
    working: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def rank_memory(sizes: Sizes, stage: int) -> Memory:
    """Return the memory of a rank of a pipeline stage."""
    buffers = [buffer for chunk in stage_chunks(sizes.config, stage) for buffer in chunk_buffers(sizes, chunk)]
    shards = sizes.gradient_ranks if uses_distributed_optimizer(sizes.config) else 1
    kept = kept_of_step(sizes, stage)
    return Memory(
        weights=sum(buffer.padded * buffer.width for buffer in buffers),
        gradients=sum(buffer.padded * FP32 for buffer in buffers),
        # Two moments, and an fp32 copy of what is not fp32 itself.
        optimizer=sum(buffer.padded * FP32 * (2 if buffer.width == FP32 else 3) // shards for buffer in buffers),
        activations=kept.values,
        states=kept.states,
        hand_off=_hand_off(sizes),
        working=_working(sizes, stage),
    )


def kept_of_step(sizes: Sizes, stage: int) -> Kept:
    """Return the activations of all micro-batches whose backward pass is still to come."""
    config = sizes.config
    recompute = config.training.recompute == "full"
    chunks = stage_chunks(config, stage)
    layers = [layer_activations(sizes, kind) for chunk in chunks for kind in chunk.kinds]
    values, states = (sum(part) for part in zip(*layers, strict=True))
    if recompute:
        values, states = len(layers) * sizes.stream_bytes, 0
    values += sum(end_activations(sizes, chunk.is_first, chunk.is_last) for chunk in chunks)
    passes = passes_under_way(sizes, stage)
    # `passes` counts passes of one chunk each; values and states are of all chunks of the stage.
    kept = Kept(values * passes // len(chunks), states * passes // len(chunks))
    if recompute:
        # One layer at a time is recomputed.
        largest = max(layers, key=sum)
        kept = Kept(kept.values + largest.values, largest.states)
    return kept


def passes_under_way(sizes: Sizes, stage: int) -> int:
    """Return the most forward passes that wait for their backward pass at one time, in Megatron's schedules."""
    pipeline, chunks = sizes.config.parallel.pipeline, sizes.config.parallel.virtual_pipeline
    if chunks == 1:
        # One-forward-one-backward: the last stage holds one pass, each stage before it one more.
        return min(pipeline - stage, sizes.num_micro_batches)
    # Warm-up of the interleaved schedule; then one forward pass alternates with one backward pass.
    warm_up = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline
    return min(warm_up + 1, sizes.num_micro_batches * chunks)


def _hand_off(sizes: Sizes) -> int:
    config, largest = sizes.config, 0
    if config.parallel.context == 1:
        return 0
    for kind in set(config.model.layer_kinds()) - {"softmax"}:
        mixer = sizes.of_mixer(kind)
        banks = config.training.micro_batch_size * sizes.num_slots * (1 + mixer.partitions)
        copies = HAND_OFF_COPIES[mixer.spec.recurrence.delta_rule]
        if config.parallel.hand_off == "allgather":
            copies *= config.parallel.context
        largest = max(largest, int(copies * banks * mixer.state * FP32))
    return largest


def _working(sizes: Sizes, stage: int) -> int:
    model, tensor = sizes.config.model, sizes.config.parallel.tensor
    widths = [2 * model.ffn_hidden_size // tensor]
    if stage == sizes.config.parallel.pipeline - 1:
        widths.append(model.padded_vocab_size // tensor)
    return sizes.tokens * sizes.element * max(widths)
