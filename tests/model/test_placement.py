"""Every parameter and buffer is on the run's device, also where modules are born on the CPU.

torch's meta device stands for the GPU. Transformer Engine's modules, which take use_cpu_initialization for
device="cpu" whatever torch's default device is, are stood for by plain ones born on the CPU.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.config import RunConfig
from megatron_sse.model import build, initialize
from megatron_sse.model.backend import Backend, choose_backend
from megatron_sse.parallel.device import Device
from megatron_sse.pretrained.network import build_and_load
from tests.model.support import cpu, run_config

META = Device("meta", "gloo", "stand-in for a GPU")
MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "vocab_size": 64,
    "layers": ["sse", "gdn", "kda", "softmax"],
    "input_convolution": 3,
    "sse": {"num_heads": 2, "head_dim": 16, "num_partitions": 2, "short_convolution": 3},
    "softmax": {"num_heads": 2, "qk_norm": True, "qkv_bias": True},
}
CONSTANT_DECAY = MODEL | {"layers": "sse", "sse": MODEL["sse"] | {"decay": "constant", "recurrence": "gla"}}  # type: ignore[operator]


def born_on_the_cpu(plain: type) -> type:
    class OnCpu(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            with torch.device("cpu"):
                super().__init__(*args, **kwargs)
                self.register_buffer("scratch", torch.zeros(2), persistent=False)

    return OnCpu


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = choose_backend(cpu())
    modules = (plain.column_parallel_linear, plain.row_parallel_linear, plain.norm, plain.core_attention)
    backend = Backend(*map(born_on_the_cpu, modules), fuse_gradient_accumulation=False)
    monkeypatch.setattr(build, "choose_backend", lambda device: backend)


def train(config: RunConfig, groups: ProcessGroupCollection) -> torch.nn.Module:
    [chunk] = build.build_model(config, groups, META, draw=False)
    return chunk


def infer(config: RunConfig, groups: ProcessGroupCollection) -> torch.nn.Module:
    """What generate, evaluate, score and inspect-states call."""
    [source] = build.build_model(config, groups, cpu())
    model = SimpleNamespace(
        tensors=lambda: ((initialize.global_name(name, source), x.data) for name, x in source.named_parameters())
    )
    return build_and_load(model, config, groups, META)  # type: ignore[arg-type]


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("make", [train, infer])
@pytest.mark.parametrize("model", [MODEL, CONSTANT_DECAY], ids=["all kinds of layers", "constant decay"])
def test_parameters_and_buffers_are_on_the_device(
    make: Callable[..., torch.nn.Module], model: dict, groups: ProcessGroupCollection
) -> None:
    chunk = make(run_config(model), groups)
    elsewhere = [name for name, x in [*chunk.named_parameters(), *chunk.named_buffers()] if x.device.type != "meta"]
    assert len(list(chunk.parameters())) > 10 and not elsewhere


@pytest.mark.usefixtures("transformer_engine")
def test_weights_are_drawn_on_the_device(groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator of the CPU draws other numbers than one of the GPU."""
    devices = set()

    def draw(weight: Any, model: Any, seed: int, device: torch.device) -> torch.Tensor:
        devices.add(device.type)
        return torch.empty(weight.shape, device=device)

    monkeypatch.setattr(initialize, "draw_full", draw)
    build.build_model(run_config(MODEL), groups, META)
    assert devices == {"meta"}
