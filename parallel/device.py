"""Which device and backend a run uses: NVIDIA GPUs with NCCL where there are any, else the CPU with gloo.

Megatron-Core assumes CUDA. Without a GPU this file puts CPU stand-ins where Megatron-Core looks for CUDA, so that
Megatron-Core and everything above it runs unmodified; nothing else in the project asks which device it runs on.
"""

import contextlib
import logging
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from megatron_sse.parallel.gloo import share_gloo_devices

logger = logging.getLogger(__name__)

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
# Names of the allocator's settings, today's and that of torch before 2.9.
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
BLACKWELL = 10  # the first number of its compute capability


@dataclass(frozen=True)
class Device:
    """Where this process computes: torch's device type, torch.distributed's backend, and a description for logs."""

    type: str
    backend: str
    description: str

    def peak_memory_bytes(self) -> int:
        """Return the peak memory so far: what was allocated on the GPU, or the resident memory of the process."""
        if self.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def capability(self) -> tuple[int, int]:
        """Return the compute capability of this process's GPU; (9, 0) is Hopper."""
        return torch.cuda.get_device_capability()

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        torch.cuda.synchronize()


def setup_device(local_rank: int, tensor: int = 1) -> Device:
    """Pick GPU number `local_rank` of this machine, or the CPU with Megatron-Core made to run on it.

    tensor: ranks that share each layer.
    """
    # The driver and the allocator read these once, when CUDA is first used.
    if needs_one_connection(tensor):
        os.environ.setdefault(CONNECTIONS, "1")
    if not ALLOCATOR.intersection(os.environ):
        # Lengths of documents vary, and so do sizes of tensors: fixed segments would fragment.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Device("cuda", "nccl", torch.cuda.get_device_name())
    install_cpu_stand_ins()
    share_gloo_devices()
    return Device("cpu", "gloo", f"CPU ({torch.get_num_threads()} threads a process)")


def needs_one_connection(tensor: int) -> bool:
    """Check whether CUDA_DEVICE_MAX_CONNECTIONS has to be 1 on this machine's GPUs.

    Megatron-Core overlaps the tensor group's communication with matrix products by the order of their launches, which
    GPUs before Blackwell keep only on one connection. Elsewhere one connection would only hold streams up.
    """
    if tensor == 1 or shutil.which("nvidia-smi") is None:
        return False
    # Not torch: it would start CUDA, which then reads the variable no more.
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = re.match(r"(\d+)\.", subprocess.run(command, capture_output=True, text=True).stdout)
    return found is None or int(found[1]) < BLACKWELL


def to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copy a host array to `device` without waiting for the copy to finish."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cpu":
        return tensor
    # Only a copy from pinned memory is asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True)


def install_cpu_stand_ins() -> None:
    """Make Megatron-Core run on the CPU in this process; a second call does nothing."""
    if _has_stand_ins():
        return
    for module, name, stand_in in (
        (torch.cuda, "current_device", _current_device),
        (torch.cuda, "current_stream", torch.cpu.current_stream),
        (torch.cuda, "synchronize", _do_nothing),
        (torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda, "set_rng_state", _set_rng_state),
        (megatron_random, "_get_cuda_rng_state", _get_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_rng_state),
        (megatron_random, "CudaRNGStatesTracker", CpuRNGStatesTracker),
        (torch.autograd, "_engine_run_backward", _engine_run_backward),
    ):
        setattr(module, name, stand_in)
    # There is no __exit__: the mode stays on for the life of the process.
    CudaOnCpu().__enter__()
    logger.info("no GPU found: running on the CPU with gloo; Megatron-Core's CUDA calls are redirected to the CPU")


def without_stand_ins() -> contextlib.AbstractContextManager[None]:
    """Return a context for code that names no device, in which calls do not go through CudaOnCpu.

    Without stand-ins, as on GPUs, it has no effect.
    """
    return torch._C.DisableTorchFunction() if _has_stand_ins() else contextlib.nullcontext()


def _has_stand_ins() -> bool:
    return any(isinstance(mode, CudaOnCpu) for mode in _get_current_function_mode_stack())


# Functions that can name a device other than by an argument called `device`.
_NAME_A_DEVICE = {torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to}


class CudaOnCpu(TorchFunctionMode):
    """A mode that makes CPU tensors where CUDA tensors are asked for.

    It also reports the type of a CPU tensor as that of a CUDA tensor ('torch.cuda.FloatTensor' for torch.FloatTensor),
    which Megatron-Core's optimizers check.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The fast path: thousands of calls a step come through here, and nearly all of them name no device.
        if not kwargs and func not in _NAME_A_DEVICE:
            return func(*args)
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron-Core's tracker of random states, without its check that the CPU's generator stays untouched.

    Here the CPU's generator is the device's own, so every fork changes it.
    """

    _current_state_name: str

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Run the block with the random state called `name`, then restore that of the surrounding code."""
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        if outer_name in self.states_:
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_.get(outer_name, outer_state))
            self._current_state_name = outer_name


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
    # torch turns a mode off while the mode handles a call such as backward(); recomputed layers inside need it on.
    with CudaOnCpu():
        return torch.autograd.graph._engine_run_backward(*args, **kwargs)


def _current_device() -> torch.device:
    return torch.device("cpu")


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)
