"""The router: which partitions a token writes to and reads from, and the loss that keeps them in balance."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sse.config import SSEConfig
from megatron_sse.kernels import Routes, join_routes, route
from megatron_sse.model.features import softmax_fp32
from megatron_sse.model.projections import ReplicatedLinear
from megatron_sse.parallel.collectives import sum_value
from megatron_sse.parallel.layout import TokenLayout


class Router(torch.nn.Module):
    """Top partitions by softmax(x We) (arXiv 2507.16577, section 3.2), fp32, alike on all ranks of a tensor group."""

    def __init__(
        self, config: TransformerConfig, settings: SSEConfig, num_partitions: int, pg_collection: ProcessGroupCollection
    ):
        super().__init__()
        self.num_writers, self.num_readers = settings.num_writers, settings.num_readers
        self.num_routers, self.weight_scale = settings.num_routers, settings.weight_scale
        self.num_partitions, self.num_picks = num_partitions, settings.num_picks
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.sequence_parallel = config.sequence_parallel
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        # Rows of the router of writes, then of that of reads if it has its own.
        self.proj = ReplicatedLinear(config, config.hidden_size, self.num_routers * num_partitions, dtype)
        # Returns the picks [T, P] to use for a micro-batch, None for the top ones; set where layouts are compared, and
        # by rl.replay_routing.
        self.replay: Callable[[TokenLayout], Tensor | None] | None = None
        # Takes the picks [T, P] of a micro-batch, where they are to be replayed later.
        self.record: Callable[[Any, Tensor], None] | None = None

    def probabilities(self, hidden_LBd: Tensor) -> Tensor:
        """Return the probabilities [L, B, r, N] of hidden states [L, B, d]."""
        return softmax_fp32(self.proj(hidden_LBd).unflatten(-1, (self.num_routers, -1)))

    def forward(self, own_LBrN: Tensor, prob_LBrN: Tensor, layout: TokenLayout) -> tuple[Routes, Tensor | None]:
        """Return the picks of all B * L tokens, and the balance loss of the micro-batch (None where text is generated).

        own_LBrN: from `probabilities`, under sequence parallelism of this rank's part of L. prob_LBrN: of all tokens
        (see projections.enter_heads).
        """
        picks_TP = None if self.replay is None else self.replay(layout)
        routes = self._route(prob_LBrN.transpose(0, 1).flatten(0, 1).unbind(1), picks_TP)
        if self.record is not None:
            self.record(layout, routes.bank_TP)
        loss = self._balance_loss(own_LBrN[:, :, 0], routes, layout) if layout.has_layer_losses else None
        return routes, loss

    def _route(self, prob_rTN: Sequence[Tensor], picks_TP: Tensor | None) -> Routes:
        if self.num_routers == 1:
            routes = route(prob_rTN[0], self.num_writers, self.num_readers, picks_TP)
        else:
            counts = self.num_writers, self.num_readers
            picks = (None, None) if picks_TP is None else picks_TP.split(counts, 1)
            parts = zip(prob_rTN, counts, picks, strict=True)
            routes = join_routes(*(route(prob_TN, count, count, pick) for prob_TN, count, pick in parts))
        return replace(routes, weight_TP=self.weight_scale * routes.weight_TP)

    def _balance_loss(self, own_LBN: Tensor, routes: Routes, layout: TokenLayout) -> Tensor:
        """Return (N / num_writers) sum_i f_i p_i over real tokens.

        f is the share of tokens that write to i, p the mean probability. Both are means over all context ranks: the
        product of means is not the mean of products. Computed from the probabilities before they enter the heads'
        region, so that its gradient, complete on every tensor rank, is not summed there.
        """
        count_BL = layout.count_BL.to(own_LBN.dtype)
        writes_N = (routes.scatter(routes.write_weight_TP(False)) * count_BL.flatten()[:, None]).sum(0)

        count_LB = count_BL.t()
        if self.sequence_parallel:
            count_LB = count_LB.chunk(self.tp_group.size())[self.tp_group.rank()]
        prob_N = (own_LBN * count_LB[..., None]).sum((0, 1))
        if self.sequence_parallel:
            prob_N = sum_value(prob_N, self.tp_group)
        # Counts have no gradient. One sum for all three, since each all-reduce costs a start-up.
        sums = sum_value(torch.cat((writes_N.detach(), prob_N, count_BL.sum()[None])), self.cp_group)
        writes_N, prob_N, count = sums.split((len(writes_N), len(prob_N), 1))
        count = count.clamp(min=1)
        return own_LBN.shape[-1] / self.num_writers * (writes_N / count * (prob_N / count)).sum()


class AttachLoss(torch.autograd.Function):
    """Pass `x` through unchanged and give `loss` the gradient `scale`: a layer's own loss beside its output."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return grad, scale, None
