"""Stand-ins for torch.cuda, and the GPUs that they can pretend to be."""

import contextlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_sse.tools.rehearsal.findings import Kind


@dataclass(frozen=True)
class GPU:
    """A GPU as torch and Triton see it. architecture: the compute capability as a number; memory in bytes.

    shared_memory: what one block may have.
    """

    name: str
    architecture: int
    memory: int
    multiprocessors: int
    shared_memory: int

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability, major and minor."""
        return divmod(self.architecture, 10)


# By compute capability, as the GPUs themselves report it.
GPUS = {
    80: GPU("NVIDIA A100-SXM4-80GB", 80, 80 << 30, 108, 163 << 10),
    90: GPU("NVIDIA H200", 90, 141 << 30, 132, 227 << 10),
    100: GPU("NVIDIA B200", 100, 180 << 30, 148, 227 << 10),
}
Note = Callable[[Kind, str], None]


def install_cuda(gpu: GPU, num_gpus: int, note: Note) -> None:
    """Put the stand-ins into torch, for the life of the process; call it before Megatron-Core is imported.

    note: receives what waits for the GPU.
    """
    properties = types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.multiprocessors,
        shared_memory_per_block_optin=gpu.shared_memory,
    )
    state = torch.default_generator.get_state()
    stream_class, event_class = _streams(note)
    stream = stream_class()
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _nothing(),
        "_lazy_init": _nothing(),
        "device_count": lambda: num_gpus,
        "current_device": lambda: 0,
        "set_device": _nothing(),
        "device": lambda *args: contextlib.nullcontext(),
        "get_device_name": lambda *args: gpu.name,
        "get_device_capability": lambda *args: gpu.capability,
        "get_device_properties": lambda *args: properties,
        "synchronize": lambda *args: note(Kind.WAIT, "synchronize"),
        "empty_cache": _nothing(),
        "reset_peak_memory_stats": _nothing(),
        "manual_seed": _nothing(),
        "manual_seed_all": _nothing(),
        "get_rng_state": lambda *args: state,
        "set_rng_state": _nothing(),
        "default_generators": (torch.default_generator,),
        "is_current_stream_capturing": lambda: False,
        "Stream": stream_class,
        "Event": event_class,
        "stream": lambda *args: contextlib.nullcontext(),
        "set_stream": _nothing(),
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "nccl": types.SimpleNamespace(version=lambda: (2, 29, 7)),
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        stand_ins[name] = lambda *args: 0
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.tensor = _reading(torch.tensor)
    FakeTensor.tolist = _tolist(note)  # type: ignore[assignment]
    # Without this, torch.tensor() would copy to the device where no mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)


def made_up(dtype: torch.dtype) -> bool | int | float:
    """Return what stands for a value of the GPU: a finite float; 0 for counts, which a run reads as integers."""
    if dtype == torch.bool:
        return True
    return 0.5 if dtype.is_floating_point else 0


def install_generators() -> None:
    """Make torch.Generator("cuda") give a generator of the host; call it once everything is imported."""
    torch.Generator = lambda device="cpu": torch._C.Generator("cpu")  # type: ignore[misc,assignment]


def _streams(note: Note) -> tuple[type, type]:
    class Stream:
        cuda_stream = 0
        device = torch.device("cuda", 0)
        wait_stream = wait_event = _do_nothing

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def synchronize(self) -> None:
            note(Kind.WAIT, "stream")

        def record_event(self, event: Any = None) -> "Event":
            return event or Event()

        def query(self) -> bool:
            return True

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *args: Any) -> None:
            pass

    class Event:
        record = wait = _do_nothing

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def synchronize(self) -> None:
            note(Kind.WAIT, "event")

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: "Event") -> float:
            return 1.0

    return Stream, Event


def _reading(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch.tensor such that values of the GPU in its data are read where a watch sees it."""

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        return make(_read(data), *args, **kwargs)

    return tensor


def _read(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_read(item) for item in data]
    return data.item() if isinstance(data, FakeTensor) else data


def _tolist(note: Note) -> Callable[[FakeTensor], Any]:
    """Return FakeTensor.tolist such that one call is one read, as on a GPU."""

    def tolist(x: FakeTensor) -> Any:
        note(Kind.HOST_READ, "")
        return _filled(made_up(x.dtype), list(x.shape))

    return tolist


def _filled(value: Any, shape: list[int]) -> Any:
    return [_filled(value, shape[1:]) for _ in range(shape[0])] if shape else value


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _nothing() -> Callable[..., None]:
    """Return a function that does nothing, another one each time: torch.compile's tables want them to differ."""
    return lambda *args, **kwargs: None
