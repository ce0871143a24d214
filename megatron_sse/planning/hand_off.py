"""The time of a hand-off of states by algorithm: latencies and bytes over links, where nothing else is under way.

A collective costs a launch, a message for each other rank, the latency of the slower link and the bytes over the
busier one. The constants are round figures for NCCL; none is measured on this code yet (docs/gpu_pending.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sse.config import RunConfig, recomputed_parts
from megatron_sse.costs.gpus import Gpu
from megatron_sse.parallel.handoff_bytes import handoff_bytes
from megatron_sse.planning.parameters import stage_chunks
from megatron_sse.planning.sizes import FP32, Sizes

# Seconds: of starting a collective; of a message and until it arrives, inside a machine and between machines.
LAUNCH = 20e-6
LINK_MESSAGE, NETWORK_MESSAGE = 1.5e-6, 1e-6
LINK_LATENCY, NETWORK_LATENCY = 3e-6, 6e-6
# Share of a link's speed that large messages reach.
LINK_SHARE, NETWORK_SHARE = 0.8, 0.85


@dataclass(frozen=True)
class Links:
    """Context ranks in machines. ranks: of the group. per_node: ranks of it on each machine."""

    gpu: Gpu
    ranks: int
    per_node: int

    def all_to_all(self, sent: float, ranks: int, inside: int) -> float:
        """Return the seconds of an all-to-all of `ranks`, `inside` of them on a machine. sent: bytes to each."""
        near, far = min(ranks, inside) - 1, ranks - min(ranks, inside)
        if ranks == 1:
            return 0.0
        latency = NETWORK_LATENCY if far else LINK_LATENCY
        sending = max(near * sent / (LINK_SHARE * self.gpu.link), far * sent / (NETWORK_SHARE * self.gpu.network))
        return LAUNCH + near * LINK_MESSAGE + far * NETWORK_MESSAGE + latency + sending

    def exscan(self, transition: float, state: float) -> float:
        """Return the seconds of its two all-to-alls."""
        parts = self.ranks
        return sum(self.all_to_all(part / parts, parts, self.per_node) for part in (transition + state, state))

    def two_level(self, transition: float, state: float) -> float:
        """Return the seconds of exscan inside a machine and between machines; all of a machine's GPUs send at once."""
        node = self.per_node
        inside = sum(self.all_to_all(part / node, node, node) for part in (transition + state, state))
        machines = self.ranks // node
        return inside + sum(
            self.all_to_all(part / node / machines, machines, 1) for part in (transition + state, state)
        )

    def allgather(self, transition: float, state: float) -> float:
        """Return the seconds of a ring in which every rank passes on what all others have."""
        far = self.ranks > self.per_node
        speed = NETWORK_SHARE * self.gpu.network if far else LINK_SHARE * self.gpu.link
        latency = NETWORK_LATENCY if far else LINK_LATENCY
        return LAUNCH + (self.ranks - 1) * (latency + (transition + state) / speed)

    def p2p(self, transition: float, state: float) -> float:
        """Return the seconds of the chain, rank after rank; transitions stay where they are."""
        far = self.ranks // self.per_node - 1
        near = self.ranks - 1 - far
        return near * (LAUNCH + LINK_LATENCY + state / (LINK_SHARE * self.gpu.link)) + far * (
            LAUNCH + NETWORK_LATENCY + state / (NETWORK_SHARE * self.gpu.network)
        )

    def seconds(self, algorithm: str, transition: float, state: float) -> float:
        """Return the seconds of one pass. transition, state: bytes that a rank's slots hold; transition 0 in backward
        passes, which do not send any."""
        return ALGORITHMS[algorithm](self, transition, state)


ALGORITHMS = {"exscan": Links.exscan, "allgather": Links.allgather, "p2p": Links.p2p, "two_level": Links.two_level}


def sent_bytes(sizes: Sizes, kind: str, rank: int = 0) -> tuple[int, int]:
    """Return the bytes that a context rank sends for one layer and micro-batch: (forward, backward)."""
    mixer, config = sizes.of_mixer(kind), sizes.config
    algorithm, ranks_per_node = sizes.hand_off
    return handoff_bytes(
        sizes.chain,
        rank,
        config.training.micro_batch_size * mixer.value_heads * (1 + mixer.partitions),
        mixer.key_dim,
        mixer.value_dim,
        mixer.spec.recurrence.delta_rule,
        algorithm,
        FP32,
        _wire_bytes(config),
        ranks_per_node,
    )


def layer_seconds(sizes: Sizes, kind: str, gpu: Gpu, algorithm: str) -> tuple[float, float]:
    """Return the seconds of a layer's hand-off for a micro-batch: (forward, backward)."""
    mixer, config = sizes.of_mixer(kind), sizes.config
    if config.parallel.context == 1:
        return 0.0, 0.0
    # What the slots of a rank hold.
    channels = config.training.micro_batch_size * mixer.value_heads * (1 + mixer.partitions) * mixer.key_dim
    channels *= sizes.num_slots
    state = channels * mixer.value_dim * (_wire_bytes(config) or FP32)
    transition = channels * (mixer.key_dim if mixer.spec.recurrence.delta_rule else 1) * FP32
    links = Links(gpu, config.parallel.context, sizes.hand_off[1])
    return links.seconds(algorithm, transition, state), links.seconds(algorithm, 0, state)


def step_hand_off(sizes: Sizes, stage: int, gpu: Gpu) -> tuple[int, float]:
    """Return the bytes that a rank of a pipeline stage sends for hand-offs in a step, and the seconds they take."""
    config, sent, seconds = sizes.config, 0, 0.0
    passes = 2 if config.training.recompute == "full" or "mixer" in recomputed_parts(config) else 1
    for kind in (kind for chunk in stage_chunks(config, stage) for kind in chunk.kinds if kind != "softmax"):
        forward, backward = sent_bytes(sizes, kind)
        sent += passes * forward + backward
        forward_time, backward_time = layer_seconds(sizes, kind, gpu, sizes.hand_off[0])
        seconds += passes * forward_time + backward_time
    return sizes.num_micro_batches * sent, sizes.num_micro_batches * seconds


def _wire_bytes(config: RunConfig) -> int | None:
    return {"fp32": None, "bf16": 2}[config.parallel.hand_off_wire]
