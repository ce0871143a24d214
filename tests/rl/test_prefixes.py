"""A prompt that is computed once for the answers to it: loss and gradients are those of plain packing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sse.data.problems import Problem
from megatron_sse.model import build, build_model
from megatron_sse.model.initialize import own_part
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.prefix import SharedPrefixLayout
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.rl.advantages import Group, weigh
from megatron_sse.rl.objective import PolicyObjective
from megatron_sse.rl.packing import make_batches, pack
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.rollouts import Rollout
from tests.rl.support import MODEL, policy_config
from tests.rl.test_layouts import FARTHEST, compare, fp64_settings, take_step
from tests.training.support import cpu
from tests.workers import run_workers

# Behind the longest prompt there is room for two of its four answers.
LENGTH = 64
# Of one token, shorter than convolutions and windows, and of more than a chunk.
PROMPTS = (1, 2, 3, 18, 48)
SHORT = {"short_convolution": 4}
MODELS: dict[str, dict[str, Any]] = {
    "gla": {"layers": "sse", "num_layers": 2, "input_convolution": 3, "sse": MODEL["sse"] | SHORT},
    "gla in mask form": {"layers": "sse", "num_layers": 2, "sse": MODEL["sse"] | {"form": "mask"}},
    "gdn": {"layers": "sse", "num_layers": 2, "sse": MODEL["sse"] | SHORT | {"recurrence": "gdn"}},
    "kda": {"layers": "sse", "num_layers": 2, "sse": MODEL["sse"] | SHORT | {"recurrence": "kda"}},
    "hybrid": {"layers": "gla, softmax, gdn, softmax", "num_layers": 4, "input_convolution": 2},
    "windows": {"layers": "softmax", "num_layers": 2, "softmax": MODEL["softmax"] | {"window": 6}},
}


def make_groups() -> list[Group]:
    """Return a group of four answers of 1 to 9 tokens for each length of a prompt."""
    draw = np.random.default_rng(0)
    groups = []
    for size in PROMPTS:
        prompt = Prompt(Problem("p", None, "1", "p"), draw.integers(0, 257, size).tolist(), None)
        lengths = draw.integers(1, 10, 4)
        rollouts = [
            Rollout(draw.integers(0, 257, length).tolist(), -draw.exponential(2.0, length), False) for length in lengths
        ]
        groups.append(Group(prompt, rollouts, [1.0, 0.0, 0.5, 0.0]))
    return groups


def fp64_gradients(folder: Path, model: dict[str, Any], shares: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one micro-batch, the balance loss included."""
    config = policy_config(folder, model=MODEL | model)
    groups, settings, dtype = init_groups(), build.transformer_settings, {"params_dtype": torch.float64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "transformer_settings", lambda *args: settings(*args) | dtype)
        [net] = build_model(config, groups, cpu())
    rl = fp64_settings("grpo")
    rows = pack(weigh(make_groups(), rl), LENGTH, shares)
    [batch] = make_batches(rows, LENGTH, len(rows), 0, 1, ContextShard(), "cpu", np.float64, shares=shares)
    assert isinstance(batch.layout, SharedPrefixLayout) == shares
    batch.layout.layer_loss_scale = torch.tensor(100.0)
    objective = PolicyObjective(rl, groups.cp)
    loss = objective.loss(objective.forward(net, batch, True), batch).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("model", MODELS)
def test_like_plain_packing_in_fp64(model: str, tmp_path: Path) -> None:
    [(expected, wholes)], [(loss, gradients)] = (
        run_workers(1, fp64_gradients, tmp_path, MODELS[model], shares) for shares in (False, True)
    )
    assert loss == pytest.approx(expected, rel=1e-10)
    for name, gradient in gradients.items():
        assert float((gradient - wholes[name]).norm()) < 1e-10 * float(wholes[name].norm()), name


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}], ids=str)
def test_a_step_like_plain_packing(parallel: dict[str, Any], tmp_path: Path) -> None:
    """The model's own answers, in fp32, with the picks of generation."""
    sections = {"model": MODEL | {"input_convolution": 3, "sse": MODEL["sse"] | SHORT}}
    [plain] = run_workers(1, take_step, tmp_path, sections)
    sections |= {"parallel": parallel, "rl": {"share_prefixes": True, "replay_routing": True}}
    size = parallel.get("tensor", 1)
    for step in run_workers(size, take_step, tmp_path, sections):
        assert step.tokens == plain.tokens and step.farthest < FARTHEST
        assert step.loss == pytest.approx(plain.loss, rel=1e-5, abs=1e-6)
        wholes = {name: plain.gradients[name].gradient for name in step.gradients}
        compare(
            {
                name: (part.gradient, own_part(wholes[name], part, step.tensor_rank, size))
                for name, part in step.gradients.items()
            }
        )


def test_as_many_answers_as_fit_share_a_prompt() -> None:
    answers = weigh(make_groups(), fp64_settings("grpo"))
    rows = pack(answers, LENGTH, shares=True)
    assert sorted(id(answer) for row in rows for answer in row) == sorted(map(id, answers))
    sizes = [[len(answer.prompt) for answer in row] for row in rows]
    assert sizes == [[48, 48], [48, 48], [2, 2, 2, 2, 18, 18, 18, 18], [1, 1, 1, 1, 3, 3, 3, 3]]
    [batch] = make_batches(rows, LENGTH, len(rows), 0, 1, ContextShard(), "cpu", shares=True)
    drawn = sum(len(answer.rollout.tokens) for answer in answers)
    assert batch.loss_tokens == drawn and batch.layout.real_BL is not None
    # Each prompt but its last token once, or twice, then this token with each answer; one token is not shared.
    assert int(batch.layout.real_BL.sum()) == drawn + 4 * len(PROMPTS) + 1 + 2 + 17 + 2 * 47
    assert int(batch.layout.count_BL.sum()) == drawn + 4 * sum(PROMPTS)
