"""Bytes that are held for a while in a layer's backward pass, beside what autograd has kept."""

from __future__ import annotations

from typing import NamedTuple

from megatron_sse.chunking import CPU_BLOCK
from megatron_sse.config import recomputed_parts
from megatron_sse.parallel.sharding import MASKED_PAIRS
from megatron_sse.planning.activations import (
    add,
    after_recurrence,
    layer_activations,
    masked_pairs,
    num_rows,
    runs_torch,
    torch_chunks,
)
from megatron_sse.planning.sizes import FP32, Mixer, Sizes

# Tensors that the CPU's kernels hold of a block of chunks, each as large as its queries, by what the recurrence's table
# says (delta rule, a decay per channel); counted in real steps (tests/planning/test_memory.py).
TENSORS_OF_BLOCK = {(False, True): 21, (True, False): 24, (True, True): 38}


class Moment(NamedTuple):
    """recomputed: what the backward pass has made again. working: gradients and intermediate results, less what it has
    already released of the layer."""

    recomputed: int
    working: int


def fullest_moment(sizes: Sizes, kind: str) -> Moment:
    """Return the fuller one of two moments in a layer's backward pass: in its MLP, which comes first, or its mixer."""
    parts = layer_activations(sizes, kind)
    is_full, again = sizes.config.training.recompute == "full", recomputed_parts(sizes.config)
    layer = sum(add(parts.values()))

    def made_again(part: str) -> int:
        return layer if is_full else sum(parts[part]) if part in again else 0

    inner = sizes.config.model.ffn_hidden_size // sizes.config.parallel.tensor
    in_mlp = Moment(made_again("mlp"), sizes.tokens * sizes.element * 2 * inner)
    # The MLP and its norm are done. If it is recomputed by itself, it has never been among what is kept.
    released = sum(parts["norms"]) // 2 + (0 if "mlp" in again else sum(parts["mlp"]))
    if kind == "softmax":
        working = _in_softmax(sizes)
    elif runs_torch(sizes, sizes.of_mixer(kind)):
        mixer = sizes.of_mixer(kind)
        working = max(_end_of_forward(sizes, mixer), _in_chunks(sizes, mixer)) - after_recurrence(sizes, mixer)
    else:
        return in_mlp
    return max(in_mlp, Moment(made_again("mixer"), working - released), key=sum)


def _in_softmax(sizes: Sizes) -> int:
    """Return what is there while gradients go through torch's attention, piece by piece."""
    softmax, parallel = sizes.config.model.softmax, sizes.config.parallel
    heads, kv_heads = softmax.num_heads // parallel.tensor, max(1, softmax.num_kv_heads // parallel.tensor)
    # Gradients of queries and outputs, and of all keys and values, to which each chunk adds.
    width = softmax.head_dim * (2 * heads + 4 * kv_heads * parallel.context)
    # Three masks of bool, of which one becomes fp32.
    return sizes.tokens * sizes.element * width + min(masked_pairs(sizes), MASKED_PAIRS) * (3 + FP32)


def _end_of_forward(sizes: Sizes, mixer: Mixer) -> int:
    """Return what is there when the recurrence's outputs are put back in order, in a forward pass or the second one."""
    rows, chunks = num_rows(sizes, mixer), torch_chunks(sizes, mixer)
    # Queries, keys and gates of all banks' rows, and the gates with resets; values, scaled ones, and outputs.
    width = rows * (2 * mixer.key_dim + 2 * chunks.gates + 3 * mixer.value_dim)
    # Outputs inside the chunks, with what is read from the states, and a copy.
    width += chunks.rows * 3 * mixer.value_dim
    return FP32 * (mixer.value_heads * width + chunks.number * (mixer.state + mixer.transition))


def _in_chunks(sizes: Sizes, mixer: Mixer) -> int:
    """Return what is there while gradients go through the chunks, one block after the other."""
    chunks = torch_chunks(sizes, mixer)
    # Gradients of queries, keys, values and gates; of the outputs and of what reads the states.
    width = 3 * mixer.key_dim + 2 * mixer.value_dim + chunks.gates
    block = min(chunks.rows * mixer.value_heads * mixer.key_dim, CPU_BLOCK)
    recurrence = mixer.spec.recurrence
    block *= TENSORS_OF_BLOCK[recurrence.delta_rule, recurrence.channel_decay]
    passed = chunks.number * 2 * (mixer.state + mixer.transition)
    return FP32 * (chunks.rows * mixer.value_heads * width + passed + block)
