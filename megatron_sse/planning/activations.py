"""Bytes that autograd keeps of a micro-batch on one rank, added up over what each module saves.

There are two sets of kernels: "torch", which runs without a GPU, cuts rows into padded fp32 chunks and keeps those;
"triton", with Transformer Engine's norms, keeps the inputs as they are and the states between pieces. What recurrences
keep does not depend on the documents, which are resets inside the spans.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

from megatron_sse.chunking import CHUNK_SIZE, choose_chunk_size, choose_chunks_per_piece
from megatron_sse.config import recomputed_parts
from megatron_sse.config.derive import fuses_swiglu
from megatron_sse.parallel.sharding import MASKED_PAIRS
from megatron_sse.planning.sizes import FP32, Mixer, Sizes

INT64 = 8


class Kept(NamedTuple):
    """Kept bytes. values: of tokens. states: of recurrences, between chunks and between ranks."""

    values: int
    states: int = 0

    def plus(self, values: int, states: int = 0) -> Kept:
        return Kept(self.values + values, self.states + states)


def add(kept: Iterable[Kept]) -> Kept:
    """Return the sum."""
    return reduce(lambda one, other: one.plus(*other), kept, Kept(0))


def layer_activations(sizes: Sizes, kind: str) -> dict[str, Kept]:
    """Return what the parts of a layer keep without recomputation: its norms, and RECOMPUTED_PARTS."""
    inner = sizes.config.model.ffn_hidden_size // sizes.config.parallel.tensor
    fused = fuses_swiglu(sizes.config, sizes.kernels == "triton")
    mixer = Kept(_softmax(sizes)) if kind == "softmax" else recurrent_activations(sizes, kind)
    # Torch keeps a copy for each token that the convolution looks back at.
    width = sizes.config.model.input_convolution
    convolution = sizes.stream_bytes * (width if sizes.kernels == "torch" else min(width, 1))
    return {
        # Both norms with their outputs, which are the inputs of mixer and MLP.
        "norms": Kept(2 * (_norm(sizes) + sizes.stream_bytes)),
        "mixer": mixer.plus(convolution),
        # Gate and up (2 x inner), and what SwiGLU makes of them: 3 x inner step by step, fused only its result.
        "mlp": Kept(sizes.tokens * (3 if fused else 5) * inner * sizes.element),
    }


def kept_of_layer(sizes: Sizes, kind: str) -> Kept:
    """Return what a layer keeps with this run's recomputation."""
    if sizes.config.training.recompute == "full":
        return Kept(sizes.stream_bytes)
    again = recomputed_parts(sizes.config)
    return add(part for name, part in layer_activations(sizes, kind).items() if name not in again)


def end_activations(sizes: Sizes, is_first: bool, is_last: bool) -> int:
    """Return what the embedding keeps (is_first), and what the output and the loss keep (is_last)."""
    kept = INT64 * sizes.tokens if is_first else 0
    if is_last:
        model = sizes.config.model
        kept += _norm(sizes) + sizes.stream_tokens * model.hidden_size * sizes.element
        kept += sizes.tokens * (INT64 + FP32)  # labels, and one sum for each
    return kept


def _norm(sizes: Sizes) -> int:
    hidden = sizes.config.model.hidden_size
    # Torch keeps input and normalised input, both fp32; fused kernels keep the input. Both keep one number per token.
    width = 2 * FP32 if sizes.kernels == "torch" else sizes.element
    return sizes.stream_tokens * (width * hidden + FP32)


