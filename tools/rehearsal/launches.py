"""A stand-in for Triton's driver: launches are recorded, and compiled where asked for, exactly as they are made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_sse.tools.rehearsal.cuda import GPU

# torch's allocations on a GPU start at multiples of this.
_ALIGNMENT = 512
# The operators whose code runs, with its launches, in place of their fake implementations.
NAMESPACE = "megatron_sse"


@dataclass(frozen=True, order=True)
class Launch:
    """A launch of a kernel. backward: whether it was made by autograd. shared: bytes of a block; 0 if not compiled."""

    kernel: str
    backward: bool
    warps: int = 0
    shared: int = 0


@dataclass
class Launches:
    """The launches made so far, with how often."""

    counts: Counter[Launch] = field(default_factory=Counter)

    def install(self, gpu: GPU, compile: bool) -> None:
        """Record the launches of this process from now on.

        compile: compile them for `gpu`; one that asks for more shared memory than it has is refused as there, with
        triton.runtime.errors.OutOfResources.
        """
        driver.set_active(_Driver(gpu))
        # Fake tensors have no address, but Triton specialises kernels on its alignment.
        FakeTensor.data_ptr = _address  # type: ignore[assignment]
        run = JITFunction.run

        def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            launch = Launch(kernel.__name__, backward=torch._C._current_graph_task_id() != -1)
            if compile:
                compiled: Any = run(kernel, *args, grid=grid, warmup=warmup, **options)
                launch = replace(launch, warps=compiled.metadata.num_warps, shared=compiled.metadata.shared)
            self.counts[launch] += 1

        JITFunction.run = record


def implementation_of(func: Any) -> Any:
    """Return the function that launches kernels, of an operator of this package; None for other operators."""
    return OPDEFS[func._schema.name]._init_fn if func.namespace == NAMESPACE else None


def _address(x: FakeTensor) -> int:
    return _ALIGNMENT + int(x.storage_offset()) * x.element_size()


class _Driver:
    """What Triton asks of a driver. It launches nothing."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        self.utils = _Utils(gpu)
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.architecture, 32)

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class _Utils:
    def __init__(self, gpu: GPU) -> None:
        self.properties = {
            "max_shared_mem": gpu.shared_memory,
            "multiprocessor_count": gpu.multiprocessors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        # Module, function, registers, spills, the most threads of a block.
        return 1, 1, 0, 0, 1024


class _Launcher:
    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass
