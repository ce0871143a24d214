"""A stand-in for CUDA graphs on a CPU: it records operations, refuses those that capture forbids, and replays them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
FORBIDDEN = {
    aten._local_scalar_dense.default: "the host reads a value",
    aten.is_nonzero.default: "the host reads a value",
    aten.equal.default: "the host reads a value",
    aten.nonzero.default: "a result whose size depends on values",
    aten.masked_select.default: "a result whose size depends on values",
    aten.repeat_interleave.Tensor: "a result whose size depends on values",
    aten.lift_fresh.default: "a tensor made on the host",
    aten.bernoulli_.float: "random numbers",
    aten.native_dropout.default: "random numbers",
}


class ForbiddenInGraph(Exception):
    """Something that would end the capture of a CUDA graph, or would be recorded with the values of one call."""


class Recording(TorchDispatchMode):
    """Operations on fixed memory.

    A replay does them anew, each into the memory of its first result, so whatever Python computed meanwhile is fixed,
    as in a CUDA graph. Tensors of unknown origin are refused: they come from the host.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.known = {_storage(x) for x in known}
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FORBIDDEN:
            raise ForbiddenInGraph(FORBIDDEN[func])
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in (aten.index.Tensor, aten.index_put_.default) and any(
            x.dtype == torch.bool for x in args[1] if x is not None
        ):
            raise ForbiddenInGraph("a result whose size depends on values")
        for x in inputs:
            if x.numel() and _storage(x) not in self.known:
                raise ForbiddenInGraph("a tensor made on the host")
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and _storage(x) not in self.before:
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self.before[_storage(x)] = whole, whole.clone()
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.known.update(map(_storage, results))
        # Aliases, since Megatron-Core gives a tensor the memory of another (`x.data = y`), which no operation shows.
        self.operations.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs, results)))
        return out

    def restore(self) -> None:
        """Undo what was written in place: a capture executes nothing."""
        for whole, before in self.before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Do all operations anew."""
        for func, args, kwargs, results in self.operations:
            inputs = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            in_place = func._schema.is_mutable
            if not in_place and results and all(_storage(x) in inputs for x in results):
                continue  # a view
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for kept, x in zip(results, again, strict=True):
                if not in_place:
                    kept.copy_(x)


def record(function: Callable[[], Tensor], known: Iterable[Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """Do what inference.captured.Capture is to do, on a CPU."""
    with Recording(known) as recording:
        result = function()
    recording.restore()
    return result, recording.replay


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
