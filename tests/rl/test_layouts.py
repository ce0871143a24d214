"""A step with answers that the model generates: the same at every layout, and that of the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sse.config import RLConfig, choose_layout
from megatron_sse.errors import SharedUserError
from megatron_sse.inference.sampling import KeyedSampler
from megatron_sse.model import build, build_model
from megatron_sse.model.initialize import global_name, own_part
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.rl.advantages import Answer, Group, weigh
from megatron_sse.rl.objective import PolicyObjective
from megatron_sse.rl.packing import make_batches, pack
from megatron_sse.rl.rollouts import Rollout, generate
from megatron_sse.rl.run import PolicyRun, RolledOut, open_problems
from tests.rl import oracle
from tests.rl.support import LENGTH, MODEL, make_groups, policy_config
from tests.training.support import cpu
from tests.training.test_layouts import Part
from tests.workers import run_workers

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"context": 2}),
    (2, {"context": 2, "layout": "zigzag"}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {}),
]
# In 4 processes, which other tests of these folders do not have.
MIXED: list[tuple[int, dict[str, Any]]] = [
    (4, {"context": 2, "tensor": 2, "sequence": True}),
    (4, {"context": 2, "tensor": 2, "sequence": False, "layout": "zigzag"}),
]
# Of log-probabilities in generation from those in training, see Step. Measured are up to 6.7e-7.
FARTHEST = 3e-6
# The generator's states and the training forward.
DECODED: dict[str, dict[str, Any]] = {
    "sse gla": {"layers": "sse", "num_layers": 2},
    "sse gdn, convolutions": {
        "layers": "sse",
        "num_layers": 2,
        "input_convolution": 3,
        "sse": MODEL["sse"] | {"recurrence": "gdn", "short_convolution": 3},
    },
    "hybrid, window": {"layers": "sse, softmax", "num_layers": 2, "softmax": MODEL["softmax"] | {"window": 6}},
}


@dataclass
class Step:
    """A step on a rank. farthest: difference between log-probabilities of generation and training, the root of its mean
    square relative to theirs, in the micro-batch where it is largest."""

    tokens: list[list[list[int]]]
    rewards: list[list[float]]
    loss: float
    farthest: float
    gradients: dict[str, Part]
    tensor_rank: int


def make_run(folder: Path, **sections: dict[str, Any]) -> PolicyRun:
    config = policy_config(folder, **sections)
    parallel = config.parallel
    groups = init_groups(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
    return PolicyRun(open_problems(config), config, groups, cpu(), None)


def take_step(folder: Path, sections: dict[str, Any]) -> Step:
    run = make_run(folder, **sections)
    seen: list[Tensor] = []
    objective, loss = run.trainer.objective, run.trainer.objective.loss

    def loss_and_note(output: Any, batch: Any) -> Any:
        counts_BL = batch.loss_mask_BL
        differences_BL = (-output.loss.detach() - batch.old_BL) * counts_BL
        # A rank's part may be without an answer.
        seen.append(differences_BL.norm() / (batch.old_BL * counts_BL).norm().clamp(min=1e-6))
        return loss(output, batch)

    objective.loss = loss_and_note  # type: ignore[method-assign]
    groups: list[Group] = []
    roll_out = run._roll_out

    def roll_out_and_note(step: int) -> RolledOut:
        found = roll_out(step)
        groups.extend(found.groups)
        return found

    run._roll_out = roll_out_and_note  # type: ignore[method-assign]
    result = run._take_step(1, iter(()))
    gradients = {global_name(name, run.net): Part(parameter) for name, parameter in run.net.named_parameters()}
    return Step(
        [[rollout.tokens for rollout in group.rollouts] for group in groups],
        [group.rewards for group in groups],
        result.losses["loss"],
        float(max(seen)),
        gradients,
        run.groups.tp.rank(),
    )


def oracle_step(folder: Path, sections: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the same step by the oracle: every answer alone, and plain logits."""
    run = make_run(folder, **sections)
    groups = run._roll_out(1).groups
    run.net.train()
    answers = []
    for group in groups:
        answers.append([])
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            tokens_1T = torch.tensor([group.prompt.tokens + rollout.tokens])
            layout = TokenLayout.from_starts(torch.zeros(tokens_1T.shape, dtype=torch.bool).numpy())
            logits_Tv = run.net(tokens_1T, packed_seq_params=layout)[0, :, :257].double()
            logp_T = logits_Tv[:-1].log_softmax(-1).gather(-1, tokens_1T[0, 1:, None])[:, 0]
            now = logp_T[len(group.prompt.tokens) - 1 :]
            answers[-1].append(oracle.Answer(now, rollout.logp_T.tolist(), rollout.logp_T.tolist(), reward))
    loss = oracle.loss(answers, oracle.Settings("grpo", longest=8))
    loss.backward()
    found = {global_name(name, run.net): parameter for name, parameter in run.net.named_parameters()}
    # What the hooks of DDP have moved out of `grad`.
    return loss.item(), {name: parameter.main_grad.clone() for name, parameter in found.items()}


