"""Which modules a run is built from on a GPU, by what is installed and by the GPU, and what the log says of it."""

import logging
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sse.model import backend
from megatron_sse.model.attention import DocumentArguments, TorchAttention
from megatron_sse.model.backend import FusedGradients, Installed, choose_attention, choose_backend
from megatron_sse.parallel.device import Device
from tests.model.support import cpu, run_config

GPU = Device("cuda", "nccl", "some GPU")
HYBRID = {
    "num_layers": 2,
    "hidden_size": 32,
    "vocab_size": 64,
    "layers": ["sse", "softmax"],
    "sse": {"num_heads": 2, "head_dim": 16},
    "softmax": {"num_heads": 2},
}
ONE_DOCUMENT = {"data": {"reset_at_documents": False}}
BF16 = {"training": {"precision": "bf16"}}
CONTEXT = BF16 | {"parallel": {"context": 2}}
SHARED = {
    "data": {"train": []},
    "training": {"global_batch_size": None},
    "rl": {"prompts": "unused", "prompts_per_step": 1, "max_new_tokens": 8, "share_prefixes": True},
}


class Core(DocumentArguments):
    """Stands for Transformer Engine's attention."""


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger="megatron_sse")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("capability", "flash", "sections", "why"),
    [
        ((9, 0), False, {}, None),
        ((10, 0), False, {}, None),
        ((8, 0), False, ONE_DOCUMENT, None),
        ((8, 0), True, {}, None),
        ((8, 0), False, {}, "cuDNN has none for packed documents on sm_80, and flash-attn is not installed"),
        ((12, 0), False, {}, "cuDNN has none for packed documents on sm_120, and flash-attn is not installed"),
        ((9, 0), False, CONTEXT, None),
        ((9, 0), True, SHARED, "Transformer Engine has none for prompts that answers share, rl.share_prefixes"),
        (
            (8, 0),
            True,
            CONTEXT,
            "cuDNN has none for packed documents on sm_80, and flash-attn none for their padding on context ranks",
        ),
        ((8, 0), False, CONTEXT | ONE_DOCUMENT, None),
    ],
)
def test_attention(
    capability: tuple[int, int],
    flash: bool,
    sections: dict[str, Any],
    why: str | None,
    said: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "find_installed", lambda: Installed(True, False, flash))
    chosen = replace(choose_backend(cpu()), core_attention=Core)
    device = Mock(capability=lambda: capability)
    chosen = choose_attention(chosen, run_config(HYBRID, **sections), device)
    assert chosen.core_attention is (Core if why is None else TorchAttention)
    over = " over context ranks (p2p)" if "parallel" in sections else ""
    assert said()[-1] == (f"attention{over}: Transformer Engine" if why is None else f"attention: plain torch ({why})")


@pytest.mark.parametrize(
    ("installed", "modules", "gradients"),
    [
        ((True, True), "Transformer Engine", "fused (Transformer Engine; output layer: NVIDIA Apex)"),
        (
            (True, False),
            "Transformer Engine",
            "fused (Transformer Engine), of the output layer separate (NVIDIA Apex not installed)",
        ),
        ((False, True), "plain torch (Transformer Engine not installed)", "fused (NVIDIA Apex)"),
        (
            (False, False),
            "plain torch (Transformer Engine not installed)",
            "separate (neither Transformer Engine nor NVIDIA Apex installed)",
        ),
    ],
)
def test_what_is_used_is_said(
    installed: tuple[bool, bool], modules: str, gradients: str, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_installed", lambda: Installed(*installed, False))
    monkeypatch.setattr(backend.te, "TENorm", torch.nn.Identity, raising=False)
    chosen = choose_backend(GPU)
    assert said() == [f"SSE layers: Triton; linear layers, norms: {modules}; weight gradients: {gradients}"]
    # Megatron-Core's own layers refuse to be built without Apex.
    assert chosen.fuse_gradient_accumulation == installed[1]
    assert issubclass(chosen.column_parallel_linear, FusedGradients) == installed[0]
    assert issubclass(chosen.row_parallel_linear, FusedGradients) == installed[0]


def test_transformer_engines_layers_accumulate_gradients_without_apex() -> None:
    class Linear:
        def __init__(self, size: int, *, config: TransformerConfig):
            self.size, self.config = size, config

    class Fused(FusedGradients, Linear):
        pass

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    layer = Fused(8, config=config)
    assert (layer.size, layer.config.gradient_accumulation_fusion) == (8, True)
    assert not config.gradient_accumulation_fusion
