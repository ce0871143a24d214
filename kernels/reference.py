"""The oracle: token by token, one step of the definition after the other. Everything else is compared with it."""

import torch
from torch import Tensor

from megatron_sse.kernels.banks import BEFORE_NORM, BankInputs, l2_normalize
from megatron_sse.kernels.routing import Routes


def reference_sse(
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    routes: Routes | None,
    offsets_D1: Tensor,
    *,
    gate: str = "post_norm",
    weight_writes: bool = True,
    weight_reads: bool = True,
    initial_DAHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what sse_attention does, with the same arguments, token by token; it syncs with the host and is slow.

    Returns o_THV and the final states [D, A, H, K, V].
    """
    num_heads, value_dim = v_THV.shape[1:]
    num_partitions = 0 if routes is None else routes.num_partitions
    shape = (1 + num_partitions, num_heads, shared.q_THK.shape[-1], value_dim)
    # Unbound at once: the gradient of an index is as large as what it indexes.
    v, shared_T, sparse_T = v_THV.unbind(), _per_token(shared), [] if sparse is None else _per_token(sparse)
    outputs, finals = [], []
    for d, (start, end) in enumerate(zip(offsets_D1[:-1].tolist(), offsets_D1[1:].tolist(), strict=True)):
        states = list((v_THV.new_zeros(shape) if initial_DAHKV is None else initial_DAHKV[d]).unbind())
        for t in range(start, end):
            # Every token writes to the shared bank and reads it, with weight 1.
            states[0], o = _token(shared_T[t], states[0], v[t], gate="post_norm")
            for p in range(0 if routes is None else routes.bank_TP.shape[-1]):
                assert routes is not None
                bank = 1 + int(routes.bank_TP[t, p])
                write = routes.weight_TP[t, p] if weight_writes else 1.0
                read = routes.weight_TP[t, p] if weight_reads else 1.0
                writes, reads = p < routes.num_writers, 0 <= p - routes.first_reader < routes.num_readers
                states[bank], o_bank = _token(sparse_T[t], states[bank], v[t], gate, write, read, writes)
                o = o + o_bank if reads else o
            outputs.append(o)
        finals.append(torch.stack(states))
    return torch.stack(outputs), torch.stack(finals)


def _per_token(bank: BankInputs) -> list[BankInputs]:
    """Split into each token's inputs, without the dim T."""
    beta = [None] * len(bank.g) if bank.beta_TH is None else bank.beta_TH.unbind()
    return [BankInputs(*x) for x in zip(bank.q_THK.unbind(), bank.k_THK.unbind(), bank.g.unbind(), beta, strict=True)]


def _token(token: BankInputs, state_HKV, v_HV, gate, write=1.0, read=1.0, writes=True) -> tuple[Tensor, Tensor]:
    """Write one token to one bank, then read it."""
    groups = v_HV.shape[0] // token.q_THK.shape[0]
    q_HK, k_HK = (x.repeat_interleave(groups, dim=0) for x in (token.q_THK, token.k_THK))
    recurrence, decay = token.recurrence, token.g.exp()
    if recurrence.delta_rule:
        if BEFORE_NORM[gate]:
            q_HK, k_HK, read, write = q_HK * read, k_HK * write, 1.0, 1.0
        q_HK, k_HK = l2_normalize(q_HK), l2_normalize(k_HK)
    if writes:
        decay_HK = decay if recurrence.channel_decay else decay[:, None]
        if token.beta_TH is None:
            state_HKV = decay_HK.repeat_interleave(groups, dim=0)[..., None] * state_HKV
            change_HV = write * v_HV
        else:
            state_HKV = decay_HK[..., None] * state_HKV
            recalled_HV = torch.einsum("hk,hkv->hv", k_HK, state_HKV)
            change_HV = token.beta_TH[:, None] * (write * v_HV - recalled_HV)
        state_HKV = state_HKV + torch.einsum("hk,hv->hkv", k_HK, change_HV)
    return state_HKV, read * q_HK.shape[-1] ** -0.5 * torch.einsum("hk,hkv->hv", q_HK, state_HKV)
