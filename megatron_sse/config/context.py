"""Context parallelism: which tokens ranks hold, and what Transformer Engine 2.9 to 2.11 can do for softmax layers."""

from __future__ import annotations

from collections import Counter

from megatron_sse.config.problem import Found
from megatron_sse.config.schema import ParallelConfig, Settings

KINDS = ("p2p", "all_gather", "a2a")
# Values of parallel.hand_off for which parallel.context_per_node counts.
USE_NODES = ("auto", "two_level")


def attention_kind(config: Settings) -> str | None:
    """Return how Transformer Engine's attention exchanges keys and values between context ranks (cp_comm_type).

    This is the kind that is set, else the first that can do it; None where none can, and each rank has to gather keys
    and values itself.
    """
    if not _uses_kinds(config):
        return None
    given = config.model.transformer.get("cp_comm_type")
    return given or next((kind for kind in KINDS if obstacle(config, kind) is None), None)


def attends_over_context(config: Settings) -> bool:
    """Check whether there are softmax layers whose sequences are split."""
    return config.parallel.context > 1 and "softmax" in config.model.layer_kinds()


def _uses_kinds(config: Settings) -> bool:
    # In fp32 Transformer Engine has no context parallelism.
    return attends_over_context(config) and config.training.precision == "bf16"


def obstacle(config: Settings, kind: str) -> str | None:
    """Return the setting that keeps Transformer Engine from this kind of exchange, or None."""
    softmax, parallel, length = config.model.softmax, config.parallel, config.data.sequence_length
    if softmax.head_dim % 8:
        return f"model.softmax.head_dim {softmax.head_dim}, no multiple of 8"
    if kind == "p2p" and softmax.window is not None:
        return "model.softmax.window"
    if kind == "all_gather" and config.data.reset_at_documents:
        return "data.reset_at_documents"
    if kind == "all_gather" and length % (2 * parallel.context):
        return f"data.sequence_length {length}, no multiple of {2 * parallel.context}"
    if kind == "a2a":
        for name, heads in (("num_heads", softmax.num_heads), ("num_kv_heads", softmax.num_kv_heads)):
            # Fewer heads than tensor ranks: each has one.
            if max(1, heads // parallel.tensor) % parallel.context:
                return f"model.softmax.{name} {heads} on {parallel.tensor} x {parallel.context} ranks"
    return None


def context_problems(config: Settings) -> Found:
    """Yield settings of softmax layers that do not work under context parallelism."""
    given = config.model.transformer
    if not attends_over_context(config):
        return
    kind = given.get("cp_comm_type")
    if kind in KINDS and _uses_kinds(config) and obstacle(config, kind) is not None:
        allowed = ", ".join([*(other for other in KINDS if obstacle(config, other) is None), "null"])
        yield "model.transformer.cp_comm_type", kind, f"{allowed}: {kind} does not go with {obstacle(config, kind)}"
    if given.get("attention_dropout"):
        yield "model.transformer.attention_dropout", given["attention_dropout"], "0.0 while parallel.context is above 1"


def straddles_slots(config: Settings) -> bool:
    """Check whether the input convolution would meet a tensor rank's part that lies in two slots of a zigzag layout."""
    return bool(config.model.input_convolution and config.parallel.sequence and config.parallel.tensor % 2)


def choose_hand_off(parallel: ParallelConfig, gpus_per_node: int) -> tuple[str, int]:
    """Return the algorithm that hands off states, and the context ranks of a machine, which two_level needs.

    auto takes two_level over several machines with several context ranks each, and exscan elsewhere
    (docs/context_parallel.md has the model of their times). gpus_per_node: GPUs of a machine.
    """
    if parallel.context == 1:
        return "exscan", 1
    ranks = parallel.context_per_node if parallel.hand_off in USE_NODES else None
    if ranks is None:
        # Neighbouring processes differ in tensor first, then in context.
        ranks = min(parallel.context, max(1, gpus_per_node // parallel.tensor))
        if gpus_per_node % parallel.tensor or parallel.context % ranks:
            # Machines hold different numbers of context ranks.
            ranks = 1
    if parallel.hand_off != "auto":
        return parallel.hand_off, ranks
    return "two_level" if 1 < ranks < parallel.context else "exscan", ranks


def choose_layout(config: Settings) -> tuple[bool, str]:
    """Return whether context ranks hold zigzag parts of the sequences (else contiguous ones), and why.

    Zigzag balances causal attention; it doubles the states that SSE layers hand off, where contiguous parts would have
    to be rearranged around the softmax layers instead. The break-even is where both move the same bytes.
    """
    parallel, model, length = config.parallel, config.model, config.data.sequence_length
    if parallel.context == 1 or parallel.layout != "auto":
        return parallel.layout == "zigzag" and parallel.context > 1, "as set"
    if straddles_slots(config):
        return False, "a tensor rank's part would lie in two slots"
    kinds = Counter(model.layer_kinds())
    linear, softmax = sum(kinds.values()) - kinds["softmax"], kinds["softmax"]
    if not softmax:
        return False, "no softmax layer to balance"
    if config.data.reset_at_documents:
        return False, "packed documents"
    if length % (2 * parallel.context * (parallel.tensor if parallel.sequence else 1)):
        return False, f"{2 * parallel.context} slots do not divide the sequence"
    if not linear:
        return True, "softmax layers only"
    factor = max(row.hand_off_factor for row in model.recurrences())
    banks = 1 + (model.sse.num_partitions if "sse" in kinds else 0)
    break_even = factor * linear * model.sse.value_head_dim * banks // softmax
    tokens = length // parallel.context
    return tokens > break_even, f"{tokens:,} tokens a rank, break-even at {break_even:,}"
