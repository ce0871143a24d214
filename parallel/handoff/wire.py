"""Transitions and states on their way between ranks: one buffer and one collective at a time."""

from math import prod

import torch
import torch.distributed as dist
from torch import Size, Tensor
from torch.distributed import ProcessGroup


def send_to_owners(
    transition: Tensor | None, state: Tensor, group: ProcessGroup, wire: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """One all-to-all: rank p gets the p-th part of the rows of every rank's slots.

    transition (None: is not sent) and state [F, R, ...] come out as [P, F, R / P rounded up, ...]; missing rows are 0.
    """
    parts = group.size()
    state = _split_rows(state, parts)
    transition = None if transition is None else _split_rows(transition, parts)
    sent = _pack(transition, state, 2, wire)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    del sent  # before more of its size is made
    return _unpack(received, None if transition is None else transition.shape[2:], state.shape[2:], state.dtype)


def return_to_ranks(state: Tensor, shape: Size, group: ProcessGroup, wire: torch.dtype) -> Tensor:
    """The way back: [P, F, R / P rounded up, ...] of this rank's rows become `shape`, [F, R, ...] of its slots."""
    sent = state.to(wire)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    rows = received.transpose(0, 1).flatten(1, 2)[:, : shape[1]]
    return rows.to(state.dtype).contiguous()


def gather(
    transition: Tensor | None, state: Tensor, group: ProcessGroup, wire: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """One all-gather: transition (None: is not sent) and state [N, ...] of every rank, [P, N, ...]."""
    sent = _pack(transition, state, 1, wire)
    received = sent.new_empty(group.size(), *sent.shape)
    dist.all_gather_into_tensor(received.flatten(0, 1), sent, group=group)
    return _unpack(received, None if transition is None else transition.shape[1:], state.shape[1:], state.dtype)


def _split_rows(x: Tensor, parts: int) -> Tensor:
    """[F, R, ...] to [parts, F, R / parts rounded up, ...], a view where parts divides R."""
    num_rows = -(-x.shape[1] // parts)
    missing = parts * num_rows - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (parts, num_rows)).transpose(0, 1)


def _pack(transition: Tensor | None, state: Tensor, dim: int, wire: torch.dtype) -> Tensor:
    """Both side by side, dimensions from `dim` on flattened."""
    state = state.to(wire).flatten(dim)
    if transition is None:
        return state.contiguous()
    # Transitions keep all their bits: their errors would multiply along the chain, and they are few.
    return torch.cat([transition.flatten(dim).contiguous().view(wire), state], dim=-1)


def _unpack(
    buffer: Tensor, transition_shape: Size | None, state_shape: Size, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    if transition_shape is None:
        return None, buffer.to(dtype).unflatten(-1, state_shape)
    bits, state = buffer.tensor_split([buffer.shape[-1] - prod(state_shape)], dim=-1)
    # A copy, so that transitions which are kept for backward do not keep the states.
    transition = bits.clone(memory_format=torch.contiguous_format).view(dtype)
    return transition.unflatten(-1, transition_shape), state.to(dtype).unflatten(-1, state_shape)
