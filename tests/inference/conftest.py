"""Checkpoints of tiny models, and models loaded in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import destroy_groups, init_groups, init_process_group
from megatron_sse.pretrained.network import build_and_load, inference_config
from megatron_sse.pretrained.open import open_model
from tests.inference.support import SOFTMAX, make_checkpoint, model


@pytest.fixture(scope="session")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of SSE layers with a short convolution and byte tokens."""
    return make_checkpoint(tmp_path_factory.mktemp("pure") / "model", model(sse={"short_convolution": 4}))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of SSE and softmax layers, for sequences of 64 tokens."""
    return make_checkpoint(tmp_path_factory.mktemp("hybrid") / "model", model("sse, softmax", softmax=SOFTMAX), 64)


@pytest.fixture(scope="module")
def nets(pure: Path, hybrid: Path) -> Iterator[list[LanguageModel]]:
    """Yield both models, loaded."""
    device = setup_device(0)
    init_process_group(device)
    groups = init_groups()
    opened = [open_model("", folder) for folder in (pure, hybrid)]
    yield [build_and_load(each, inference_config(each, None), groups, device) for each in opened]
    destroy_groups()
    dist.destroy_process_group()
