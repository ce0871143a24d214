"""Inputs and outputs of the banks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sse.kernels.routing import Routes
from megatron_sse.recurrence import Recurrence, find_recurrence

# By gate: whether the picks' weights scale keys and queries before the delta rule's normalisation.
BEFORE_NORM = {"post_norm": False, "reference": True}


def l2_normalize(x: Tensor) -> Tensor:
    """Return x / sqrt(sum x^2 + 1e-6) over the last dim, as in the authors' kernels; at least in fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class BankInputs:
    """Inputs of one kind of bank (shared or sparse) for T tokens.

    Which tensors there are, and their dims, say which recurrence the bank follows.

    Attributes:
        q_THK, k_THK: queries and keys; H divides the number of value heads.
        g: log decay, finite, <= 0. With a decay per channel [T, H, K], for the delta rule [T, value heads, K]; with a
            decay per head [T, value heads].
        beta_TH: write strength of the delta rule, [T, value heads]; None for other recurrences.
    """

    q_THK: Tensor
    k_THK: Tensor
    g: Tensor
    beta_TH: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are given."""
        inputs = (self.q_THK, self.k_THK, self.g)
        return inputs if self.beta_TH is None else (*inputs, self.beta_TH)

    @property
    def recurrence(self) -> Recurrence:
        """The recurrence that takes such inputs. Raises ValueError where there is none."""
        return find_recurrence(self.beta_TH is not None, self.g.dim() == self.q_THK.dim())

    def expand_heads(self, num_heads: int) -> "BankInputs":
        """Repeat each key head for its group of value heads."""
        # Value heads 0 .. n - 1 belong to key head 0, the next n to key head 1, as in the input projection.
        repeats = num_heads // self.q_THK.shape[1]
        if repeats == 1:
            return self
        q, k = (x.repeat_interleave(repeats, dim=1) for x in (self.q_THK, self.k_THK))
        # The delta rule has decays per value head already; GLA has those of a key head.
        g = self.g if self.recurrence.delta_rule else self.g.repeat_interleave(repeats, dim=1)
        return BankInputs(q, k, g, self.beta_TH)

    def normalize(self) -> "BankInputs":
        """Return the inputs with L2-normalised queries and keys, at least in fp32."""
        return replace(self, q_THK=l2_normalize(self.q_THK), k_THK=l2_normalize(self.k_THK))

    def cast(self, dtype: torch.dtype) -> "BankInputs":
        """Return the inputs with queries and keys in another dtype; gates keep theirs."""
        return replace(self, q_THK=self.q_THK.to(dtype), k_THK=self.k_THK.to(dtype))

    def map(self, function) -> "BankInputs":
        """Return the inputs with `function` applied to each tensor."""
        return BankInputs(*(function(x) for x in self.tensors))


@dataclass(frozen=True)
class BankOutputs:
    """Outputs read from the banks, and their states at the ends of the spans.

    shared_THV: from the shared bank; where picked_TPHV is None, the sum over all banks.
    picked_TPHV: from each picked partition, weighted; in mask form from all N. None where there are no partitions, and
        where a decode step has added them to shared_THV.
    final_YAHKV: states of each span's last document [Y, A, H, K, V], fp32 (fp64 for fp64 inputs); None after a decode
        step, which changes the states in place.
    """

    shared_THV: Tensor
    picked_TPHV: Tensor | None
    final_YAHKV: Tensor | None

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
        """Return the picks of `routes`.

        weight_writes, weight_reads: whether the picks' probabilities scale writes and reads.
        """
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
        """Return all partitions as picks, in order, with scales of zero where a token did not pick."""
        shape = (self.bank_TP.shape[0], self.num_partitions)
        every_TN = torch.arange(self.num_partitions, device=self.bank_TP.device).expand(shape)
        scales = (self.writes, self.write_scale, self.read_scale)
        writes, write_scale, read_scale = (x.new_zeros(shape).scatter_add(-1, self.bank_TP, x) for x in scales)
        return Picks(every_TN, self.num_partitions, writes, write_scale, read_scale, self.before_norm)

    def apply(self, bank: BankInputs, v_TPHV: Tensor) -> tuple[BankInputs, Tensor]:
        """Scale and mask inputs [T, P, H, ...] of the picks, before the recurrence."""
        # Where a token does not write, a log decay of 0 and a write strength or value of 0 leave the state as it is.
        beta = None if bank.beta_TH is None else _scale(bank.beta_TH, self.writes)
        # Selected, not multiplied: a log decay may be -inf.
        idle = (self.writes == 0).view(*self.writes.shape, *[1] * (bank.g.dim() - 2))
        bank = replace(bank, g=bank.g.masked_fill(idle, 0), beta_TH=beta)
        if not self.before_norm:
            return bank, _scale(v_TPHV, self.write_scale)
        q, k = _scale(bank.q_THK, self.read_scale), _scale(bank.k_THK, self.write_scale)
        return replace(bank, q_THK=q, k_THK=k).normalize(), v_TPHV

    def weigh(self, o_TPHV: Tensor) -> Tensor:
        """Scale the picks' outputs, after the recurrence."""
        return o_TPHV if self.before_norm else _scale(o_TPHV, self.read_scale)


def _scale(x: Tensor, scale_TP: Tensor) -> Tensor:
    """Multiply x [T, P, ...] by a number per token and pick."""
    return x * scale_TP.view(*scale_TP.shape, *[1] * (x.dim() - 2))


def by_segment(state_YAHKV: Tensor) -> Tensor:
    """Return states [S, H, K, V] in the order of join_segments: all spans' shared banks, then their partitions."""
    return torch.cat((state_YAHKV[:, 0], state_YAHKV[:, 1:].flatten(0, 1)))


def by_span(state_SHKV: Tensor, num_spans: int) -> Tensor:
    """Return states [Y, A, H, K, V] from those in the order of join_segments."""
    shared, sparse = state_SHKV[:num_spans, None], state_SHKV[num_spans:]
    num_partitions = sparse.shape[0] // num_spans
    return torch.cat((shared, sparse.unflatten(0, (num_spans, num_partitions))), dim=1)
