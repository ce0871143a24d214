"""Small models and inputs for the tests of megatron_sse/model."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sse.config import RunConfig, SSEConfig
from megatron_sse.config.mixer import MixerSpec
from megatron_sse.model.backend import choose_backend
from megatron_sse.model.initialize import own_part
from megatron_sse.model.mixer import SSEMixer
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.handoff import HandOff
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ContextShard

HIDDEN = 32


def cpu() -> Device:
    return setup_device(0)


def run_config(model: dict[str, Any], sequence_length: int = 64, **sections: dict[str, Any]) -> RunConfig:
    """Return a run of a model in fp32, with other settings by section."""
    defaults: dict[str, dict[str, Any]] = {
        "data": {"train": "unused", "sequence_length": sequence_length},
        "training": {"steps": 1, "global_batch_size": 1, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3},
        "monitor": {"folder": "unused"},
    }
    for name, section in sections.items():
        defaults[name] = defaults.get(name, {}) | section
    return RunConfig.model_validate({"model": model, **defaults})


def layout_of(
    lengths: Sequence[Sequence[int]], padding: int = 0, shard: ContextShard | None = None, device: str = "cpu"
) -> TokenLayout:
    """Return the layout of sequences, each given by document lengths; the last `padding` tokens of each are padding."""
    starts = np.zeros((len(lengths), sum(lengths[0])), dtype=bool)
    for row, documents in zip(starts, lengths, strict=True):
        row[np.cumsum([0, *documents[:-1]])] = True
    real = None
    if padding:
        real = np.ones_like(starts)
        real[:, -padding:] = False
    return TokenLayout.from_starts(starts, real, device, shard)


def make_mixer(
    groups: ProcessGroupCollection,
    settings: SSEConfig,
    sequence: bool = False,
    zigzag: bool = False,
    input_convolution: int = 0,
) -> SSEMixer:
    """Return a mixer in fp64 with weights from draw_weights."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=settings.num_heads,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        add_bias_linear=False,
        tensor_model_parallel_size=groups.tp.size(),
        sequence_parallel=sequence and groups.tp.size() > 1,
    )
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), zigzag)
    hand_off = HandOff(shard.chain, groups.cp)
    parts = (MixerSpec(settings, "sse"), choose_backend(cpu()), hand_off, input_convolution)
    mixer = SSEMixer(config, 1, groups, *parts)
    draw_weights(mixer, groups)
    return mixer


def draw_weights(module: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    """Draw complete weights from one seed, so that all tensor ranks hold parts of the same weights."""
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            shape = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                shape[parameter.partition_dim] *= groups.tp.size()
            whole = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * 0.3
            parameter.copy_(own_part(whole, parameter, groups.tp.rank(), groups.tp.size()))


class Tensors:
    """A source of tensors by name, as conversions read them."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def rms_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the root mean square of the difference over that of the reference."""
    return ((ours - reference).norm() / reference.norm().clamp(min=1e-30)).item()