def compare(gradients: dict[str, tuple[Tensor, Tensor]], each: float = 3e-5) -> None:
    """Compare gradients with those expected: all together, and each weight's.

    Measured are 3e-6 of all, and 1.1e-5 of the two numbers of A_log, whose gradient is a hundredth of others'. With
    context and tensor ranks together these are 3.5e-5; in fp64 all layouts are held to 1e-10.
    """
    differences = {name: float((ours - theirs).norm()) for name, (ours, theirs) in gradients.items()}
    norms = {name: float(theirs.norm()) for name, (_, theirs) in gradients.items()}
    assert sum(x**2 for x in differences.values()) ** 0.5 < 1e-5 * sum(x**2 for x in norms.values()) ** 0.5
    for name, difference in differences.items():
        assert difference < each * norms[name], name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    policy_config(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Step:
    [step] = run_workers(1, take_step, folder, {})
    return step


def test_like_the_oracle(folder: Path, one_process: Step) -> None:
    [(loss, gradients)] = run_workers(1, oracle_step, folder, {})
    # Advantages of a group sum to 0, and so does the loss of the first update, up to rounding.
    assert one_process.loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    compare({name: (part.gradient, gradients[name]) for name, part in one_process.gradients.items()})
    lengths = {len(tokens) for group in one_process.tokens for tokens in group}
    assert len({tuple(tokens) for group in one_process.tokens for tokens in group}) == 12 and max(lengths) <= 8


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel"), MIXED, ids=str)
def test_mixed_layouts(world_size: int, parallel: dict[str, Any], folder: Path, one_process: Step) -> None:
    like_one_process(world_size, parallel, folder, one_process, each=1e-4)
    for algorithm in ("grpo", "gspo"):
        like_the_oracle_in_fp64(folder, world_size, parallel, algorithm)


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=str)
def test_like_one_process(world_size: int, parallel: dict[str, Any], folder: Path, one_process: Step) -> None:
    like_one_process(world_size, parallel, folder, one_process)


def like_one_process(
    world_size: int, parallel: dict[str, Any], folder: Path, one_process: Step, each: float = 3e-5
) -> None:
    for step in run_workers(world_size, take_step, folder, {"parallel": parallel}):
        assert step.tokens == one_process.tokens and step.rewards == one_process.rewards
        assert step.loss == pytest.approx(one_process.loss, rel=1e-5, abs=1e-6)
        assert step.farthest < FARTHEST
        size = parallel.get("tensor", 1)
        wholes = {name: one_process.gradients[name].gradient for name in step.gradients}
        compare(
            {
                name: (part.gradient, own_part(wholes[name], part, step.tensor_rank, size))
                for name, part in step.gradients.items()
            },
            each,
        )


def fp64_model(folder: Path, parallel: dict[str, Any]) -> tuple[Any, Any, bool]:
    """Return a model in fp64, the process groups and whether tokens are in zigzag order."""
    config = policy_config(folder, parallel=parallel)
    groups = init_groups(config.parallel.tensor, context=config.parallel.context)
    dtype = {"params_dtype": torch.float64, "pipeline_dtype": torch.float64}
    settings = build.transformer_settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "transformer_settings", lambda *args: settings(*args) | dtype)
        [net] = build_model(config, groups, cpu())
    return net, groups, choose_layout(config)[0]


def fp64_settings(algorithm: str) -> RLConfig:
    return RLConfig.model_validate(
        {"prompts": "p", "prompts_per_step": 3, "max_new_tokens": 12, "group_size": 4, "algorithm": algorithm}
    )


