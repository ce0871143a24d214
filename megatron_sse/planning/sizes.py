"""Sizes of one rank's share of a micro-batch, which memory and traffic are worked out from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_sse.config import RunConfig, choose_hand_off, choose_layout
from megatron_sse.config.mixer import MixerSpec
from megatron_sse.costs.gpus import GPUS_PER_NODE
from megatron_sse.parallel.sharding import Chain, ContextShard

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run as one rank sees them.

    data_size: ranks that work on different sequences. kernels: as in activations.py. documents: of a sequence, on
    average. gpus_per_node: GPUs of a machine.
    """

    config: RunConfig
    data_size: int
    kernels: str = "triton"
    documents: int = 1
    gpus_per_node: int = GPUS_PER_NODE

    @cached_property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.config.training.precision == "bf16" else FP32

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context rank."""
        return self.config.training.micro_batch_size * self.config.data.sequence_length // self.config.parallel.context

    @property
    def stream_tokens(self) -> int:
        """Tokens that the residual stream holds: a part of them under sequence parallelism."""
        parallel = self.config.parallel
        return self.tokens // (parallel.tensor if parallel.sequence else 1)

    @property
    def stream_bytes(self) -> int:
        """Bytes of the residual stream."""
        return self.stream_tokens * self.config.model.hidden_size * self.element

    @property
    def gradient_ranks(self) -> int:
        """Ranks that hold the same weights and add up their gradients."""
        # Context ranks see different tokens of the same sequences: for gradients they are data-parallel ranks.
        return self.data_size * self.config.parallel.context

    @property
    def num_micro_batches(self) -> int:
        """Per optimizer step and data-parallel rank; with rl as if each answer had a sequence of its own."""
        training = self.config.training
        return max(1, training.global_batch_size // (training.micro_batch_size * self.data_size))

    @cached_property
    def chain(self) -> Chain:
        """The context ranks' slots in the order of the sequence."""
        return ContextShard(0, self.config.parallel.context, choose_layout(self.config)[0]).chain

    @property
    def hand_off(self) -> tuple[str, int]:
        """The algorithm that hands off states, and the context ranks of a machine."""
        return choose_hand_off(self.config.parallel, self.gpus_per_node)

    @property
    def num_slots(self) -> int:
        return len(self.chain) // self.config.parallel.context

    @property
    def spans(self) -> int:
        """Runs of tokens that one state of each bank goes through: slots of sequences, or all tokens of one rank.

        Where answers share their prompts, each answer and each prompt is one.
        """
        if self.answers:
            return self.answers + self.shared_prompts
        return self.config.training.micro_batch_size * self.num_slots if self.config.parallel.context > 1 else 1

    @property
    def answers(self) -> int:
        """Answers of a micro-batch that start from the state behind a shared prompt (parallel/prefix.py)."""
        rl = self.config.rl
        return 0 if rl is None or not rl.share_prefixes else self.config.training.micro_batch_size * self.documents

    @property
    def shared_prompts(self) -> int:
        """Prompts of a micro-batch that answers share."""
        rl = self.config.rl
        assert rl is not None
        return self.config.training.micro_batch_size * -(-self.documents // rl.group_size)

    @property
    def document(self) -> int:
        """Tokens of a document, which is all that softmax layers attend to; where answers share prompts, they mask the
        other tokens of the sequence."""
        if self.answers:
            return self.config.data.sequence_length
        return max(1, self.config.data.sequence_length // self.documents)

    @property
    def fragments(self) -> int:
        """Parts of documents that lie in one slot, in a rank's part of a micro-batch."""
        slots = len(self.chain)
        # Documents spread evenly over the slots, each of which begins a fragment.
        per_slot = 1 + (self.documents - 1) // slots
        return self.config.training.micro_batch_size * self.num_slots * per_slot

    def of_mixer(self, kind: str) -> Mixer:
        """Return the sizes of an SSE layer on one tensor rank."""
        return Mixer(MixerSpec(self.config.model.sse, kind), self.config.parallel.tensor)


@dataclass(frozen=True)
class Mixer:
    """One of `tensor` ranks' part of a mixer."""

    spec: MixerSpec
    tensor: int

    @property
    def partitions(self) -> int:
        return self.spec.num_partitions

    @property
    def maps(self) -> int:
        """Projections of the input to queries and keys."""
        return len(self.spec.maps)

    @property
    def heads(self) -> int:
        return self.spec.settings.num_heads // self.tensor

    @property
    def value_heads(self) -> int:
        return self.spec.settings.num_value_heads // self.tensor

    @property
    def key_dim(self) -> int:
        return self.spec.settings.head_dim

    @property
    def value_dim(self) -> int:
        return self.spec.settings.value_head_dim

    @property
    def banks(self) -> int:
        """Kinds of banks: shared, sparse."""
        return 2 if self.partitions else 1

    @property
    def gates(self) -> int:
        """Kinds of banks that have decays and write strengths of their own."""
        return self.spec.num_bank_kinds

    @property
    def keys(self) -> int:
        return self.heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def decays(self) -> int:
        """Log decays of one token in one kind of bank."""
        return self.spec.decay_size // self.tensor if self.spec.recurrence.channel_decay else self.value_heads

    @property
    def state(self) -> int:
        """Elements of the states of one bank."""
        return self.value_heads * self.key_dim * self.value_dim

    @property
    def transition(self) -> int:
        """Elements of what a span does to the states of one bank: a decay per channel, or a matrix."""
        return self.value_heads * self.key_dim * (self.key_dim if self.spec.recurrence.delta_rule else 1)
