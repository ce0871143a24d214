"""Bytes that the answers of reinforcement learning take on a rank while they are generated."""

from __future__ import annotations

from megatron_sse.planning.sizes import FP32, Sizes

# Drawing tokens takes, for each token of the vocabulary: logits and log-probabilities in fp32, and probabilities and
# their sums in fp64; with rl.top_p they are sorted, with the order as int64.
_DRAW, _DRAW_SORTED = 2 * 4 + 2 * 8, 2 * 4 + 5 * 8
# Keys and values have room for up to half as many rows again as are used (inference/layers.py).
_SPARE_ROWS = 1.5


def generation_bytes(sizes: Sizes) -> int:
    """Return what the layers keep of all answers under way, and what drawing their next tokens takes; 0 without rl.

    Counted is the worst: all sequences are of data.sequence_length.
    """
    config = sizes.config
    if config.rl is None:
        return 0
    answers = _answers(sizes)
    kept = sum(_kept_of_layer(sizes, kind) for kind in config.model.layer_kinds())
    # The logits of all tensor ranks come to each of them.
    draw = _DRAW if config.rl.top_p == 1 else _DRAW_SORTED
    # What the output layer gives is converted, unless it is fp32.
    logits = config.model.padded_vocab_size * (draw + (sizes.element if sizes.element < FP32 else 0))
    return answers * (kept + logits)


def _answers(sizes: Sizes) -> int:
    """Return the answers that a rank generates at the same time (rl/rollouts.py)."""
    rl = sizes.config.rl
    assert rl is not None
    if rl.validation_prompts is not None:
        # Held-out prompts have one answer each, and may be many.
        return max(rl.answers_at_once, rl.group_size)
    groups = -(-rl.prompts_per_step // sizes.gradient_ranks)
    return rl.group_size * min(max(1, rl.answers_at_once // rl.group_size), groups)


def _picks(sizes: Sizes, kind: str) -> int:
    """Return the bytes of the picks of a sequence that are replayed in training, int16."""
    rl, sse = sizes.config.rl, sizes.config.model.sse
    if rl is None or not rl.replay_routing or kind != "sse" or not sse.num_partitions:
        return 0
    return 2 * sizes.config.data.sequence_length * sse.num_picks


def _kept_of_layer(sizes: Sizes, kind: str) -> int:
    """Return the bytes that a layer keeps of one sequence."""
    model, tensor = sizes.config.model, sizes.config.parallel.tensor
    kept = max(0, model.input_convolution - 1) * model.hidden_size * sizes.element
    if kind != "softmax":
        mixer = sizes.of_mixer(kind)
        tail = max(0, mixer.spec.settings.short_convolution - 1) * mixer.maps * mixer.keys * sizes.element
        return kept + tail + (1 + mixer.partitions) * mixer.state * FP32 + _picks(sizes, kind)
    softmax = model.softmax
    rows = softmax.window or int(_SPARE_ROWS * sizes.config.data.sequence_length)
    return kept + 2 * rows * max(1, softmax.num_kv_heads // tensor) * softmax.head_dim * sizes.element
