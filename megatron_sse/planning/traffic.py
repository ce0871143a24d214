"""Bytes that a rank sends in one optimizer step, by axis; counted the way parallel.traffic counts them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from megatron_sse.config import attention_kind, recomputed_parts, uses_distributed_optimizer
from megatron_sse.config.weights import embedding_weight
from megatron_sse.planning.hand_off import sent_bytes
from megatron_sse.planning.parameters import Chunk, chunk_buffers, chunk_weights, stage_chunks
from megatron_sse.planning.sizes import FP32, Sizes

AXES = ("tensor", "pipeline", "context", "data")
# Bytes summed once per step: seven fp64 sums of losses, tokens, answers, layers and ranks whose gradient is not finite,
# and a 4-byte number of tokens.
LOSS_SUMS = 56
TOKEN_COUNT = 4


class Passes(NamedTuple):
    """Bytes sent in the forward and in the backward pass of one micro-batch."""

    forward: int
    backward: int


def step_traffic(sizes: Sizes, stage: int, context_rank: int = 0) -> dict[str, int]:
    """Return the bytes that a rank of a pipeline stage sends in one optimizer step, for each of AXES."""
    config, sent = sizes.config, Counter(dict.fromkeys(AXES, 0))
    parallel, again = config.parallel, recomputed_parts(config)
    for chunk in stage_chunks(config, stage):
        for kind in chunk.kinds:
            for axis, part, bytes_ in (
                ("tensor", "mlp", _mlp_over_tensor(sizes)),
                ("tensor", "mixer", _mixer_over_tensor(sizes, kind)),
                ("context", "mixer", _mixer_over_context(sizes, kind, context_rank)),
            ):
                passes = 2 if config.training.recompute == "full" or part in again else 1
                sent[axis] += sizes.num_micro_batches * (passes * bytes_.forward + bytes_.backward)
        ends = _ends_over_tensor(sizes, chunk.is_first, chunk.is_last)
        sent["tensor"] += sizes.num_micro_batches * ends
        if parallel.pipeline > 1:
            # Activations go to the next chunk, gradients to the one before.
            neighbours = (not chunk.is_first) + (not chunk.is_last)
            sent["pipeline"] += sizes.num_micro_batches * neighbours * sizes.stream_bytes
        sent["data"] += _gradients(sizes, chunk)
    sent["tensor"] += _summed_gradients(sizes, stage)
    sent["pipeline"] += all_reduce(LOSS_SUMS, parallel.pipeline)
    if config.model.tie_embeddings and parallel.pipeline > 1 and stage in (0, parallel.pipeline - 1):
        sent["pipeline"] += all_reduce(FP32 * embedding_weight(config.model).local_size(parallel.tensor), 2)
    sent["data"] += all_reduce(LOSS_SUMS, sizes.gradient_ranks) + all_reduce(TOKEN_COUNT, sizes.gradient_ranks)
    return dict(sent)


def all_reduce(size: int, ranks: int) -> int:
    """Return the bytes that a rank sends to sum `size` bytes over the ranks: a reduce-scatter and an all-gather."""
    return size * 2 * (ranks - 1) // ranks


def exchange(size: int, ranks: int) -> int:
    """Return the bytes that a rank sends to gather `size` bytes in all from the ranks, or to reduce-scatter them."""
    return size * (ranks - 1) // ranks


def _mlp_over_tensor(sizes: Sizes) -> Passes:
    """Return what an input matrix split by columns and an output matrix split by rows send over the tensor group."""
    stream = sizes.config.model.hidden_size * sizes.element * sizes.tokens
    columns, rows = _columns(sizes, stream), _rows(sizes, stream)
    return Passes(columns.forward + rows.forward, columns.backward + rows.backward)


def _mixer_over_tensor(sizes: Sizes, kind: str) -> Passes:
    """Return what a mixer sends over the tensor group for its split matrices, heads and router."""
    config, tokens = sizes.config, sizes.tokens
    tensor, sequence = config.parallel.tensor, config.parallel.sequence
    # Its matrices are split as those of the MLP.
    forward, backward = _mlp_over_tensor(sizes)
    if sequence:
        # Tensor ranks hold parts of the sequence, on all context ranks.
        part = config.data.sequence_length // (config.parallel.context * tensor)
        halo = _input_halo(sizes, config.parallel.context * tensor, 1, part)
        forward, backward = forward + halo, backward + halo
    if kind == "softmax":
        softmax = config.model.softmax
        if softmax.num_kv_heads < tensor:
            # Ranks hold parts of heads and gather them.
            rows = (softmax.num_heads + 2 * softmax.num_kv_heads) * softmax.head_dim * sizes.element
            forward += exchange(tokens * rows, tensor)
            backward += exchange(tokens * rows, tensor)
        return Passes(forward, backward)
    sse, mixer = config.model.sse, sizes.of_mixer(kind)
    ranks = [sse.value_head_dim] * (mixer.maps if mixer.partitions else 0)
    ranks += [sse.value_head_dim] if sse.output_gate else []
    ranks += [sse.decay_low_rank] * mixer.gates if mixer.spec.has_decay_gates else []
    # What enters the second matrices of all low-rank pairs is gathered once, and kept.
    low = tokens * sum(ranks) * sizes.element
    if sequence:
        forward, backward = forward + exchange(low, tensor), backward + exchange(low, tensor)
    else:
        backward += all_reduce(low, tensor)
    backward += all_reduce(sse.value_head_dim * sizes.element, tensor)  # output norm, whose heads are split
    if mixer.partitions:
        probabilities = tokens * sse.num_routers * mixer.partitions * FP32
        if sequence:
            forward += exchange(probabilities, tensor) + all_reduce(mixer.partitions * FP32, tensor)
            backward += exchange(probabilities, tensor)
        else:
            backward += all_reduce(probabilities, tensor)
    return Passes(forward, backward)


def _columns(sizes: Sizes, size: int) -> Passes:
    """Return the bytes for a matrix split by columns, whose input of `size` bytes gets a summed gradient."""
    parallel = sizes.config.parallel
    if not parallel.sequence:
        return Passes(0, all_reduce(size, parallel.tensor))
    part = exchange(size, parallel.tensor)
    # The input is gathered, and gathered again for the weight's gradient; its own gradient is reduce-scattered.
    return Passes(part, 2 * part)


def _rows(sizes: Sizes, size: int) -> Passes:
    """Return the bytes for a matrix split by rows, whose output of `size` bytes is summed."""
    parallel = sizes.config.parallel
    if not parallel.sequence:
        return Passes(all_reduce(size, parallel.tensor), 0)
    part = exchange(size, parallel.tensor)
    return Passes(part, part)


def _ends_over_tensor(sizes: Sizes, is_first: bool, is_last: bool) -> int:
    """Return the bytes of embedding, output and loss, forward plus backward."""
    config, tensor = sizes.config, sizes.config.parallel.tensor
    stream = config.model.hidden_size * sizes.element * sizes.tokens
    sent = sum(_rows(sizes, stream)) if is_first else 0
    if is_last:
        # The loss takes the largest logit, the label's, and the sum over the vocabulary.
        sent += sum(_columns(sizes, stream)) + 3 * all_reduce(sizes.tokens * FP32, tensor)
    return sent


def _summed_gradients(sizes: Sizes, stage: int) -> int:
    """Return the bytes for gradients that each tensor rank has only for its part of the sequence or of the heads."""
    config = sizes.config
    weights = [w for chunk in stage_chunks(config, stage) for w in chunk_weights(config, chunk)]
    every = config.parallel.sequence
    summed = sum(w.size for w in weights if w.summed and (every or w.part == "softmax"))
    return all_reduce(FP32 * summed, config.parallel.tensor)


def _mixer_over_context(sizes: Sizes, kind: str, rank: int) -> Passes:
    """Return what a mixer sends over the context group: states, or keys and values, and halos of convolutions."""
    config, ranks = sizes.config, sizes.config.parallel.context
    if ranks == 1:
        return Passes(0, 0)
    slot = config.data.sequence_length // len(sizes.chain)
    before = 0 if config.parallel.sequence else _input_halo(sizes, ranks, sizes.num_slots, slot)
    if kind == "softmax":
        passes = _attention_over_context(sizes)
        return Passes(passes.forward + before, passes.backward + before)
    mixer = sizes.of_mixer(kind)
    forward, backward = sent_bytes(sizes, kind, rank)
    channels = mixer.maps * mixer.keys
    halo = before + _halo(sizes, config.model.sse.short_convolution, ranks, sizes.num_slots, slot, channels)
    forward, backward = forward + halo, backward + halo
    if mixer.partitions:
        forward += all_reduce((2 * mixer.partitions + 1) * FP32, ranks)  # the balance loss
    return Passes(forward, backward)


def _input_halo(sizes: Sizes, ranks: int, num_slots: int, slot: int) -> int:
    """Return the bytes of the halo for the convolution in front of a mixer."""
    model = sizes.config.model
    return _halo(sizes, model.input_convolution, ranks, num_slots, slot, model.hidden_size)


def _halo(sizes: Sizes, width: int, ranks: int, num_slots: int, slot: int, channels: int) -> int:
    """Return the bytes of a halo: the last width - 1 tokens of each slot of `slot` tokens, sent to all other ranks."""
    tokens = sizes.config.training.micro_batch_size * num_slots * min(max(width - 1, 0), slot)
    return (ranks - 1) * tokens * channels * sizes.element


def _attention_over_context(sizes: Sizes) -> Passes:
    config, softmax = sizes.config, sizes.config.model.softmax
    ranks, tensor = config.parallel.context, config.parallel.tensor
    # Keys and values of this rank's tokens.
    pair = 2 * sizes.tokens * max(1, softmax.num_kv_heads // tensor) * softmax.head_dim * sizes.element
    kind = attention_kind(config) if sizes.kernels == "triton" else None
    if kind == "a2a":
        queries = 2 * sizes.tokens * softmax.num_heads // tensor * softmax.head_dim * sizes.element  # and outputs
        passes = Passes(exchange(pair + queries, ranks), exchange(pair + queries, ranks))
    elif kind == "p2p":
        # A ring, whose backward pass also sends the gradients.
        passes = Passes((ranks - 1) * pair, 2 * (ranks - 1) * pair)
    else:
        passes = Passes((ranks - 1) * pair, (ranks - 1) * pair)
    if kind is None or sizes.num_slots == 2:
        return passes
    # Tokens move to the zigzag order that Transformer Engine needs, and back.
    moved = 2 * exchange(sizes.stream_bytes, ranks)
    return Passes(passes.forward + moved, passes.backward + moved)


def _gradients(sizes: Sizes, chunk: Chunk) -> int:
    """Return the bytes for gradients, summed over the ranks with the same weights.

    The distributed optimizer also gathers the updated weights.
    """
    ranks, sent = sizes.gradient_ranks, 0
    for buffer in chunk_buffers(sizes, chunk):
        if uses_distributed_optimizer(sizes.config):
            sent += exchange(FP32 * buffer.padded, ranks) + exchange(buffer.width * buffer.padded, ranks)
        else:
            sent += all_reduce(FP32 * buffer.size, ranks)
    return sent
