"""Which partitions a token writes to and reads from. Shared by all heads; fp32 (fp64 for fp64 input) throughout."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """A token's picks, P = max(writers, readers), best first: it writes to the first num_writers, reads num_readers.

    prob_TN: softmax over the N partitions (not renormalised over the picks).
    bank_TP: int64, the picked partitions, 0 .. N - 1; equal probabilities go to the lower index.
    weight_TP: the picks' probabilities.
    """

    prob_TN: Tensor
    bank_TP: Tensor
    weight_TP: Tensor
    num_writers: int
    num_readers: int

    @property
    def num_partitions(self) -> int:
        return self.prob_TN.shape[-1]

    def scatter(self, x_TP: Tensor) -> Tensor:
        """Values of the picks [T, P] laid out over the partitions [T, N], zero elsewhere."""
        return torch.zeros_like(self.prob_TN, dtype=x_TP.dtype).scatter(-1, self.bank_TP, x_TP)

    def write_weight_TP(self, weighted: bool) -> Tensor:
        """What each pick's write is scaled by: its probability or 1 (`weighted`), 0 where the token does not write."""
        return self._weight(self.num_writers, weighted)

    def read_weight_TP(self, weighted: bool) -> Tensor:
        """What each pick's output is scaled by: its probability or 1 (`weighted`), 0 where the token does not read."""
        return self._weight(self.num_readers, weighted)

    def _weight(self, count: int, weighted: bool) -> Tensor:
        picked = torch.arange(self.weight_TP.shape[-1], device=self.weight_TP.device) < count
        return (self.weight_TP if weighted else torch.ones_like(self.weight_TP)) * picked


def route(prob_TN: Tensor, num_writers: int, num_readers: int, bank_TP: Tensor | None = None) -> Routes:
    """Pick each token's top partitions (arXiv 2507.16577, section 3.2).

    Args:
        prob_TN: router probabilities, fp32 or fp64.
        num_writers, num_readers: partitions written and read per token, at most N.
        bank_TP: picks to use in place of the top ones (replayed routing).
    """
    if bank_TP is None:
        # A stable sort, not topk: topk leaves the order of equal values open.
        ranked_TN = prob_TN.detach().sort(dim=-1, descending=True, stable=True).indices
        bank_TP = ranked_TN[:, : max(num_writers, num_readers)]
    return Routes(prob_TN, bank_TP, prob_TN.gather(-1, bank_TP), num_writers, num_readers)


def sort_by_segment(
    bank_TP: Tensor, document_T: Tensor, num_documents: int, num_partitions: int
) -> tuple[Tensor, Tensor]:
    """Order the picks (t * P + p) by (document, partition, position).

    Args:
        bank_TP: int64 picks.
        document_T: int64, each token's document.

    Returns:
        order [T * P], the pick at each sorted position, and offsets [documents * partitions + 1] of the segments.
    """
    segment = (document_T[:, None] * num_partitions + bank_TP).flatten()
    sorted_segment, order = segment.sort(stable=True)
    edges = torch.arange(num_documents * num_partitions + 1, device=segment.device)
    return order, torch.searchsorted(sorted_segment, edges)
