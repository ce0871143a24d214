"""Counting the bytes that this process sends, for tests and for tables of bytes where timings mean little."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """A context manager that counts the collectives and bytes of torch.distributed, also of a backward run inside it.

    Attributes:
        calls: number of calls, by the dispatcher's name of the collective ("alltoall_base_").
        sent: bytes that leave this rank, by the same names: what a rank keeps is not counted, and gathered data counts
            once for each other rank.

    A collective whose bytes it cannot count raises NotImplementedError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            self.calls[name] += 1
            self.sent[name] += _bytes_sent(name, args)
        return func(*args, **(kwargs or {}))


def _bytes_sent(name: str, args: Any) -> int:
    if name in ("recv_", "barrier"):
        return 0
    if name == "send":
        return sum(tensor.nbytes for tensor in args[0])
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        return abs(args[0].nbytes - args[1].nbytes)
    if name in ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_"):
        return sum(abs(output.nbytes - given.nbytes) for output, given in zip(args[0], args[1], strict=True))
    if name == "alltoall_base_":
        _, tensor, boxed, _, splits = args[:5]
        group = dist.ProcessGroup.unbox(boxed)
        kept = splits[group.rank()] if splits else len(tensor) // group.size()
        return int((len(tensor) - kept) * tensor[:1].nbytes)
    if name in ("allreduce_", "allreduce_coalesced_"):
        # As in a ring: each rank sends size - 1 parts (of 1 / size) to reduce them, and as many to gather them.
        size = dist.ProcessGroup.unbox(args[1]).size()
        return sum(tensor.nbytes * 2 * (size - 1) // size for tensor in args[0])
    raise NotImplementedError(f"no count of bytes for {name}")
