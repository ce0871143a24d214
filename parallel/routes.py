"""Moving tokens from one distribution over the ranks of a group to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.parallel.device import to_device


@dataclass(frozen=True)
class Route:
    """One rank's part in a rearrangement of tokens. Padding is not sent: its rows are zeros afterwards.

    Attributes:
        num_rows, num_rows_after: rows (tokens and padding) of this rank before and after.
        send_rows: int64, the rows that leave, receiver by receiver; send_sizes says how many go to each.
        receive_rows: int64, the rows that arrive, sender by sender; receive_sizes says how many come from each.
    """

    num_rows: int
    num_rows_after: int
    send_rows: Tensor
    send_sizes: list[int]
    receive_rows: Tensor
    receive_sizes: list[int]

    @property
    def back(self) -> Route:
        """The route that undoes this one."""
        return Route(
            self.num_rows_after,
            self.num_rows,
            self.receive_rows,
            self.receive_sizes,
            self.send_rows,
            self.send_sizes,
        )


def make_route(
    before: list[np.ndarray], after: list[np.ndarray], rank: int, device: torch.device | str = "cpu"
) -> Route:
    """Return rank `rank`'s part in a rearrangement. It neither communicates nor waits for the device.

    For example, before = [[0, 1], [2, 3]] and after = [[0, 3], [1, 2]]: rank 0 sends its row 0 to itself and its row 1
    to rank 1, and receives its row 0 from itself and its row 1 from rank 1.

    Args:
        before, after: int64, per rank the number of the token in each row, -1 for padding. Each of the tokens 0, 1, ...
            is in one row before and in one row after.
    """
    before_rank_T, before_row_T = _places(before)
    after_rank_T, _ = _places(after)
    assert len(before_rank_T) == len(after_rank_T)
    own, wanted = (np.flatnonzero(rows[rank] >= 0) for rows in (before, after))
    # In the example, for rank 0: receivers 0 1; arriving 0 3, of which senders are 0 1.
    receivers = after_rank_T[before[rank][own]]
    arriving = after[rank][wanted]
    senders = before_rank_T[arriving]
    # Sender and receiver have to agree on the order of the tokens between them: that of their rows on the sender.
    send_rows = own[np.argsort(receivers, kind="stable")]
    receive_rows = wanted[np.lexsort((before_row_T[arriving], senders))]
    return Route(
        num_rows=len(before[rank]),
        num_rows_after=len(after[rank]),
        send_rows=to_device(send_rows, device),
        send_sizes=np.bincount(receivers, minlength=len(before)).tolist(),
        receive_rows=to_device(receive_rows, device),
        receive_sizes=np.bincount(senders, minlength=len(before)).tolist(),
    )


def _places(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank and the row of each token, both [T]; `parts` as in make_route."""
    token = np.concatenate(parts)
    rank = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    row = np.concatenate([np.arange(len(part)) for part in parts])
    real = token >= 0
    assert (np.bincount(token[real]) == 1).all()
    places = np.empty((2, np.count_nonzero(real)), dtype=np.int64)
    places[:, token[real]] = rank[real], row[real]
    return places[0], places[1]


class _Reroute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_Rc, route, group):
        ctx.route, ctx.group = route, group
        return _exchange(x_Rc, route, group)

    @staticmethod
    def backward(ctx, grad_Rc):
        # A rearrangement is a permutation, so its transpose is the way back.
        return _exchange(grad_Rc, ctx.route.back, ctx.group), None, None


def _exchange(x_Rc: Tensor, route: Route, group: dist.ProcessGroup) -> Tensor:
    assert len(x_Rc) == route.num_rows
    sent = x_Rc[route.send_rows]
    received = sent.new_empty(len(route.receive_rows), *x_Rc.shape[1:])
    dist.all_to_all_single(received, sent, route.receive_sizes, route.send_sizes, group=group)
    out = x_Rc.new_zeros(route.num_rows_after, *x_Rc.shape[1:])
    # Every row is written at most once; those that nobody writes are padding and stay 0.
    return out.index_copy_(0, route.receive_rows, received)


def reroute(x_Rc: Tensor, route: Route, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's rows after the rearrangement, [route.num_rows_after, c], given those before it.

    Forward and backward are one all-to-all each, over the ranks that `route` was made for. Each token is sent once.
    Padding is zero afterwards, in the rows and in the gradient.
    """
    return _Reroute.apply(x_Rc, route, group)
