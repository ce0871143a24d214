"""The mode that sees every operation, notes those that make the host wait, and keeps apart fake and real tensors.

What is on the GPU is fake, what is on the host is real. A value that would come from the GPU is 0.5 for a float, 0 for
an integer and True for a bool; a tensor that would be copied from there holds zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_sse.tools.rehearsal.cuda import made_up
from megatron_sse.tools.rehearsal.findings import Findings, Kind
from megatron_sse.tools.rehearsal.launches import implementation_of

aten = torch.ops.aten
_UNKNOWN_SIZES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
_WITHOUT_KERNEL = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.lift_fresh")
_COPIES = {aten._to_copy.default, aten.copy_.default}


class Watch(TorchDispatchMode):
    """A mode in which tensors on CUDA are fake; `findings` receives what would make a GPU wait or fail."""

    def __init__(self, findings: Findings, on_operator: Callable[[str], None] = lambda name: None) -> None:
        super().__init__()
        self.findings, self.on_operator = findings, on_operator
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        # Pinned tensors by address. They are kept, so that no other tensor gets the same address.
        self._pinned: dict[int, Tensor] = {}
        self._handlers: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
            aten._local_scalar_dense.default: self._read,
            aten.is_nonzero.default: self._read,
            aten.equal.default: self._compare,
            aten.copy_.default: self._copy_into,
            aten.index.Tensor: self._index,
            aten.index_put.default: self._put,
            aten.index_put_.default: self._put,
            aten._index_put_impl_.default: self._put,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._copy(func, args, kwargs)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if FakeTensor in types and (launch := implementation_of(func)) is not None:
            with self:
                return launch(*args, **kwargs)
        if FakeTensor in types:
            self._count(func)
            handle = self._handlers.get(func, self._compute)
            return handle(func, args, kwargs)
        return self._on_host(func, args, kwargs)

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that has no tensor on the GPU: a real one, or one that makes the first."""
        if _is_cuda(kwargs.get("device")):
            self._count(func)
            with self.fake_mode:
                return func(*args, **kwargs)
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def _count(self, func: Any) -> None:
        # A view or an uninitialised tensor queues nothing on the GPU.
        if not func.is_view and not _name(func).startswith(_WITHOUT_KERNEL):
            self.on_operator(_name(func))

    def is_pinned(self, x: Tensor) -> bool:
        """Check whether a tensor on the host shares the memory of a pinned one."""
        return not isinstance(x, FakeTensor) and x.untyped_storage().data_ptr() in self._pinned

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned[x.untyped_storage().data_ptr()] = x
        return x

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(not isinstance(x, FakeTensor) and x.dim() > 0 for x in tensors):
            self.findings.note(Kind.MIXED_DEVICES, _name(func))
            args, kwargs = tree_map_only(Tensor, self._to_gpu, (args, kwargs))
        if func in _UNKNOWN_SIZES and kwargs.get("output_size") is None:
            self.findings.note(Kind.UNKNOWN_SIZE, _name(func))
            if func is aten.nonzero.default:
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
            if func is aten.masked_select.default:
                return args[0].new_empty(args[0].numel())
        return tree_map_only(FakeTensor, _real_if_on_host, func(*args, **kwargs))

    def _to_gpu(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if isinstance(x, FakeTensor) or x.dim() == 0 and dtype is None:
            return x
        with self.fake_mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="cuda")

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.findings.note(Kind.HOST_READ)
        return made_up(args[0].dtype)

    def _compare(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.findings.note(Kind.HOST_READ, "equal")
        return True

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, wanted = args[0], kwargs.get("device")
        from_gpu = isinstance(source, FakeTensor)
        to_gpu = from_gpu if wanted is None else _is_cuda(wanted)
        if from_gpu == to_gpu:
            if from_gpu:
                self._count(func)
            return func(*args, **kwargs)
        self._note_copy(source, to_gpu, bool(kwargs.get("non_blocking")))
        dtype = kwargs.get("dtype") or source.dtype
        if to_gpu:
            return self._to_gpu(source, dtype)
        copied = torch.zeros(source.shape, dtype=dtype, device="cpu")
        return self._pin(copied) if kwargs.get("pin_memory") else copied

    def _copy_into(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, source = args[:2]
        to_gpu = isinstance(target, FakeTensor)
        if to_gpu == isinstance(source, FakeTensor):
            return func(*args, **kwargs)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        self._note_copy(source, to_gpu, bool(non_blocking))
        return target

    def _note_copy(self, source: Tensor, to_gpu: bool, non_blocking: bool) -> None:
        if source.numel() == 0:
            return
        what = f"{str(source.dtype).removeprefix('torch.')} {list(source.shape)}"
        if to_gpu and not (non_blocking and self.is_pinned(source)):
            self.findings.note(Kind.PAGEABLE_COPY, what)
        if not to_gpu and not non_blocking:
            self.findings.note(Kind.BLOCKING_COPY, what)

    def _index(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._compute(func, (args[0], self._without_masks(args[1]), *args[2:]), kwargs)

    def _put(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = args[2]
        # torch fills under the mask where the value is a number: nothing to wait for.
        if value.numel() == 1 and not isinstance(value, FakeTensor):
            return self._compute(func, args, kwargs)
        return self._compute(func, (args[0], self._without_masks(args[1]), *args[2:]), kwargs)

    def _without_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Return the indices with every mask replaced by as many places as it has elements, noting the mask."""
        result: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                result.append(index)
                continue
            self.findings.note(Kind.BOOLEAN_INDEX)
            with self.fake_mode:
                places = torch.empty(index.numel(), dtype=torch.int64, device="cuda")
            result += [places] * index.dim()
        return result

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(not isinstance(x, FakeTensor) for x in tensors):
            self.findings.note(Kind.CPU_COLLECTIVE, _name(func))
        # The fake process group does not know these.
        if "coalesced" in _name(func):
            return FakeWork().boxed()
        return func(*args, **kwargs)


def _real_if_on_host(x: FakeTensor) -> Tensor:
    return x if x.fake_device.type == "cuda" else torch.zeros(x.shape, dtype=x.dtype, device="cpu")


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _name(func: Any) -> str:
    return str(func).rpartition(".")[0]
