"""Ways to find the state that enters each slot of a chain that runs over several ranks.

All have one signature. transition [F, R, ...] and state [F, R, ...] are those of this rank's slots, in rows (fold.py).
Forward: `kept` is None; returns what enters the slots, and transitions to keep for backward. Backward is the same
recurrence along the reversed chain: `state` is the gradient of what entered, `kept` those transitions, transposed;
transition is None, since transitions do not travel again.
"""

from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.kernels.scan import apply_transition
from megatron_sse.parallel.handoff.fold import Order, fold, leaving, product
from megatron_sse.parallel.handoff.settings import HandOff
from megatron_sse.parallel.handoff.wire import gather, return_to_ranks, send_to_owners
from megatron_sse.parallel.sharding import Chain

Kept = tuple[Tensor, ...]


def exscan(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> tuple[Tensor, Kept]:
    """Two all-to-alls: each rank folds one part of the rows over the whole chain. Bytes and memory free of P."""
    group, wire, order = _parts(hand_off, state, kept)
    received, increment = send_to_owners(transition, state, group, wire)
    kept = kept or _kept(received)
    entering = torch.empty_like(increment)
    fold(kept[0], increment, order, entering)
    del increment  # as large as all that this rank holds
    return return_to_ranks(entering, state.shape, group, wire), kept


def allgather(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> tuple[Tensor, Kept]:
    """One all-gather: each rank folds everything. Bytes and memory grow with P, but there is one step only."""
    group, wire, order = _parts(hand_off, state, kept)
    received, increment = gather(transition, state, group, wire)
    kept = kept or _kept(received)
    entering = torch.empty_like(increment)
    fold(kept[0], increment, order, entering)
    return entering[hand_off.rank].clone(), kept


def serial(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> tuple[Tensor, Kept]:
    """From slot to slot, one after the other; nothing but the state is sent, and nothing at all on one rank."""
    rank, wire = hand_off.rank, hand_off.wire or state.dtype
    order = hand_off.chain if kept is None else hand_off.chain[::-1]
    kept = kept or _kept(transition)
    entering = torch.empty_like(state)
    carried = torch.zeros_like(state[0])
    for place, (owner, slot) in enumerate(order):
        if owner != rank:
            continue
        before = order[max(place - 1, 0)][0]
        after = order[min(place + 1, len(order) - 1)][0]
        if before != rank:
            arriving = torch.empty_like(carried, dtype=wire)
            dist.recv(arriving, group=hand_off.group, group_src=before)
            carried = arriving.to(state.dtype)
        entering[slot] = carried
        carried = apply_transition(kept[0][slot], carried) + state[slot]
        if after != rank:
            dist.send(carried.to(wire), group=hand_off.group, group_dst=after)
    return entering, kept


def two_level(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Kept | None) -> tuple[Tensor, Kept]:
    """exscan inside the node, with an all-gather between nodes of what each run of the chain inside a node does."""
    node, cross = hand_off.node_group, hand_off.cross_group
    assert node is not None and cross is not None
    wire = hand_off.wire or state.dtype
    runs = node_runs(hand_off.chain, node.size())
    if kept is not None:
        runs = [(place, run[::-1]) for place, run in reversed(runs)]
    received, increment = send_to_owners(transition, state, node, wire)
    slots = received if kept is None else kept[0]
    assert slots is not None

    own_runs = [(place, run) for place, run in runs if place[0] == cross.rank()]
    num_runs = 1 + max(number for (_, number), _ in runs)
    added = increment.new_zeros(num_runs, *increment.shape[2:])
    for (_, number), run in own_runs:
        added[number] = leaving(slots, increment, run)
    done = None
    if kept is None:
        done = slots.new_zeros(num_runs, *slots.shape[2:])
        for (_, number), run in own_runs:
            done[number] = product(slots, run)

    done, added = gather(done, added, cross, wire)
    kept = kept or (slots, *_kept(done))
    entering_runs = torch.empty_like(added)
    fold(kept[1], added, [place for place, _ in runs], entering_runs)
    entering = torch.empty_like(increment)
    for place, run in own_runs:
        fold(slots, increment, run, entering, first=entering_runs[place])
    del increment
    return return_to_ranks(entering, state.shape, node, wire), kept


def node_runs(chain: Chain, node_size: int) -> list[tuple[tuple[int, int], Order]]:
    """The chain cut where it changes nodes: (node, number of the run there), [(place on the node, slot), ...]."""
    runs: list[tuple[tuple[int, int], Order]] = []
    for node, slots in groupby(chain, key=lambda entry: entry[0] // node_size):
        number = sum(place[0] == node for place, _ in runs)
        runs.append(((node, number), [(rank % node_size, slot) for rank, slot in slots]))
    return runs


def _parts(hand_off: HandOff, state: Tensor, kept: Kept | None) -> tuple[ProcessGroup, torch.dtype, Order]:
    assert hand_off.group is not None
    return hand_off.group, hand_off.wire or state.dtype, hand_off.chain if kept is None else hand_off.chain[::-1]


def _kept(transition: Tensor | None) -> Kept:
    assert transition is not None
    return (transition,)
