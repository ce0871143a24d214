"""What the answers of a run take while they are generated: as planned, and bounded by the setting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.costs.gpus import GPUS
from megatron_sse.data.problems import Problem
from megatron_sse.inference.sampling import KeyedSampler
from megatron_sse.model import build_model
from megatron_sse.model.attention import TorchAttention
from megatron_sse.parallel.groups import destroy_groups, init_groups
from megatron_sse.planning.generation import generation_bytes
from megatron_sse.planning.report import describe_layout
from megatron_sse.planning.search import work_out
from megatron_sse.planning.sizes import Sizes
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.rollouts import generate
from tests.planning.live import LiveBytes
from tests.rl.support import MODEL, policy_config
from tests.training.support import cpu
from tests.workers import run_workers

# One token more than the rows that keys and values have had before they grow for the last time.
LENGTH = 97
LARGE_VOCABULARY: dict[str, Any] = {"vocab_size": 20_000, "layers": "softmax", "num_layers": 1}
MANY_STATES: dict[str, Any] = {"layers": "sse", "num_layers": 6, "sse": MODEL["sse"] | {"num_partitions": 32}}
LONG: dict[str, Any] = {"layers": "softmax", "num_layers": 4}


def config_of(folder: Path, model: dict[str, Any], **rl: Any) -> Any:
    sections = {"data": {"sequence_length": LENGTH}, "model": MODEL | model}
    return policy_config(folder, **sections, rl={"answers_at_once": 8, "max_new_tokens": LENGTH - 6, **rl})


def peaks(folder: Path) -> list[tuple[int, int]]:
    """Return the most bytes while answers are generated, measured and planned, for each model."""
    found = []
    for model, longest in ((LARGE_VOCABULARY, 3), (MANY_STATES, 3), (LONG, LENGTH - 5)):
        config = config_of(folder, model, group_size=32, answers_at_once=64)
        [net] = build_model(config, init_groups(), cpu(), core_attention=TorchAttention)
        sampler = KeyedSampler(config.model.vocab_size)
        keys = [[prompt * 32 + sample for sample in range(32)] for prompt in range(3)]
        # Without an end, so that all answers are as long as they may be.
        prompts = [Prompt(Problem("p", None, "1", "p:1"), [number] * 6, None) for number in range(3)]
        with LiveBytes() as live:
            generate(net, prompts, keys, longest, sampler, config.rl.answers_at_once)
        found.append((live.peak, generation_bytes(Sizes(config, 1))))
        destroy_groups()
    return found


def test_as_planned(tmp_path: Path) -> None:
    [found] = run_workers(1, peaks, tmp_path)
    # Beside it there is what the layers take for the new tokens, which training takes as well.
    assert [measured / planned for measured, planned in found] == pytest.approx([1, 1, 1], abs=0.15), found


def test_what_bounds_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, MANY_STATES)
    [one, all_answers, of_a_rank, held_out] = [
        generation_bytes(Sizes(config_of(tmp_path, MANY_STATES, **rl), data_size))
        for rl, data_size in (
            ({"answers_at_once": 1}, 1),
            ({"answers_at_once": 256}, 1),
            ({"answers_at_once": 256}, 2),
            ({"answers_at_once": 256, "validation_prompts": "some"}, 1),
        )
    ]
    # 4 answers to each of 3 prompts, of which a rank of two has two at most.
    assert all_answers == 3 * one and of_a_rank == 2 * one and held_out == 64 * one
    assert generation_bytes(Sizes(config.model_copy(update={"rl": None}), 1)) == 0


def test_the_plan_shows_it(tmp_path: Path) -> None:
    gpu = replace(GPUS["h100"], memory=1e6)
    layout = work_out(config_of(tmp_path, MANY_STATES, answers_at_once=10_000, prompts_per_step=1_000), 1, gpu, 8)
    lines = describe_layout(layout, gpu, 0)
    assert any(line.split()[0] == "generation" for line in lines if line)
    assert any(line.endswith("smaller with a smaller rl.answers_at_once") for line in lines)
    assert layout.memory[0].total > layout.memory[0].generation > 0
