"""What the answers of a run take, while they are generated and where they share their prompt: as planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sse.costs.gpus import GPUS
from megatron_sse.data.problems import Problem
from megatron_sse.inference.sampling import KeyedSampler
from megatron_sse.model import build_model
from megatron_sse.model.attention import TorchAttention
from megatron_sse.parallel.groups import destroy_groups, init_groups
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.planning.documents import count_documents
from megatron_sse.planning.generation import generation_bytes
from megatron_sse.planning.memory import kept_of_step, rank_memory
from megatron_sse.planning.report import describe_layout
from megatron_sse.planning.search import work_out
from megatron_sse.planning.sizes import Sizes
from megatron_sse.rl.advantages import Group, weigh
from megatron_sse.rl.objective import PolicyObjective
from megatron_sse.rl.packing import make_batches, pack
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.rollouts import Rollout, generate
from tests.kernels.test_segments import keep_unused_chunks
from tests.planning.live import LiveBytes
from tests.planning.test_memory import KeptTensors
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


SHARED = {"sequence_length": 512}
BANKS: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "layers": "sse"}
BANKS |= {"sse": MODEL["sse"] | {"head_dim": 16, "value_head_dim": 24, "num_partitions": 4}}
MODELS = (BANKS, BANKS | {"sse": BANKS["sse"] | {"recurrence": "gdn"}}, BANKS | {"layers": "softmax", "sse": {}})


def sharing_config(folder: Path, model: dict[str, Any], answers: int) -> Any:
    rl = {"group_size": answers, "max_new_tokens": 448 // answers - 1, "share_prefixes": True}
    return policy_config(folder, model=MODEL | model, data=SHARED, rl=rl)


def hold_shared(folder: Path, answers: int) -> list[tuple[float, float]]:
    """Return what a sequence of a prompt of 65 tokens and answers to it keeps and holds at most, over the plan, with
    the chunks that are not used, which a GPU has."""
    with pytest.MonkeyPatch.context() as patch:
        keep_unused_chunks(patch)
        return _hold_shared(folder, answers)


def _hold_shared(folder: Path, answers: int) -> list[tuple[float, float]]:
    found = []
    for model in MODELS:
        config = sharing_config(folder, model, answers)
        assert config.rl is not None
        groups, rollout = (
            init_groups(),
            Rollout([2] * config.rl.max_new_tokens, np.zeros(config.rl.max_new_tokens), True),
        )
        [net] = build_model(config, groups, cpu())
        prompt = Prompt(Problem("p", None, "1", "p"), [1] * 65, None)
        rows = pack(weigh([Group(prompt, [rollout] * answers, [1.0, 0.0] * (answers // 2))], config.rl), 512, True)
        [batch] = make_batches(rows, 512, 1, 0, 1, ContextShard(), "cpu", shares=True)
        batch.layout.layer_loss_scale = torch.ones(())
        objective = PolicyObjective(config.rl, groups.cp)
        kept = KeptTensors(net.parameters())
        # Gradients of the weights, which stay, are there before the step that is measured.
        with kept:
            output = objective.forward(net, batch, True)
        objective.loss(output, batch).loss.backward()
        del output
        with LiveBytes() as live:
            objective.loss(objective.forward(net, batch, True), batch).loss.backward()
        sizes = Sizes(config, 1, "torch", documents=answers)
        planned = replace(rank_memory(sizes, 0), generation=0)
        held = planned.weights + planned.gradients + planned.optimizer + planned.metrics
        found.append((kept.nbytes / sum(kept_of_step(sizes, 0)), live.peak / (planned.total - held)))
        destroy_groups()
    return found


def test_states_of_answers_that_share_a_prompt(tmp_path: Path) -> None:
    """What is kept is as planned; at most there is less than planned, since prompts and answers take turns."""
    for answers in (8, 32):
        [found] = run_workers(1, hold_shared, tmp_path, answers)
        assert [kept for kept, _ in found] == pytest.approx([1, 1, 1], abs=0.02), answers
        assert all(0.8 < most < 1.02 for _, most in found), found


def test_answers_of_a_sequence(tmp_path: Path) -> None:
    """Without a number there are as many as fit at their longest; without sharing a run of rl has one document."""
    config = sharing_config(tmp_path, BANKS, 8)
    assert config.rl is not None
    assert count_documents(config, None) == 512 // 55 and count_documents(config, 20) == 20
    plain = config.model_copy(update={"rl": config.rl.model_copy(update={"share_prefixes": False})})
    assert count_documents(plain, None) == 1 and Sizes(plain, 1, documents=20).spans == 1
    # 20 answers to 3 prompts.
    assert Sizes(config, 1, documents=20).spans == 23
