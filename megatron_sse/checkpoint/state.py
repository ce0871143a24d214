"""The state in a checkpoint: weights, and the optimizer's state by the weights' names, for any optimizer and layout.

Every weight that is not fp32 has an fp32 copy (`optimizer.master.NAME`), and every weight the two moments of AdamW
(`optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`). The plain and the distributed optimizer write the same tensors.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.checkpoint.flat import split_into_boxes
from megatron_sse.checkpoint.names import OPTIMIZER

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = OPTIMIZER + "master."

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory


def model_state(chunks: list[DistributedDataParallel], groups: ProcessGroupCollection) -> dict[str, dict[str, Entry]]:
    """Return the weights of this rank by model chunk ("model0", ...) and local name."""
    metadata = {"dp_cp_group": groups.dp_cp}
    state = {}
    for stage, chunk in enumerate(chunks):
        entries = chunk.module.sharded_state_dict(metadata=metadata)
        # Transformer Engine's state for fp8 is no weight, and missing on machines without it.
        state[f"model{stage}"] = {name: entry for name, entry in entries.items() if not name.endswith("_extra_state")}
    return state


@dataclass(frozen=True)
class Held:
    """This rank's optimizer state of a parameter: its elements start to stop - 1, in tensors of one dimension.

    tensors: MOMENTS, and "master" (fp32 weights) unless the parameter itself is fp32. shared: whether other
    data-parallel ranks hold the same elements.
    """

    parameter: Tensor
    start: int
    stop: int
    tensors: dict[str, Tensor]
    shared: bool


def optimizer_state(
    model: dict[str, dict[str, Entry]], optimizer: MegatronOptimizer, names: Iterable[str] = ("master", *MOMENTS)
) -> dict[str, ShardedTensor]:
    """Return this rank's part of the optimizer's state, of the kinds `names`, described by the weights in `model`.

    The tensors are the optimizer's own: loading into them loads the optimizer.
    """
    entries = {id(entry.data): entry for entry in nested_values(model)}
    pieces: list[ShardedTensor] = []
    for held in held_by(optimizer):
        for name in names:
            if name in held.tensors:
                pieces += _describe(held, name, entries[id(held.parameter)])
    return {str(number): piece for number, piece in enumerate(pieces)}


def held_by(optimizer: MegatronOptimizer) -> Iterator[Held]:
    """Yield this rank's optimizer state of each parameter; moments that no step has made yet are made as zeros."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                kept = part.optimizer.state[parameter]
                for name in MOMENTS:
                    if name not in kept:
                        kept[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_group_index_map:
                tensors = part._get_main_param_and_optimizer_states(parameter)
                own = part._get_model_param_range_map(parameter)["param"]
                yield _held(parameter, own.start, own.end, tensors, shared=False)
        else:
            for parameter in part.get_parameters():
                tensors = {"param": parameter, **part.optimizer.state[parameter]}
                yield _held(parameter, 0, parameter.numel(), tensors, shared=True)


def _held(parameter: Tensor, start: int, stop: int, tensors: dict[str, Tensor], shared: bool) -> Held:
    flat = {name: tensors[name].detach().view(-1) for name in MOMENTS}
    if parameter.dtype != torch.float32:
        flat["master"] = tensors["param"].detach().view(-1)
    return Held(parameter, start, stop, flat, shared)


def _describe(held: Held, name: str, entry: Entry) -> Iterator[ShardedTensor]:
    """Yield one kind of tensor of a parameter, as boxes of the full weight."""
    # Gate and up projections are one parameter, one after the other, but two weights that are split over the tensor
    # group separately: `first` is where each begins in the flat parameter.
    wholes = [entry] if isinstance(entry, ShardedTensor) else list(nested_values({"parts": entry.build()}))
    assert sum(math.prod(whole.local_shape) for whole in wholes) == held.parameter.numel()
    flat, first = held.tensors[name], 0
    for whole in wholes:
        assert whole.prepend_axis_num == 0
        length = math.prod(whole.local_shape)
        begin, end = max(held.start, first), min(held.stop, first + length)
        for offset, shape in split_into_boxes(whole.local_shape, begin - first, end - first):
            size = math.prod(shape)
            yield replace(
                whole,
                key=f"{OPTIMIZER}{name}.{whole.key}",
                data=flat[begin - held.start : begin - held.start + size].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_offset=tuple(a + b for a, b in zip(whole.global_offset, offset, strict=True)),
                axis_fragmentations=None,
                replica_id=whole.replica_id if held.shared else (*whole.replica_id[:2], 0),
            )
            begin += size
        first += length


def find_not_finite(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> str | None:
    """Return a weight of this rank that is not finite, or whose optimizer state is not; None where all are finite."""
    names = {id(p): name for chunk in chunks for name, p in chunk.module.named_parameters()}
    tensors = [(name, p.detach()) for chunk in chunks for name, p in chunk.module.named_parameters()]
    for held in held_by(optimizer):
        tensors += [(f"{kind} of {names[id(held.parameter)]}", tensor) for kind, tensor in held.tensors.items()]
    tensors = [(name, tensor) for name, tensor in tensors if tensor.numel() and tensor.is_floating_point()]
    if not tensors:
        return None
    # Without a copy of any tensor, and with one wait for the device.
    bounds_T2 = torch.stack([torch.stack(torch.aminmax(tensor)).float() for _, tensor in tensors])
    finite_T = bounds_T2.isfinite().all(1).tolist()
    return next((name for (name, _), finite in zip(tensors, finite_T, strict=True) if not finite), None)


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Check whether the optimizer's state is split over the data-parallel group."""
    return any(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))


def get_num_steps(optimizer: MegatronOptimizer) -> int:
    """Return the number of steps that the optimizer has made, which does not count those that the run skipped."""
    return max((int(group.get("step", 0)) for group in _groups(optimizer)), default=0)


def set_num_steps(optimizer: MegatronOptimizer, num_steps: int) -> None:
    """Set the number of steps that the optimizer has made."""
    for group in _groups(optimizer):
        group["step"] = num_steps


def _groups(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    for part in _parts(optimizer):
        yield from part.optimizer.param_groups


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
