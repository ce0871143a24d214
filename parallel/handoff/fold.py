"""The recurrence itself, S -> transition S + increment, from slot to slot in a given order.

Rows: transition [..., U, 1] with increment [..., U, V] (a decay per row), or [..., U, K, K] with [..., U, K, V].
Tensors are indexed by the entries of the order: (rank, slot), or (node, run).

For three slots a, b, c with transitions A and increments u: zeros enter a, u_a enters b, A_b u_a + u_b enters c, and
A_c (A_b u_a + u_b) + u_c leaves c.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_sse.kernels.scan import apply_transition

Order = Sequence[tuple[int, int]]


def take_over(transition: Tensor, state: Tensor) -> Tensor:
    """Return what is left of the state that enters a slot; a transition of 0 drops it, also if it is not finite.

    A document that has inf or nan thus does not reach the documents after it: 0 * inf would be nan.
    """
    if transition.shape[-1] == 1:
        is_reset = transition == 0
    else:
        is_reset = ~transition.any(-1, keepdim=True).any(-2, keepdim=True)
    # In place, since a second tensor of the states' size would be the peak of the hand-off's memory.
    return apply_transition(transition, state).masked_fill_(is_reset, 0)


def fold(transition: Tensor, increment: Tensor, order: Order, entering: Tensor, first: Tensor | None = None) -> None:
    """Write to `entering` what enters each slot of `order`; `first`, or zeros, enters the first slot."""
    entering[order[0]] = 0 if first is None else first
    for here, there in pairwise(order):
        arrived = take_over(transition[here], entering[here])
        torch.add(arrived, increment[here], out=entering[there])


def leaving(transition: Tensor, increment: Tensor, order: Order) -> Tensor:
    """Return what leaves the last slot of `order` when zeros enter the first."""
    state = increment[order[0]]
    for here in order[1:]:
        state = take_over(transition[here], state) + increment[here]
    return state


def product(transition: Tensor, order: Order) -> Tensor:
    """Return the transition of all slots of `order` together: A_c A_b A_a for the slots a, b, c."""
    total = transition[order[0]]
    for here in order[1:]:
        total = take_over(transition[here], total)
    return total


def transposed(transition: Tensor) -> Tensor:
    """Return the transition of the backward pass: it takes the gradient of the leaving state to the entering one."""
    # A decay per row is a diagonal matrix, which is its own transpose.
    return transition if transition.shape[-1] == 1 else transition.mT
