"""Which partitions a token writes to and reads from. Shared by all heads; fp32 (fp64 for fp64 input) throughout."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_sse.kernels.backend import use_triton
from megatron_sse.kernels.segments import Segments, Spans


@dataclass(frozen=True)
class Routes:
    """A token's picks: it writes to the first num_writers, and reads num_readers from number first_reader on.

    With one router that is 0, the picks are the best P = max(writers, readers), best first. With a router of its own
    for reads it is num_writers; a partition may then be among both.

    prob_TN: softmax over the N partitions (not renormalised over the picks), of writes where reads have their own.
    bank_TP: int64, the picked partitions, 0 .. N - 1; equal probabilities go to the lower index.
    weight_TP: the picks' probabilities, or these scaled.
    """

    prob_TN: Tensor
    bank_TP: Tensor
    weight_TP: Tensor
    num_writers: int
    num_readers: int
    first_reader: int = 0

    @property
    def written_TP(self) -> Tensor:
        """The partitions that are written to."""
        return self.bank_TP[:, : self.num_writers]

    @property
    def read_TP(self) -> Tensor:
        """The partitions that are read."""
        return self.bank_TP[:, self.first_reader : self.first_reader + self.num_readers]

    @property
    def num_partitions(self) -> int:
        return self.prob_TN.shape[-1]

    def scatter(self, x_TP: Tensor) -> Tensor:
        """Return values of the picks [T, P], summed by partition [T, N]."""
        return torch.zeros_like(self.prob_TN, dtype=x_TP.dtype).scatter_add(-1, self.bank_TP, x_TP)

    def write_weight_TP(self, weighted: bool) -> Tensor:
        """Return the scale of each pick's write: its probability or 1 (`weighted`), 0 where it is not written."""
        return self._weight(0, self.num_writers, weighted)

    def read_weight_TP(self, weighted: bool) -> Tensor:
        """Return the scale of each pick's output: its probability or 1 (`weighted`), 0 where it is not read."""
        return self._weight(self.first_reader, self.num_readers, weighted)

    def _weight(self, first: int, count: int, weighted: bool) -> Tensor:
        weight_TP = self.weight_TP[:, first : first + count]
        weight_TP = weight_TP if weighted else torch.ones_like(weight_TP)
        after = self.weight_TP.shape[-1] - first - count
        return pad(weight_TP, (first, after)) if first or after else weight_TP


def route(prob_TN: Tensor, num_writers: int, num_readers: int, bank_TP: Tensor | None = None) -> Routes:
    """Pick each token's top partitions (arXiv 2507.16577, section 3.2).

    Args:
        prob_TN: router probabilities, fp32 or fp64.
        num_writers, num_readers: partitions written and read per token, at most N.
        bank_TP: picks to use in place of the top ones (replayed routing).
    """
    if bank_TP is None and use_triton(prob_TN):
        from megatron_sse.kernels.triton.routing import top_banks

        return Routes(prob_TN, *top_banks(prob_TN, max(num_writers, num_readers)), num_writers, num_readers)
    if bank_TP is None:
        # A stable sort, not topk: topk leaves the order of equal values open.
        ranked_TN = prob_TN.detach().sort(dim=-1, descending=True, stable=True).indices
        bank_TP = ranked_TN[:, : max(num_writers, num_readers)]
    return Routes(prob_TN, bank_TP, prob_TN.gather(-1, bank_TP), num_writers, num_readers)


def join_routes(writes: Routes, reads: Routes) -> Routes:
    """Join the picks of two routers: writes from the first, reads from the second."""
    assert writes.num_writers == writes.bank_TP.shape[-1] and reads.num_readers == reads.bank_TP.shape[-1]
    bank_TP, weight_TP = (
        torch.cat(x, dim=-1) for x in ((writes.bank_TP, reads.bank_TP), (writes.weight_TP, reads.weight_TP))
    )
    return Routes(writes.prob_TN, bank_TP, weight_TP, writes.num_writers, reads.num_readers, writes.num_writers)


def join_segments(bank_TP: Tensor, spans: Spans, num_partitions: int) -> Segments:
    """Return the segments of all banks that the picks `bank_TP` go to (see Spans.segments_of_banks)."""
    order, offsets = sort_by_segment(bank_TP, spans.span_T, spans.num_spans, num_partitions)
    return spans.segments_of_banks(order, offsets, bank_TP.shape[1], num_partitions)


def sort_by_segment(bank_TP: Tensor, span_T: Tensor, num_spans: int, num_partitions: int) -> tuple[Tensor, Tensor]:
    """Order the picks (t * P + p) by (span, partition, position).

    Args:
        bank_TP: int64 picks.
        span_T: int64, each token's span.

    Returns:
        order [T * P], the pick at each sorted position, and offsets [spans * partitions + 1] of the segments.
    """
    if use_triton(bank_TP):
        from megatron_sse.kernels.triton.routing import sort_by_segment as sort

        return sort(bank_TP, span_T, num_spans, num_partitions)
    segment = (span_T[:, None] * num_partitions + bank_TP).flatten()
    sorted_segment, order = segment.sort(stable=True)
    # offsets[s] is the first sorted position whose segment is s or later, also where segment s has no pick.
    edges = torch.arange(num_spans * num_partitions + 1, device=segment.device)
    return order, torch.searchsorted(sorted_segment, edges)