def fp64_gradients(folder: Path, parallel: dict[str, Any], algorithm: str) -> tuple[float, dict[str, Any], int]:
    """Return loss and gradients of answers with made-up log-probabilities, complete but for tensor parts, and the
    tensor rank."""
    net, groups, zigzag = fp64_model(folder, parallel)
    rl = fp64_settings(algorithm)
    answers = weigh(make_groups(), rl)
    tokens = sum(len(answer.rollout.tokens) for answer in answers)
    objective = PolicyObjective(rl, groups.cp)
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), zigzag)
    place = groups.dp.rank(), groups.dp.size(), shard, "cpu", np.float64
    total = torch.zeros((), dtype=torch.float64)
    for batch in make_batches(pack(answers, LENGTH), LENGTH, 1, *place):
        loss = objective.loss(objective.forward(net, batch, True), batch).loss / tokens
        loss.backward()
        total += loss.detach()
    torch.distributed.all_reduce(total, group=groups.dp_cp)
    found = {}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float64
        torch.distributed.all_reduce(parameter.grad, group=groups.dp_cp)
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
        parameter.main_grad = parameter.grad  # type: ignore[attr-defined]
        found[global_name(name, net)] = Part(parameter)
    return total.item(), found, groups.tp.rank()


def fp64_oracle(folder: Path, algorithm: str) -> tuple[float, dict[str, Tensor]]:
    """Return the same by the oracle: every answer alone, and plain logits."""
    net, _, _ = fp64_model(folder, {})
    answers = []
    for group in make_groups():
        answers.append([])
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            tokens_1T = torch.tensor([group.prompt.tokens + rollout.tokens])
            layout = TokenLayout.from_starts(torch.zeros(tokens_1T.shape, dtype=torch.bool).numpy())
            logits_Tv = net(tokens_1T, packed_seq_params=layout)[0, :, :257]
            logp_T = logits_Tv[:-1].log_softmax(-1).gather(-1, tokens_1T[0, 1:, None])[:, 0]
            now = logp_T[len(group.prompt.tokens) - 1 :]
            answers[-1].append(oracle.Answer(now, rollout.logp_T.tolist(), rollout.logp_T.tolist(), reward))
    loss = oracle.loss(answers, oracle.Settings(algorithm, longest=12))
    loss.backward()
    return loss.item(), {global_name(name, net): parameter.grad for name, parameter in net.named_parameters()}


def like_the_oracle_in_fp64(folder: Path, world_size: int, parallel: dict[str, Any], algorithm: str) -> None:
    [(expected, wholes)] = run_workers(1, fp64_oracle, folder, algorithm)
    for loss, parts, tensor_rank in run_workers(world_size, fp64_gradients, folder, parallel, algorithm):
        assert loss == pytest.approx(expected, rel=1e-10)
        for name, part in parts.items():
            whole = own_part(wholes[name], part, tensor_rank, parallel.get("tensor", 1))
            assert float((part.gradient - whole).norm()) < 1e-10 * float(whole.norm()), name


@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), *LAYOUTS], ids=str)
def test_like_the_oracle_in_fp64(world_size: int, parallel: dict[str, Any], folder: Path) -> None:
    like_the_oracle_in_fp64(folder, world_size, parallel, "gspo" if world_size == 1 else "grpo")


def test_generation_and_training_agree(folder: Path, one_process: Step) -> None:
    assert one_process.farthest < FARTHEST
    for name, model in DECODED.items():
        for rl in ({}, {"temperature": 0.7, "top_p": 0.9}):
            [step] = run_workers(1, take_step, folder, {"model": model, "rl": rl})
            assert step.farthest < FARTHEST, name


