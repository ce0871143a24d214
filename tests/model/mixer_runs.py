"""Forward and backward passes of mixers on every rank of a world, compared with one rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import SSEConfig
from megatron_sse.model.initialize import own_part
from megatron_sse.parallel.device import without_stand_ins
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ContextShard
from tests.model.support import HIDDEN, layout_of, make_mixer, rms_error

QK_NORMS = ("q_layernorm", "k_layernorm")  # of softmax layers

Mutation = Callable[[pytest.MonkeyPatch], None]


class Result:
    """A tensor of one rank, and how the tensor group splits it (outputs and input gradients are complete)."""

    def __init__(self, value: Tensor, parameter: Any = None, tensor_rank: int = 0, tensor_size: int = 1):
        self.value = value
        self.tensor_rank, self.tensor_size = tensor_rank, tensor_size
        self.tensor_model_parallel = getattr(parameter, "tensor_model_parallel", False)
        self.partition_dim = getattr(parameter, "partition_dim", -1)
        self.partition_stride = getattr(parameter, "partition_stride", 1)

    def error(self, whole: "Result") -> float:
        """Return the RMS error against the same tensor of one rank."""
        return rms_error(self.value, own_part(whole.value, self, self.tensor_rank, self.tensor_size))


Results = dict[str, Result]


def run_mixers(
    cases: list[tuple[dict, list[list[int]]]],
    context: int = 1,
    sequence: bool = False,
    zigzag: bool = False,
    mutation: Mutation | None = None,
) -> list[Results]:
    """Return output, gradients and balance loss of each case (settings, document lengths per sequence) on this rank.

    Ranks beyond the context group form the tensor group. Settings are those of model.sse, and input_convolution.
    """
    groups = init_groups(tensor=dist.get_world_size() // context, context=context)
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            mutation(patch)
        return [_run(settings, lengths, groups, sequence, zigzag) for settings, lengths in cases]


def _run(case: dict, lengths: list[list[int]], groups: ProcessGroupCollection, sequence: bool, zigzag: bool) -> Results:
    case = dict(case)
    width = case.pop("input_convolution", 0)
    settings = SSEConfig(**case)
    mixer = make_mixer(groups, settings, sequence, zigzag, width)
    layout = layout_of(lengths, padding=3, shard=ContextShard(groups.cp.rank(), groups.cp.size(), zigzag))
    layout.layer_loss_scale = torch.tensor(2.0)
    results = forward_backward(mixer, layout, groups)
    if settings.num_partitions:
        results["balance loss"] = Result(mixer.metrics.means()["balance_loss"])
    return results


def forward_backward(mixer: Any, layout: TokenLayout, groups: ProcessGroupCollection) -> Results:
    """Return output and all gradients, summed over ranks as at the end of a step, for seeded inputs."""
    shard, length = layout.shard, layout.length * layout.shard.size
    dtype, device = next(mixer.parameters()).dtype, layout.column_L.device
    generator = torch.Generator("cpu").manual_seed(2)
    shape = (length, layout.batch_size, HIDDEN)
    hidden, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype) for _ in range(2)
    )
    hidden, grad = (x[shard.columns(length)] for x in (hidden, grad))
    sequence = mixer.config.sequence_parallel
    if sequence:
        hidden, grad = (x.chunk(groups.tp.size())[groups.tp.rank()].clone() for x in (hidden, grad))
    hidden.requires_grad_()
    # As in a step of training.
    with without_stand_ins():
        out, _ = mixer(hidden, None, layout)
    out.backward(grad)

    tp_rank, tp_size = groups.tp.rank(), groups.tp.size()
    results = {}
    for name, value in (("output", out.detach()), ("input", hidden.grad)):
        value = _gather(value, groups.tp) if sequence else value
        in_order = torch.empty(shape, dtype=torch.float64, device="cpu")
        in_order[shard.all_columns(length)] = _gather(value, groups.cp).double().cpu()
        results[name] = Result(in_order)
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        if sequence and getattr(parameter, "sequence_parallel", False) or name.startswith(QK_NORMS):
            # Megatron-Core sums these at the end of a step.
            dist.all_reduce(parameter.grad, group=groups.tp)
        dist.all_reduce(parameter.grad, group=groups.cp)
        results[name] = Result(parameter.grad.double().cpu(), parameter, tp_rank, tp_size)
    return results


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def worst_error(by_rank: list[Results], whole: Results) -> tuple[float, str]:
    """Return the largest RMS error over ranks and tensors, and the tensor's name."""
    worst = (0.0, "")
    for results in by_rank:
        assert results.keys() == whole.keys()
        worst = max(worst, *((result.error(whole[name]), name) for name, result in results.items()))
    return worst
