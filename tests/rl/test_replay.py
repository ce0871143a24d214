"""Partitions picked while generating, picked again in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.config import ignored_settings
from megatron_sse.model.initialize import own_part
from megatron_sse.rl.advantages import weigh
from megatron_sse.rl.packing import make_batches, pack
from megatron_sse.rl.routing import make_filler
from megatron_sse.training.loop import UselessRunError
from tests.rl.support import MODEL, policy_config
from tests.rl.test_layouts import FARTHEST, compare, make_run, take_step
from tests.workers import run_workers

REPLAY = {"replay_routing": True}
# Many partitions of nearly equal probability, so that rounding decides often.
ROUTED: dict[str, Any] = {
    "model": MODEL | {"layers": "sse", "num_layers": 4, "sse": MODEL["sse"] | {"num_partitions": 16}},
    "data": {"sequence_length": 128},
}
OWN_ROUTER: dict[str, Any] = {"model": MODEL | {"sse": MODEL["sse"] | {"own_read_router": True, "num_partitions": 3}}}


def in_bf16(folder: Path, sections: dict[str, Any]) -> list[tuple[float, float]]:
    """Return, without and with replay of the same answers: the share of training's picks that are not those of
    generation, and how far log-probabilities are apart (PolicyObjective's "error")."""
    run = make_run(folder, **sections)
    assert run.replay is not None
    answers = weigh(run._roll_out(1).groups, run.rl)
    place, filler = (0, 1, run.shard, "cpu"), make_filler(run.replay.routers)
    length = run.config.data.sequence_length
    batches = make_batches(pack(answers, length), length, 1, *place, filler_MP=filler)
    was_fed = [(batch.picks_BLMP != torch.from_numpy(filler)).flatten(2).any(-1).flatten() for batch in batches]
    found = []
    for replays in (False, True):
        picked: list[torch.Tensor] = []
        error, tokens, others, fed = 0.0, 0, 0, 0
        for router in run.replay.routers:
            router.record = lambda layout, bank_TP, picked=picked: picked.append(bank_TP)
        for batch, fed_T in zip(batches, was_fed, strict=True):
            picked.clear()
            given = replace(batch, picks_BLMP=batch.picks_BLMP if replays else None)
            with torch.no_grad():
                loss = run.trainer.objective.loss(run.trainer.objective.forward(run.net, given, True), given)
            assert batch.picks_BLMP is not None
            differs_TMP = torch.stack(picked, 1) != batch.picks_BLMP.flatten(0, 1)
            others, fed = others + int(differs_TMP[fed_T].sum()), fed + int(fed_T.sum()) * differs_TMP[0].numel()
            error, tokens = error + float(loss.sums["error"]), tokens + int(loss.tokens)
        found.append((others / fed, error / tokens))
    return found


def test_the_picks_of_generation_in_bf16(tmp_path: Path) -> None:
    rl = REPLAY | {"max_new_tokens": 100, "group_size": 8}
    sections = ROUTED | {"rl": rl, "training": {"steps": 1, "micro_batch_size": 1, "precision": "bf16"}}
    [[plain, replayed]] = run_workers(1, in_bf16, tmp_path, sections)
    assert plain[0] > 0 and replayed[0] == 0
    # Rounding of all else stays.
    assert 1 < replayed[1] < 1.001 * plain[1], (plain, replayed)


def wrong_picks(folder: Path) -> None:
    """Check that log-probabilities differ where other partitions are replayed than were picked."""
    run = make_run(folder, rl=REPLAY)
    assert run.replay is not None
    found = run._roll_out(1)
    for group in found.groups:
        for rollout in group.rollouts:
            assert rollout.picks_RMP is not None
            rollout.picks_RMP[:] = (rollout.picks_RMP + 1) % 3
    run._roll_out = lambda step: found  # type: ignore[method-assign]
    with pytest.raises(UselessRunError, match="probabilities that differ by a factor of"):
        run._take_step(1, iter(()))


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {}), (2, {"context": 2, "layout": "zigzag"}), (2, {"tensor": 2, "sequence": True})],
    ids=str,
)
def test_like_without_in_fp32(world_size: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    for model in ({}, OWN_ROUTER):
        [plain] = run_workers(1, take_step, tmp_path, model)
        for step in run_workers(world_size, take_step, tmp_path, model | {"parallel": parallel, "rl": REPLAY}):
            assert step.tokens == plain.tokens and step.rewards == plain.rewards
            assert step.loss == pytest.approx(plain.loss, rel=1e-5, abs=1e-6) and step.farthest < FARTHEST
            size = parallel.get("tensor", 1)
            wholes = {name: part.gradient for name, part in plain.gradients.items()}
            compare(
                {
                    name: (part.gradient, own_part(wholes[name], part, step.tensor_rank, size))
                    for name, part in step.gradients.items()
                }
            )


def test_what_is_replayed_counts(tmp_path: Path) -> None:
    run_workers(1, wrong_picks, tmp_path)


def test_ignored(tmp_path: Path) -> None:
    config = policy_config(tmp_path, model=MODEL | {"layers": "gdn"}, rl=REPLAY)
    assert "rl.replay_routing is ignored: no layer has partitions" in ignored_settings(config)
