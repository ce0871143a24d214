"""Bytes that a rank holds at the fullest moment of a step, by pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_sse.chunking import DECAYS_AT_ONCE
from megatron_sse.config import choose_loss_chunk, uses_distributed_optimizer
from megatron_sse.planning.activations import INT64, Kept, add, end_activations, kept_of_layer
from megatron_sse.planning.generation import generation_bytes
from megatron_sse.planning.parameters import chunk_buffers, stage_chunks
from megatron_sse.planning.sizes import FP32, Sizes
from megatron_sse.planning.working import Moment, fullest_moment

# How many copies of a rank's states a hand-off (parallel/handoff) holds at most, without and with the delta rule;
# counted by tests/parallel/test_handoff_volume.py.
HAND_OFF_COPIES = {False: 4.2, True: 5.1}


@dataclass(frozen=True)
class Memory:
    """Memory of a rank in bytes.

    Held all the time:
        optimizer: moments, in bf16 runs also the fp32 weights. activations, states: kept for the backward passes to
        come, of tokens and of recurrences. tables: documents, tokens and labels of the micro-batches under way.
    Held while a layer is computed:
        recomputed: what the backward pass makes again of it. hand_off: buffers of one hand-off. metrics: of a step that
        reports the layers' health. working: gradients and intermediate results, less what is released by then.
    Held while the loss is computed:
        logits: of a chunk of tokens, with the gradients of the output layer's input and weight.
    Held while answers are generated, when there are neither activations nor tables:
        generation: what layers keep of the answers under way, and what drawing tokens takes; 0 without rl.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    states: int
    tables: int
    recomputed: int
    hand_off: int
    metrics: int
    working: int
    logits: int
    generation: int

    @property
    def total(self) -> int:
        """Memory at the fullest moment: in a layer, in the loss, or while answers are generated."""
        return self.weights + self.gradients + self.optimizer + max(self._training, self.generation)

    @property
    def is_fullest_in_generation(self) -> bool:
        return self.generation > self._training

    @property
    def _training(self) -> int:
        """Bytes that forward and backward passes hold at their fullest moment."""
        held = self.activations + self.states + self.tables
        return held + max(self.recomputed + self.hand_off + self.metrics + self.working, self.logits)


