"""Sending transitions and states between ranks, packed into one buffer for one collective.

What sends is written as steps: a generator that yields each collective once it has started and goes on when it has
finished. The caller decides what to compute in between (`start`).
"""

from collections.abc import Callable, Generator
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Size, Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")
Steps = Generator[dist.Work, None, T]


def start(steps: Steps[T]) -> Callable[[], T]:
    """Run `steps` until their first collective has started; the function that is returned runs the rest.

    On a GPU nothing here waits on the host: the work that is queued in between runs while the collective does.
    """
    try:
        work = next(steps)
    except StopIteration as end:
        # One rank sends nothing.
        result: T = end.value
        return lambda: result

    def finish() -> T:
        under_way = work
        while True:
            under_way.wait()
            try:
                under_way = next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    return finish


def in_group(work: dist.Work | None) -> dist.Work:
    """Return the work of a rank of the group; torch returns None on others."""
    assert work is not None
    return work


def send_to_owners(
    transition: Tensor | None, state: Tensor, group: ProcessGroup, wire: torch.dtype
) -> Steps[tuple[Tensor | None, Tensor]]:
    """Send the p-th part of the rows of this rank's slots to rank p, with one all-to-all.

    transition (None: not sent) and state [F, U, ...] become [ranks, F, U / ranks rounded up, ...], this rank's part
    of the rows of every rank's slots. Rows that pad U to a multiple of the ranks are 0.
    """
    parts = group.size()
    state = _split_rows(state, parts)
    transition = None if transition is None else _split_rows(transition, parts)
    sent = _pack(transition, state, 2, wire)
    received = torch.empty_like(sent)
    yield dist.all_to_all_single(received, sent, group=group, async_op=True)
    del sent  # freed before _unpack allocates as much again
    return _unpack(received, None if transition is None else transition.shape[2:], state.shape[2:], state.dtype)


def return_to_ranks(state: Tensor, shape: Size, group: ProcessGroup, wire: torch.dtype) -> Steps[Tensor]:
    """Undo send_to_owners for a state, with one all-to-all.

    [ranks, F, U / ranks rounded up, ...] becomes `shape`, [F, U, ...]. What was this rank's part of the rows of every
    slot becomes all rows of this rank's slots, without the padding.
    """
    sent = state.to(wire)
    received = torch.empty_like(sent)
    yield dist.all_to_all_single(received, sent, group=group, async_op=True)
    # [ranks, F, rows] to [F, ranks x rows]: the parts of a slot's rows follow each other again.
    rows = received.transpose(0, 1).flatten(1, 2)[:, : shape[1]]
    return rows.to(state.dtype).contiguous()


def gather(
    transition: Tensor | None, state: Tensor, group: ProcessGroup, wire: torch.dtype
) -> Steps[tuple[Tensor | None, Tensor]]:
    """Return the transition (None: not sent) and state [...] of every rank, [ranks, ...], with one all-gather."""
    sent = _pack(transition, state, 1, wire)
    received = sent.new_empty(group.size(), *sent.shape)
    yield dist.all_gather_into_tensor(received.flatten(0, 1), sent, group=group, async_op=True)
    return _unpack(received, None if transition is None else transition.shape[1:], state.shape[1:], state.dtype)


def _split_rows(x: Tensor, parts: int) -> Tensor:
    """Return [F, U, ...] as [parts, F, U / parts rounded up, ...], a view where parts divides U.

    For example, 5 rows in 2 parts become rows 0 1 2 and rows 3 4 and one of zeros.
    """
    num_rows = -(-x.shape[1] // parts)
    missing = parts * num_rows - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (parts, num_rows)).transpose(0, 1)


def _pack(transition: Tensor | None, state: Tensor, dim: int, wire: torch.dtype) -> Tensor:
    """Return one buffer with the bits of the transition and then the state, dimensions from `dim` on flattened."""
    state = state.to(wire).flatten(dim)
    if transition is None:
        return state.contiguous()
    # Transitions are not rounded to `wire`: their errors would multiply along the chain, and they are few. They travel
    # as raw bits: where the wire is bf16, an fp32 transition takes two of its elements.
    return torch.cat([transition.flatten(dim).contiguous().view(wire), state], dim=-1)


def _unpack(
    buffer: Tensor, transition_shape: Size | None, state_shape: Size, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    if transition_shape is None:
        return None, buffer.to(dtype).unflatten(-1, state_shape)
    bits, state = buffer.tensor_split([buffer.shape[-1] - prod(state_shape)], dim=-1)
    # A copy, so that keeping the transitions for backward does not keep the states' memory alive.
    transition = bits.clone(memory_format=torch.contiguous_format).view(dtype)
    return transition.unflatten(-1, transition_shape), state.to(dtype).unflatten(-1, state_shape)
