"""Small projections of the SSE mixer, and how what they yield reaches the heads of each tensor rank."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear

from megatron_sse.parallel.collectives import gather_tokens, sum_gradient


class ReplicatedLinear(torch.nn.Module):
    """x W^T with all of W on every tensor rank.

    Under sequence parallelism each rank applies it to its part of the sequence, and Megatron-Core sums the gradients.
    """

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=dtype or config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight)


class SplitLinear(torch.nn.Module):
    """x W^T (+ bias) with the rows of W split over the tensor group.

    Unlike Megatron-Core's layer it neither gathers x nor sums its gradient: see `enter_heads`.
    """

    def __init__(
        self, config: TransformerConfig, input_size: int, output_size: int, group: dist.ProcessGroup, bias: bool
    ):
        super().__init__()
        self.group = group
        rows = output_size // group.size()
        self.weight = torch.nn.Parameter(torch.empty(rows, input_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describe the parameters to Megatron-Core's checkpoints."""
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0),
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class LowRank(torch.nn.Module):
    """x A^T B^T (+ bias): A [rank, d] on every tensor rank, B [out, rank] split over them by rows.

    The product with A is `project_down`'s, which takes all pairs of a mixer together.
    """

    def __init__(
        self, config: TransformerConfig, rank: int, output_size: int, group: dist.ProcessGroup, bias: bool = False
    ):
        super().__init__()
        self.rank = rank
        self.down = ReplicatedLinear(config, config.hidden_size, rank)
        self.up = SplitLinear(config, rank, output_size, group, bias)

    def forward(self, low: Tensor) -> Tensor:
        """Project this pair's columns of what `project_down` returned [.., rank] to this rank's outputs."""
        return self.up(low)


def project_down(pairs: Iterable[LowRank], x: Tensor) -> Tensor:
    """Return x [.., d] times the first matrices of all pairs, side by side, as one product."""
    return linear(x, torch.cat([borrow_weight(pair.down) for pair in pairs]))


def borrow_weight(module: torch.nn.Module) -> Tensor:
    """Return a module's weight, for a product that the module does not compute itself.

    A module's call starts with hooks, in which Megatron-Core's DDP waits for weights that are still being gathered
    (parallel.overlap_parameters). They run here as well: without them the weight may be that of the step before. Those
    behind the call do not, so that a module whose weights are lent (pretrained.lending) cannot lend them here.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    assert isinstance(module.weight, Tensor)
    return module.weight


def enter_heads(parts: Sequence[Tensor], group: dist.ProcessGroup, sequence_parallel: bool) -> tuple[Tensor, ...]:
    """Return what all tensor ranks compute alike, as inputs of each rank's own heads: of all tokens.

    Each rank knows its own heads' part of the gradients; they are summed over the group.

    parts: [L, ..] each, under sequence parallelism of this rank's part of L; one collective gathers all of them.
    """
    if not parts:
        return ()
    return gather_tokens(parts, group) if sequence_parallel else tuple(sum_gradient(x, group) for x in parts)