def rank_memory(sizes: Sizes, stage: int) -> Memory:
    """Return the memory of a rank of a pipeline stage."""
    chunks = stage_chunks(sizes.config, stage)
    buffers = [buffer for chunk in chunks for buffer in chunk_buffers(sizes, chunk)]
    shards = sizes.gradient_ranks if uses_distributed_optimizer(sizes.config) else 1
    kept = kept_of_step(sizes, stage)
    kinds = {kind for chunk in chunks for kind in chunk.kinds}
    moment = max((moment for chunk in chunks for moment in _moments(sizes, chunk.kinds)), key=sum)
    return Memory(
        weights=sum(buffer.padded * buffer.width for buffer in buffers),
        gradients=sum(buffer.padded * FP32 for buffer in buffers),
        # Two moments, and an fp32 copy of what is not fp32 itself.
        optimizer=sum(buffer.padded * FP32 * (2 if buffer.width == FP32 else 3) // shards for buffer in buffers),
        activations=kept.values,
        states=kept.states,
        tables=_tables(sizes, stage),
        recomputed=moment.recomputed,
        hand_off=_hand_off(sizes),
        metrics=max(_metrics(sizes, kind) for kind in kinds),
        working=moment.working,
        logits=_logits(sizes) if chunks[-1].is_last else 0,
        generation=generation_bytes(sizes),
    )


def _moments(sizes: Sizes, kinds: Sequence[str]) -> Iterator[Moment]:
    """Yield the fullest moment of each layer, the last one first, without what the layers after it have released."""
    released = 0
    for kind in reversed(kinds):
        moment = fullest_moment(sizes, kind)
        yield moment._replace(working=moment.working - released)
        released += sum(kept_of_layer(sizes, kind))


def kept_of_step(sizes: Sizes, stage: int) -> Kept:
    """Return the activations of all micro-batches whose backward pass is still to come."""
    chunks = stage_chunks(sizes.config, stage)
    kept = add(kept_of_layer(sizes, kind) for chunk in chunks for kind in chunk.kinds)
    kept = kept.plus(sum(end_activations(sizes, chunk.is_first, chunk.is_last) for chunk in chunks))
    passes = passes_under_way(sizes, stage)
    # `passes` counts passes of one chunk each; what is kept is of all chunks of the stage.
    return Kept(kept.values * passes // len(chunks), kept.states * passes // len(chunks))


def passes_under_way(sizes: Sizes, stage: int) -> int:
    """Return the most forward passes that wait for their backward pass at one time, in Megatron's schedules."""
    pipeline, chunks = sizes.config.parallel.pipeline, sizes.config.parallel.virtual_pipeline
    if chunks == 1:
        # One-forward-one-backward: the last stage holds one pass, each stage before it one more.
        return min(pipeline - stage, sizes.num_micro_batches)
    # Warm-up of the interleaved schedule; then one forward pass alternates with one backward pass.
    warm_up = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline
    return min(warm_up + 1, sizes.num_micro_batches * chunks)


def table_bytes(sizes: Sizes) -> int:
    """Return the bytes of a micro-batch's Batch: its tokens and labels, and where its documents are."""
    length, batch = sizes.config.data.sequence_length, sizes.config.training.micro_batch_size
    # Span, fragment, position and document, token and label, and the loss mask; a slot's columns.
    own = sizes.tokens * (6 * INT64 + FP32) + length // sizes.config.parallel.context * INT64
    # Columns and documents of all ranks' keys, for softmax layers. Offsets of the spans and the fragments.
    return own + length * INT64 * (1 + batch) + INT64 * (sizes.spans + 1 + sizes.fragments + 1)


def _tables(sizes: Sizes, stage: int) -> int:
    # One more than is under way: the next one is made ahead.
    return table_bytes(sizes) * min(passes_under_way(sizes, stage) + 1, sizes.num_micro_batches)


def _hand_off(sizes: Sizes) -> int:
    config, largest = sizes.config, 0
    if config.parallel.context == 1:
        return 0
    for kind in set(config.model.layer_kinds()) - {"softmax"}:
        mixer = sizes.of_mixer(kind)
        banks = config.training.micro_batch_size * sizes.num_slots * (1 + mixer.partitions)
        copies = HAND_OFF_COPIES[mixer.spec.recurrence.delta_rule]
        if sizes.hand_off[0] == "allgather":
            copies *= config.parallel.context
        largest = max(largest, int(copies * banks * mixer.state * FP32))
    return largest


def _metrics(sizes: Sizes, kind: str) -> int:
    """Return the bytes that a layer's health takes: decays in fp32 and their exponentials, and the router's entropy."""
    if kind == "softmax":
        return 0
    mixer = sizes.of_mixer(kind)
    decays = mixer.decays if mixer.spec.recurrence.delta_rule else mixer.keys
    return FP32 * (2 * min(sizes.tokens * decays, DECAYS_AT_ONCE) + 3 * sizes.tokens * mixer.partitions)


def _logits(sizes: Sizes) -> int:
    """Return the most bytes of the loss in its backward pass (parallel/linear_cross_entropy.py)."""
    model, tensor = sizes.config.model, sizes.config.parallel.tensor
    rows = model.padded_vocab_size // tensor
    logits = min(choose_loss_chunk(sizes.config), sizes.tokens) * rows
    weight = rows * model.hidden_size * sizes.element
    if sizes.element < FP32:
        # Logits in both types; then their gradient, and what the chunk adds to the weight's.
        chunk = max(logits * (sizes.element + FP32), logits * sizes.element + weight)
    else:
        # Autograd gets a weight gradient of zeros at the end.
        chunk = max(logits * FP32, weight)
    hidden = sizes.tokens * model.hidden_size * sizes.element
    # Under sequence parallelism the input of all tokens is gathered.
    return chunk + hidden * (2 if sizes.config.parallel.sequence else 1)
