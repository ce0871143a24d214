"""What goes into the banks and comes out of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sse.kernels.gdn import l2_normalize
from megatron_sse.kernels.routing import Routes


@dataclass(frozen=True)
class BankInputs:
    """What one kind of bank (shared or sparse) sees of T tokens.

    q_THK, k_THK: queries and keys; H divides the values' heads.
    g: log decay, [T, H, K] for GLA, [T, H of the values] for the delta rule; finite, <= 0.
    beta_TH: write strength of the delta rule, None for GLA.
    """

    q_THK: Tensor
    k_THK: Tensor
    g: Tensor
    beta_TH: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that there are."""
        inputs = (self.q_THK, self.k_THK, self.g)
        return inputs if self.beta_TH is None else (*inputs, self.beta_TH)

    def expand_heads(self, num_heads: int) -> "BankInputs":
        """Repeat each key head for its group of value heads."""
        repeats = num_heads // self.q_THK.shape[1]
        if repeats == 1:
            return self
        q, k = (x.repeat_interleave(repeats, dim=1) for x in (self.q_THK, self.k_THK))
        g = self.g.repeat_interleave(repeats, dim=1) if self.beta_TH is None else self.g
        return BankInputs(q, k, g, self.beta_TH)

    def normalize(self) -> "BankInputs":
        """L2-normalised queries and keys, at least in fp32."""
        return replace(self, q_THK=l2_normalize(self.q_THK), k_THK=l2_normalize(self.k_THK))

    def cast(self, dtype: torch.dtype) -> "BankInputs":
        """Queries and keys in another dtype; gates stay."""
        return replace(self, q_THK=self.q_THK.to(dtype), k_THK=self.k_THK.to(dtype))

    def map(self, function) -> "BankInputs":
        return BankInputs(*(function(x) for x in self.tensors))


@dataclass(frozen=True)
class BankOutputs:
    """What was read from the banks, and their states at the documents' ends.

    shared_THV: from the shared bank.
    picked_TPHV: from each picked partition, weighted; in mask form from all N; None where there are no partitions.
    final_DBHKV: states [D, N + 1, H, K, V], fp32 (fp64 for fp64 inputs).
    """

    shared_THV: Tensor
    picked_TPHV: Tensor | None
    final_DBHKV: Tensor

    @property
    def o_THV(self) -> Tensor:
        """The sum over banks, in the values' dtype, added at least in fp32."""
        if self.picked_TPHV is None:
            return self.shared_THV
        dtype = torch.promote_types(self.shared_THV.dtype, torch.float32)
        return (self.shared_THV.to(dtype) + self.picked_TPHV.to(dtype).sum(1)).to(self.shared_THV.dtype)


@dataclass(frozen=True)
class Picks:
    """The partitions a token meets and how, each [T, P]: fp32, or fp64 for fp64 inputs.

    bank_TP: int64, the partitions, 0 .. num_partitions - 1.
    writes: 1 or 0, whether the token writes there (and the state decays).
    write_scale, read_scale: what scales the write, and what is read.
    before_norm: they scale k and q before the delta rule's normalisation, which cancels them (gate "reference").
    """

    bank_TP: Tensor
    num_partitions: int
    writes: Tensor
    write_scale: Tensor
    read_scale: Tensor
    before_norm: bool

    @staticmethod
    def of(routes: Routes, dtype: torch.dtype, weight_writes: bool, weight_reads: bool, before_norm: bool) -> "Picks":
        """The picks of `routes`; whether their probabilities scale writes and reads."""
        dtype = torch.promote_types(dtype, torch.float32)
        writes, write_scale, read_scale = (
            x.to(dtype)
            for x in (
                routes.write_weight_TP(False),
                routes.write_weight_TP(weight_writes),
                routes.read_weight_TP(weight_reads),
            )
        )
        return Picks(routes.bank_TP, routes.num_partitions, writes, write_scale, read_scale, before_norm)

    def spread(self) -> "Picks":
        """All partitions as picks, in order: zero what was not picked."""
        shape = (self.bank_TP.shape[0], self.num_partitions)
        every_TN = torch.arange(self.num_partitions, device=self.bank_TP.device).expand(shape)
        scales = (self.writes, self.write_scale, self.read_scale)
        writes, write_scale, read_scale = (x.new_zeros(shape).scatter_add(-1, self.bank_TP, x) for x in scales)
        return Picks(every_TN, self.num_partitions, writes, write_scale, read_scale, self.before_norm)

    def apply(self, bank: BankInputs, v_TPHV: Tensor) -> tuple[BankInputs, Tensor]:
        """Scale and mask inputs [T, P, H, ...] of the picks, before the recurrence."""
        writes, write_scale, read_scale = (x[..., None, None] for x in (self.writes, self.write_scale, self.read_scale))
        if bank.beta_TH is None:
            return replace(bank, g=bank.g * writes), v_TPHV * write_scale
        bank = replace(bank, g=bank.g * writes[..., 0], beta_TH=bank.beta_TH * writes[..., 0])
        if not self.before_norm:
            return bank, v_TPHV * write_scale
        q, k = bank.q_THK * read_scale, bank.k_THK * write_scale
        return replace(bank, q_THK=q, k_THK=k).normalize(), v_TPHV

    def weigh(self, o_TPHV: Tensor) -> Tensor:
        """Scale the picks' outputs, after the recurrence."""
        return o_TPHV if self.before_norm else o_TPHV * self.read_scale[..., None, None]


def by_segment(state_DBHKV: Tensor) -> Tensor:
    """States [S, H, K, V] in the order of join_segments: all documents' shared banks, then their partitions."""
    return torch.cat((state_DBHKV[:, 0], state_DBHKV[:, 1:].flatten(0, 1)))


def by_document(state_SHKV: Tensor, num_documents: int) -> Tensor:
    """The other way round."""
    shared, sparse = state_SHKV[:num_documents, None], state_SHKV[num_documents:]
    num_partitions = sparse.shape[0] // num_documents
    return torch.cat((shared, sparse.unflatten(0, (num_documents, num_partitions))), dim=1)