def ended_answers(folder: Path) -> None:
    """Check that an answer ends with the first token that ends it, which is a token of the answer like others."""
    run = make_run(folder)
    prompts, sampler = run.problems.prompts[:2], KeyedSampler(257)

    def answer(ends: Sequence[int | None]) -> list[list[Rollout]]:
        ending = [replace(prompt, end=end) for prompt, end in zip(prompts, ends, strict=True)]
        return generate(run.generator, ending, [[1, 2], [3, 4]], 8, sampler, 4)

    without = answer([None, None])
    ends = [group[0].tokens[3] for group in without]
    found = answer(ends)
    for end, group, longer in zip(ends, found, without, strict=True):
        assert not group[0].is_cut and len(group[0].tokens) <= 4
        for rollout, whole in zip(group, longer, strict=True):
            length = whole.tokens.index(end) + 1 if end in whole.tokens else 8
            assert rollout.tokens == whole.tokens[:length] and rollout.is_cut == (end not in whole.tokens)
            assert rollout.logp_T == pytest.approx(whole.logp_T[:length], rel=1e-5)
            # All of its tokens count in the loss, the end too.
            [batch] = make_batches([[Answer([1], rollout, 1.0, 1.0)]], LENGTH, 1, 0, 1, ContextShard(), "cpu")
            assert batch.labels_BL[batch.loss_mask_BL > 0].tolist() == rollout.tokens


def test_the_end_of_an_answer_is_drawn_and_counts(folder: Path) -> None:
    run_workers(1, ended_answers, folder)


def distance_in_bf16(folder: Path) -> float:
    """Return how far log-probabilities that training computes are from those of the same logits as generation has."""
    run = make_run(folder, training={"steps": 1, "micro_batch_size": 1, "precision": "bf16"})
    run.net.eval()
    tokens_BL = torch.arange(1, LENGTH + 1)[None]
    layout = TokenLayout.from_starts(torch.zeros(tokens_BL.shape, dtype=torch.bool).numpy())
    with torch.no_grad():
        logits_BLv = run.net(tokens_BL, packed_seq_params=layout)[..., :257].float()
        scores = run.net(tokens_BL, labels=tokens_BL, packed_seq_params=layout, temperature=0.7)
    logp_BL = (logits_BLv / 0.7).log_softmax(-1).gather(-1, tokens_BL[..., None])[..., 0]
    return float((logp_BL + scores.loss).abs().max())


def test_the_temperature_is_not_rounded_to_bf16(folder: Path) -> None:
    [distance] = run_workers(1, distance_in_bf16, folder)
    assert distance < 1e-5


def roll_out(folder: Path, sections: dict[str, Any]) -> tuple[list[Any], list[Any], int]:
    """Return tokens and rewards of the answers that were drawn and of those to train on, and all tokens."""
    run = make_run(folder, **sections)
    found = run._roll_out(1)
    drawn, kept = (
        [([rollout.tokens for rollout in group.rollouts], group.rewards) for group in groups]
        for groups in (found.drawn, found.groups)
    )
    return drawn, kept, found.tokens


def test_groups_with_equal_rewards_are_replaced(folder: Path) -> None:
    rl = {"group_size": 2, "prompts_per_step": 6}
    [(plain, kept, _)] = run_workers(1, roll_out, folder, {"rl": rl})
    assert plain == kept and any(len(set(rewards)) == 1 for _, rewards in plain)
    rl["resample_rounds"] = 8
    [(drawn, kept, _)] = run_workers(1, roll_out, folder, {"rl": rl})
    assert drawn == plain and all(len(set(rewards)) == 2 for _, rewards in kept)
    # What has a spread stays in its place.
    assert all(ours == theirs for ours, theirs in zip(kept, drawn, strict=True) if len(set(theirs[1])) == 2)
    assert [found[:2] for found in run_workers(2, roll_out, folder, {"rl": rl})] == [(drawn, kept)] * 2
    # No group ever has a spread, and the limit is kept: 1 + 2 rounds of 6 groups of 2 answers of at most 8 tokens.
    never = rl | {"resample_rounds": 2, "reward": "exact"}
    [(drawn, kept, tokens)] = run_workers(1, roll_out, folder, {"rl": never})
    assert drawn == kept and 2 * 6 * 2 * 8 < tokens <= 3 * 6 * 2 * 8


def failing_reward(folder: Path) -> str:
    run = make_run(folder, rl={"reward": "tests.rl.support:fails_on_rank_1"})
    with pytest.raises(SharedUserError) as error:
        run._take_step(1, iter(()))
    return str(error.value)


def test_a_reward_that_fails_on_one_rank_ends_all(folder: Path) -> None:
    [message] = set(run_workers(2, failing_reward, folder))
    assert "fails_on_rank_1 returned inf, allowed a finite number, for the prompt of" in message
