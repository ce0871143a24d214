"""What follows from the settings of one kind of SSE layer: its recurrence, kinds of banks and sizes."""

from dataclasses import dataclass

from megatron_sse.config.schema import KeyMap, SSEConfig
from megatron_sse.recurrence import RECURRENCES, Recurrence


@dataclass(frozen=True)
class MixerSpec:
    """A mixer of the kind "sse", or of a recurrence's name: the same layer without partitions."""

    settings: SSEConfig
    kind: str

    @property
    def recurrence(self) -> Recurrence:
        return RECURRENCES[self.settings.recurrence if self.kind == "sse" else self.kind]

    @property
    def num_partitions(self) -> int:
        return self.settings.num_partitions if self.kind == "sse" else 0

    @property
    def has_shared(self) -> bool:
        """Whether the shared bank is written to."""
        return self.settings.shared_bank or not self.num_partitions

    @property
    def num_bank_kinds(self) -> int:
        """Kinds of banks, shared and sparse, that have queries, keys and decays of their own."""
        return self.has_shared + (self.num_partitions > 0)

    @property
    def key_map(self) -> KeyMap:
        return self.settings.key_map or self.recurrence.key_map

    @property
    def maps(self) -> tuple[str, ...]:
        """Projections beside the values': queries, and keys unless these are made of the decay."""
        return ("q",) if self.key_map == "one_minus_decay" else ("q", "k")

    @property
    def key_size(self) -> int:
        """Channels of the queries, or keys, of all heads."""
        return self.settings.num_heads * self.settings.head_dim

    @property
    def value_size(self) -> int:
        return self.settings.num_value_heads * self.settings.value_head_dim

    @property
    def group_size(self) -> int:
        """Value heads per key head."""
        return self.settings.num_value_heads // self.settings.num_heads

    @property
    def has_decay_gates(self) -> bool:
        """Whether each kind of bank has a low-rank projection to a decay per channel."""
        return self.recurrence.channel_decay and self.settings.decay == "gate"

    @property
    def decay_size(self) -> int:
        """Channels that a decay gate yields: of all key heads, for the delta rule of all value heads."""
        heads = self.settings.num_value_heads if self.recurrence.delta_rule else self.settings.num_heads
        return heads * self.settings.head_dim

    @property
    def head_rows(self) -> dict[str, int]:
        """Rows of the input projection that belong to one key head, in their order.

        q | k | the group's v | per value head the scalars, by scalar, then by kind of bank (shared, sparse).
        """
        scalars = len(self.recurrence.scalars) * self.num_bank_kinds
        rows = {name: self.settings.head_dim for name in self.maps}
        return rows | {"v": self.group_size * self.settings.value_head_dim, "scalars": self.group_size * scalars}
