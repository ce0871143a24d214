"""One token for each sequence of a batch, from states that stay in a pool: generation."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_sse.kernels.banks import BEFORE_NORM, BankInputs
from megatron_sse.kernels.routing import Routes


def decode_step(
    states_XAHKV: Tensor,
    place_T: Tensor,
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    routes: Routes | None,
    *,
    gate: str = "post_norm",
    weight_writes: bool = True,
    weight_reads: bool = True,
) -> Tensor:
    """Write one token to the banks of its sequence, then read them; without gradients.

    Args:
        states_XAHKV: X places with the states of all A banks, bank 0 shared; fp32 (fp64), changed in place.
        place_T: int64, the place of each token's sequence, each at most once; below 0: the token is padding, no state
            changes and its output is zero.
        shared, sparse, v_THV, routes: T tokens, as for sse_attention; sparse and routes are None where N = 0.
        gate, weight_writes, weight_reads: as for sse_attention.

    Returns:
        o_THV in v's dtype.
    """
    before_norm = BEFORE_NORM[gate]
    if states_XAHKV.is_cuda and shared.recurrence.has_triton:
        switches = before_norm, weight_writes, weight_reads
        return decode_on_triton(states_XAHKV, place_T, shared, sparse, v_THV, routes, *switches)
    active_T = place_T >= 0
    # Indexing by `active_T` would wait for the device. Padding repeats the first active token instead, and writes the
    # same values to the same place; where there is no active token, what is written is what was there.
    source_T = torch.where(active_T, torch.arange(len(place_T), device=place_T.device), active_T.int().argmax())
    any_active, place_T = active_T.any(), place_T[source_T].clamp(min=0)
    v = v_THV[source_T].to(states_XAHKV.dtype)

    def active(bank: BankInputs) -> BankInputs:
        return bank.map(lambda x: x[source_T].to(v.dtype)).expand_heads(v.shape[1])

    def keep(bank: int | Tensor, before: Tensor, after: Tensor) -> None:
        states_XAHKV[place_T, bank] = torch.where(any_active, after, before)

    one = v.new_ones(len(v), 1, 1)
    before = states_XAHKV[place_T, 0]
    state, o = _write_and_read(active(shared), v, before, one, one, True, False)
    keep(0, before, state)
    if sparse is not None and routes is not None:
        sparse = active(sparse)
        for pick in range(routes.bank_TP.shape[1]):
            bank = 1 + routes.bank_TP[source_T, pick]
            weight = routes.weight_TP[source_T, pick].to(v.dtype)[:, None, None]
            write, read = weight if weight_writes else one, weight if weight_reads else one
            before, writes = states_XAHKV[place_T, bank], pick < routes.num_writers
            state, o_pick = _write_and_read(sparse, v, before, write, read, writes, before_norm)
            if writes:
                keep(bank, before, state)
            # With a router of its own for reads, the first picks are written to and not read.
            if 0 <= pick - routes.first_reader < routes.num_readers:
                o = o + o_pick
    return o.to(v_THV.dtype).masked_fill(~active_T[:, None, None], 0)


def decode_on_triton(
    states_XAHKV: Tensor,
    place_T: Tensor,
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    routes: Routes | None,
    before_norm: bool,
    weight_writes: bool,
    weight_reads: bool,
) -> Tensor:
    """Do what decode_step does with the Triton kernel; the states are fp32 and contiguous."""
    # Imported late: Triton is not installed on machines without a GPU.
    from megatron_sse.kernels.triton.decode import decode

    assert states_XAHKV.is_contiguous()
    banks = [[] if bank is None else [x.contiguous() for x in bank.tensors] for bank in (shared, sparse)]
    bank_TP, weight_TP, counts = None, None, (0, 0, 0)
    if routes is not None:
        bank_TP, weight_TP = routes.bank_TP.contiguous(), routes.weight_TP.contiguous()
        counts = routes.num_writers, routes.first_reader, routes.num_readers
    switches = before_norm, weight_writes, weight_reads
    return decode(
        states_XAHKV, place_T.contiguous(), *banks, v_THV.contiguous(), bank_TP, weight_TP, *counts, *switches
    )


def _write_and_read(
    token: BankInputs, v: Tensor, state: Tensor, write: Tensor, read: Tensor, writes: bool, before_norm: bool
) -> tuple[Tensor, Tensor]:
    """Update one bank of each sequence: return its state [T, H, K, V] after the token, and the output [T, H, V]."""
    recurrence = token.recurrence
    if recurrence.delta_rule:
        if before_norm:
            token = replace(token, q_THK=token.q_THK * read, k_THK=token.k_THK * write)
            read, write = torch.ones_like(read), torch.ones_like(write)
        token = token.normalize()
    q, k = token.q_THK, token.k_THK
    if writes:
        decay_THK = token.g.exp() if recurrence.channel_decay else token.g.exp()[..., None]
        # The state decays first, so that the delta rule compares the value with what is recalled after the decay.
        state = state * decay_THK[..., None]
        change = v * write
        if token.beta_TH is not None:
            change = (change - torch.einsum("thk,thkv->thv", k, state)) * token.beta_TH[..., None]
        state = state + k[..., None] * change[..., None, :]
    return state, torch.einsum("thk,thkv->thv", q * q.shape[-1] ** -0.5, state) * read
