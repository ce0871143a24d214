"""Planned weights equal those of the built model, for every shipped configuration and rank of several layouts."""

from pathlib import Path

import pytest
import torch

from megatron_sse.config import load_config
from megatron_sse.config.derive import count_parameters
from megatron_sse.model import build_model
from megatron_sse.parallel.device import Device
from megatron_sse.parallel.groups import destroy_groups, init_groups
from megatron_sse.planning.parameters import chunk_buffers, stage_chunks
from megatron_sse.planning.sizes import Sizes
from tests.workers import run_workers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))
# Parameters have sizes and dtypes only; nothing is allocated.
META = Device("meta", "gloo", "no memory")

Run = tuple[str, list[str]]
# Numbers of elements of a chunk's fp32 and bf16 parameters.
Elements = dict[int, int]

MIXED = ["model.layers=sse, gdn, gla, kda, softmax", "model.num_layers=10", "model.sse.short_convolution=4"]
MIXED += ["model.input_convolution=3", "model.sse.own_read_router=true"]
RUNS: list[tuple[int, Run]] = [
    *((1, (name, ["parallel.context=1"])) for name in SHIPPED),
    (2, ("sse_h_2b.yaml", ["parallel.tensor=2", "parallel.sequence=true", "model.vocab_size=151937"])),
    (2, ("sse_h_600m.yaml", ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.tie_embeddings=true"])),
    (2, ("reference.yaml", [*MIXED, "parallel.pipeline=2", "model.softmax.qk_norm=true", "model.tie_embeddings=true"])),
    (2, ("reference.yaml", ["parallel.tensor=2", "model.sse.recurrence=gdn", "model.softmax.num_kv_heads=1"])),
    (2, ("reference.yaml", [*MIXED, "parallel.tensor=2", "training.precision=fp32", "model.sse.num_value_heads=4"])),
]


def built_elements(runs: list[Run]) -> list[tuple[int, list[Elements]]]:
    """Return the pipeline stage and the chunks of this rank, for each run."""
    found = []
    for name, overrides in runs:
        config = load_config(CONFIGS / name, overrides)
        parallel = config.parallel
        groups = init_groups(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
        chunks = build_model(config, groups, META, draw=False)
        found.append((groups.pp.rank(), [elements_of(chunk) for chunk in chunks]))
        destroy_groups()
    return found


def elements_of(chunk: torch.nn.Module) -> Elements:
    elements: Elements = {}
    for parameter in chunk.parameters():
        width = parameter.dtype.itemsize
        elements[width] = elements.get(width, 0) + parameter.numel()
    return elements


@pytest.mark.parametrize("size", [1, 2])
def test_elements_are_those_of_the_built_model(size: int) -> None:
    runs = [run for world_size, run in RUNS if world_size == size]
    for found in run_workers(size, built_elements, runs):
        for (name, overrides), (stage, built) in zip(runs, found, strict=True):
            config = load_config(CONFIGS / name, overrides)
            sizes = Sizes(config, data_size=1)
            planned = [
                {buffer.width: buffer.size for buffer in chunk_buffers(sizes, chunk)}
                for chunk in stage_chunks(config, stage)
            ]
            assert planned == built, (name, overrides)
            if size == 1:
                assert sum(count_parameters(config.model).values()) == sum(built[0].values())
