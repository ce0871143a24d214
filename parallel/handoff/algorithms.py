"""Algorithms that compute the state which enters each slot of a chain over several ranks.

All have the same signature, and are written as steps (wire.py). transition [F, U, ...] and state [F, U, ...] are those
of this rank's slots, in rows (fold.py). Forward: `kept` is None; the result is what enters the slots, and the
transitions to keep for backward. Backward is the same recurrence along the reversed chain: `state` is the gradient of
what entered, `kept` is those transitions, transposed, and `transition` is None, since transitions are not sent again.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.parallel.handoff.fold import Order, fold, leaving, product, take_over
from megatron_sse.parallel.handoff.settings import HandOff
from megatron_sse.parallel.handoff.wire import Steps, gather, in_group, return_to_ranks, send_to_owners
from megatron_sse.parallel.sharding import node_runs

Kept = tuple[Tensor, ...]
Scan = Steps[tuple[Tensor, Kept]]


def exscan(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> Scan:
    """Compute it with two all-to-alls: each rank folds its share of the rows over the full chain.

    Rows are independent, so with 4 rows on 2 ranks, rank 0 gets rows 0 and 1 of every slot, folds them along the chain,
    and returns to each rank what enters its slots. Bytes and memory per rank do not grow with the number of ranks.
    """
    group, wire, order = _parts(hand_off, state, kept)
    received, increment = yield from send_to_owners(transition, state, group, wire)
    kept = kept or _kept(received)
    entering = torch.empty_like(increment)
    fold(kept[0], increment, order, entering)
    del increment  # as large as `state`: freed before return_to_ranks allocates as much again
    return (yield from return_to_ranks(entering, state.shape, group, wire)), kept


def allgather(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> Scan:
    """Compute it with one all-gather: each rank folds all rows over the full chain.

    Bytes and memory grow with the number of ranks, but there is only one step of communication.
    """
    group, wire, order = _parts(hand_off, state, kept)
    received, increment = yield from gather(transition, state, group, wire)
    kept = kept or _kept(received)
    entering = torch.empty_like(increment)
    fold(kept[0], increment, order, entering)
    return entering[hand_off.rank].clone(), kept


def serial(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> Scan:
    """Compute it slot by slot along the chain: each rank sends its state to the rank of the next slot.

    Only states are sent, and none between slots of the same rank.
    """
    rank, wire = hand_off.rank, hand_off.wire or state.dtype
    order = hand_off.chain if kept is None else hand_off.chain[::-1]
    kept = kept or _kept(transition)
    entering = torch.empty_like(state)
    carried = torch.zeros_like(state[0])
    for place, (owner, slot) in enumerate(order):
        if owner != rank:
            continue
        # At the ends of the chain, the neighbour is this rank itself: nothing is received or sent.
        before = order[max(place - 1, 0)][0]
        after = order[min(place + 1, len(order) - 1)][0]
        if before != rank:
            arriving = torch.empty_like(carried, dtype=wire)
            yield in_group(dist.irecv(arriving, group=hand_off.group, group_src=before))
            carried = arriving.to(state.dtype)
        entering[slot] = carried
        # In backward the same line passes the gradient on: `kept` is transposed, and the order reversed.
        carried = take_over(kept[0][slot], carried) + state[slot]
        if after != rank:
            yield in_group(dist.isend(carried.to(wire), group=hand_off.group, group_dst=after))
    return entering, kept


def two_level(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> Scan:
    """Compute it with exscan inside each node, around an exscan between nodes.

    What crosses nodes is what each run (a stretch of the chain inside one node, see node_runs) does as a whole: its
    product of transitions and the state that leaves it when zeros enter. Each rank handles its share of the rows inside
    the node, and a share of that share between nodes, so that bytes per rank do not grow with the number of nodes.
    """
    node, cross = hand_off.node_group, hand_off.cross_group
    assert node is not None and cross is not None
    wire = hand_off.wire or state.dtype
    runs = node_runs(hand_off.chain, node.size())
    if kept is not None:
        runs = [(place, run[::-1]) for place, run in reversed(runs)]
    received, increment = yield from send_to_owners(transition, state, node, wire)
    slots = received if kept is None else kept[0]
    assert slots is not None

    # 1. Reduce each run of this node to one transition and one increment.
    own_runs = [(place, run) for place, run in runs if place[0] == cross.rank()]
    # Nodes may have different numbers of runs, but all send the same number: a missing run stays zero, unread.
    num_runs = 1 + max(number for (_, number), _ in runs)
    added = increment.new_zeros(num_runs, *increment.shape[2:])
    for (_, number), run in own_runs:
        added[number] = leaving(slots, increment, run)
    done = None
    if kept is None:
        done = slots.new_zeros(num_runs, *slots.shape[2:])
        for (_, number), run in own_runs:
            done[number] = product(slots, run)

    # 2. Fold the runs of all nodes, for a share of the rows: the result is what enters each run.
    received, total = yield from send_to_owners(done, added, cross, wire)
    kept = kept or (slots, *_kept(received))
    entering_share = torch.empty_like(total)
    fold(kept[1], total, [place for place, _ in runs], entering_share)
    entering_runs = yield from return_to_ranks(entering_share, added.shape, cross, wire)
    # 3. Fold the slots of each own run, from what enters it.
    entering = torch.empty_like(increment)
    for (_, number), run in own_runs:
        fold(slots, increment, run, entering, first=entering_runs[number])
    del increment
    return (yield from return_to_ranks(entering, state.shape, node, wire)), kept


def _parts(hand_off: HandOff, state: Tensor, kept: Kept | None) -> tuple[ProcessGroup, torch.dtype, Order]:
    assert hand_off.group is not None
    return hand_off.group, hand_off.wire or state.dtype, hand_off.chain if kept is None else hand_off.chain[::-1]


def _kept(transition: Tensor | None) -> Kept:
    assert transition is not None
    return (transition,)