def _softmax(sizes: Sizes) -> int:
    softmax, parallel = sizes.config.model.softmax, sizes.config.parallel
    heads, dim = softmax.num_heads // parallel.tensor, softmax.head_dim
    kv_heads = max(1, softmax.num_kv_heads // parallel.tensor)
    gathered = parallel.context if sizes.kernels == "torch" else 1
    elements = 2 * heads * dim  # queries, output
    if gathered > 1:
        elements += 2 * gathered * kv_heads * dim
    else:
        elements += kv_heads * dim + (heads + 2 * kv_heads) * dim  # keys, and the projection that holds the values
    if softmax.rotary_base:
        elements += 4 * dim  # sines and cosines for queries and keys
    kept = sizes.element * elements + FP32 * heads
    if softmax.qk_norm:
        kept += (2 if sizes.element < FP32 or gathered > 1 else 1) * FP32 * (heads + kv_heads) * dim
    pairs = masked_pairs(sizes)
    # Where queries go in chunks, masks are made again.
    return sizes.tokens * kept + (FP32 * pairs if pairs <= MASKED_PAIRS else 0)


def masked_pairs(sizes: Sizes) -> int:
    """Return the pairs of queries and keys that a softmax layer masks: where answers share their prompts, and on CPUs
    with dropout; context excludes both."""
    config = sizes.config
    if sizes.answers:
        return sizes.tokens * config.data.sequence_length
    is_masked = sizes.documents > 1 or config.model.softmax.window is not None
    is_masked = is_masked and bool(config.model.transformer.get("attention_dropout"))
    return sizes.tokens * config.data.sequence_length if sizes.kernels == "torch" and is_masked else 0


def recurrent_activations(sizes: Sizes, kind: str) -> Kept:
    """Return what is kept of the mixer of an SSE layer, without its input."""
    mixer = sizes.of_mixer(kind)
    kept = sizes.tokens * (_inputs(sizes, mixer) + _router(sizes, mixer)) + _low_ranks(sizes, mixer)
    recurrence = _torch_recurrence if runs_torch(sizes, mixer) else _triton_recurrence
    return recurrence(sizes, mixer).plus(kept)


def _inputs(sizes: Sizes, mixer: Mixer) -> int:
    """Return the bytes per token of projections, and of what is computed from queries, keys and decays."""
    sse, element = sizes.config.model.sse, sizes.element
    recurrence = mixer.spec.recurrence
    scalars = len(recurrence.scalars) * mixer.gates * mixer.value_heads
    kept = element * (mixer.maps * mixer.keys + mixer.values + scalars)
    if mixer.value_heads > mixer.heads:
        kept += element * mixer.values
    sparse = mixer.banks - 1
    kept += mixer.banks * FP32 * mixer.keys if sse.query_map == "softmax" else sparse * element * mixer.keys
    kept += sparse * element * mixer.keys if mixer.spec.key_map == "silu" else mixer.banks * FP32 * mixer.keys
    if recurrence.delta_rule:
        kept += mixer.banks * FP32 * (2 * mixer.decays + mixer.value_heads)
        if runs_torch(sizes, mixer):
            kept += mixer.banks * FP32 * 2 * (mixer.keys + mixer.heads)
        else:
            # The kernel that normalises keeps its input; softmax maps have kept theirs already.
            maps = (sse.query_map, mixer.spec.key_map)
            kept += mixer.banks * element * mixer.keys * sum(m == "silu" for m in maps)
    elif sse.decay == "gate":
        kept += 2 * mixer.gates * FP32 * mixer.keys
    kept += sse.short_convolution * mixer.maps * mixer.keys * element
    return kept + element * mixer.values  # what goes into the output projection


def _low_ranks(sizes: Sizes, mixer: Mixer) -> int:
    """Return the bytes of what enters the second matrices of low-rank pairs, and of their first matrices as one."""
    sse = sizes.config.model.sse
    ranks = sse.value_head_dim * ((mixer.maps if mixer.partitions else 0) + sse.output_gate)
    if mixer.spec.has_decay_gates:
        ranks += sse.decay_low_rank * mixer.gates
    return (sizes.tokens + sizes.config.model.hidden_size) * ranks * sizes.element


def _router(sizes: Sizes, mixer: Mixer) -> int:
    """Return the bytes per token of probabilities, their order, picks' weights, and in bf16 runs the input in fp32."""
    if not mixer.partitions:
        return 0
    hidden = sizes.config.model.hidden_size if sizes.element < FP32 else 0
    # With sequence parallelism each tensor rank routes its part of the tokens.
    parts = sizes.config.parallel.tensor if sizes.config.parallel.sequence else 1
    # Torch sorts all partitions; the kernel finds only the picks.
    every = sizes.config.model.sse.num_routers * mixer.partitions
    ranked = every if sizes.kernels == "torch" else _picks(sizes, mixer)
    return every * FP32 + ranked * INT64 + 3 * FP32 * _picks(sizes, mixer) + FP32 * hidden // parts


def _picks(sizes: Sizes, mixer: Mixer) -> int:
    """Return the number of partitions for which a token has rows."""
    sse = sizes.config.model.sse
    if not mixer.partitions:
        return 0
    return mixer.partitions if sse.form == "mask" else sse.num_picks


def _segments(sizes: Sizes, mixer: Mixer) -> int:
    """Return the number of (span, bank) pairs."""
    return sizes.spans * (1 + mixer.partitions)


def _states(sizes: Sizes, mixer: Mixer, pieces: int) -> int:
    """Return the bytes of the states that enter the pieces, and of the pieces' transitions."""
    kept = pieces * (mixer.state + mixer.transition)
    if sizes.config.parallel.context > 1:
        # Also kept: states from other ranks, their sum with local ones, and the hand-off's own copies.
        kept += 2 * pieces * mixer.state + pieces * mixer.transition
        kept += _segments(sizes, mixer) * (mixer.state + mixer.transition)
    return FP32 * kept


def runs_torch(sizes: Sizes, mixer: Mixer) -> bool:
    """Check whether the recurrence has only its torch form."""
    return sizes.kernels == "torch" or not mixer.spec.recurrence.has_triton


def num_rows(sizes: Sizes, mixer: Mixer) -> int:
    """Return the rows of all banks: one of the shared bank for each token, and one for each pick."""
    return sizes.tokens * (1 + _picks(sizes, mixer))


class Chunks(NamedTuple):
    """The chunks of the torch form. rows: of all of them, padding included. gates: numbers per row and head."""

    number: int
    rows: int
    gates: int


def torch_chunks(sizes: Sizes, mixer: Mixer) -> Chunks:
    """Return the chunks that the torch form cuts rows into."""
    rows, recurrence = num_rows(sizes, mixer), mixer.spec.recurrence
    # Rows are padded to complete chunks: up to one more chunk for each segment.
    size = choose_chunk_size(rows, _segments(sizes, mixer))
    number = rows // size + _segments(sizes, mixer)
    gates = (mixer.key_dim if recurrence.channel_decay else 1) + recurrence.delta_rule
    return Chunks(number, number * size, gates)


def after_recurrence(sizes: Sizes, mixer: Mixer) -> int:
    """Return the bytes that the torch form keeps behind the recurrence: outputs of the banks, and their norm."""
    kept = 0
    if mixer.partitions:
        kept += FP32 * num_rows(sizes, mixer) * mixer.values + sizes.element * sizes.tokens * mixer.values
    normed = 5 if sizes.config.model.sse.output_gate else 2
    return kept + FP32 * sizes.tokens * (normed * mixer.values + mixer.value_heads)


def _torch_recurrence(sizes: Sizes, mixer: Mixer) -> Kept:
    chunks = torch_chunks(sizes, mixer)
    # Queries, keys, values, decays, and the queries as they are applied to the entering state.
    width = FP32 * (3 * mixer.key_dim + mixer.value_dim + chunks.gates) + INT64
    kept = mixer.value_heads * (chunks.rows * width + num_rows(sizes, mixer) * INT64)
    return Kept(kept + after_recurrence(sizes, mixer), _states(sizes, mixer, chunks.number))


def _triton_recurrence(sizes: Sizes, mixer: Mixer) -> Kept:
    sse, element = sizes.config.model.sse, sizes.element
    picks, rows = _picks(sizes, mixer), num_rows(sizes, mixer)
    if mixer.spec.recurrence.delta_rule:
        inputs = mixer.banks * (2 * element * mixer.keys + FP32 * (mixer.decays + mixer.value_heads))
    else:
        # Decays that are equal for all tokens are written out for both kinds of banks.
        inputs = FP32 * mixer.keys * (mixer.banks if sse.decay == "gate" else 2)
        # Softmax maps keep their fp32 results already; other maps and other dtypes add a copy.
        maps = (sse.query_map, mixer.spec.key_map)
        inputs += mixer.banks * element * mixer.keys * sum(m == "silu" or element < FP32 for m in maps)
    # Values, the outputs of all banks, and the output gate.
    kept = sizes.tokens * (inputs + element * mixer.values * (2 + picks + sse.output_gate))
    kept += rows * 6 * FP32  # scales of the picks, which row is which token's, and where documents start
    # The kernels cut long segments into pieces until all blocks together fill a GPU.
    blocks = mixer.value_heads * max(1, mixer.key_dim // 64) * max(1, mixer.value_dim // 64)
    length = CHUNK_SIZE * choose_chunks_per_piece(rows, blocks)
    return Kept(kept, _states(sizes, mixer, rows // length + _segments(sizes, mixer)))
