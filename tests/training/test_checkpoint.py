"""Checkpoints: going on from one is bitwise the same as not having stopped, and only whole ones are found."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.data import build_data_iterators
from megatron_sse.errors import UserError
from megatron_sse.training.checkpoint import find_checkpoint, save_checkpoint
from megatron_sse.training.optimizer import set_learning_rate
from tests.training.support import small_run, start
from tests.workers import run_workers

Trace = list[tuple[dict[str, float], float]]


def train_and_save(
    folder: Path, sections: dict[str, Any], resume: Path | None, last_step: int, save: bool
) -> tuple[Trace, dict[str, torch.Tensor]]:
    """Train up to `last_step`; losses and gradient norms, and weights and optimizer state at the end."""
    run = start(small_run(folder, **sections), resume)
    iterator, _ = build_data_iterators(run.config, run.groups, run.consumed_samples)
    trace = []
    for step in range(run.first_step, last_step + 1):
        set_learning_rate(run.trainer.optimizer, run.learning_rate(step))
        run._seed(step)
        result = run.trainer.train_step(iterator)
        run.consumed_samples += run.config.training.global_batch_size
        trace.append((result.losses, result.grad_norm))
    chunks, optimizer = run.trainer.chunks, run.trainer.optimizer
    if save:
        save_checkpoint(folder / "checkpoints", last_step, run.consumed_samples, chunks, optimizer, run.groups)
    state = {
        f"{number}.{name}": parameter.detach()
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    for number, moments in enumerate(optimizer.chained_optimizers[0].optimizer.state.values()):
        state |= {f"moments.{number}.{name}": tensor for name, tensor in moments.items()}
    return trace, state


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (1, {}),
        (1, {"training": {"precision": "bf16", "steps": 8, "global_batch_size": 4}}),
        (1, {"model": {"hidden_dropout": 0.1}}),
        (2, {"parallel": {"tensor": 2}}),
        (2, {"parallel": {"distributed_optimizer": True}}),
        (2, {"parallel": {"pipeline": 2}}),
    ],
    ids=str,
)
def test_four_steps_and_four_more_are_bitwise_eight(tmp_path: Path, world_size: int, sections: dict[str, Any]) -> None:
    if "model" in sections:
        sections = {"model": {"transformer": sections["model"]}}
    small_run(tmp_path)
    straight = run_workers(world_size, train_and_save, tmp_path, sections, None, 8, False)
    run_workers(world_size, train_and_save, tmp_path, sections, None, 4, True)
    resumed = run_workers(
        world_size, train_and_save, tmp_path, sections, tmp_path / "checkpoints/iter_0000004", 8, False
    )
    for (trace, state), (resumed_trace, resumed_state) in zip(straight, resumed, strict=True):
        assert resumed_trace == trace[4:]
        assert state.keys() == resumed_state.keys() and len(state) > 20
        assert [name for name in state if not torch.equal(state[name], resumed_state[name])] == []


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_checkpoint_goes_on_at_another_layout(tmp_path: Path, distributed_optimizer: bool) -> None:
    def at(**parallel: Any) -> dict[str, Any]:
        return {"parallel": {"distributed_optimizer": distributed_optimizer, **parallel}}

    small_run(tmp_path)
    [(straight, _)] = run_workers(1, train_and_save, tmp_path, {}, None, 6, False)
    run_workers(2, train_and_save, tmp_path, at(), None, 4, True)
    checkpoint = tmp_path / "checkpoints/iter_0000004"
    for world_size, sections in ((1, at()), (2, at(tensor=2)), (2, at(pipeline=2))):
        for trace, _ in run_workers(world_size, train_and_save, tmp_path, sections, checkpoint, 6, False):
            for (losses, norm), (expected_losses, expected_norm) in zip(trace, straight[4:], strict=True):
                assert losses == pytest.approx(expected_losses, rel=1e-5)
                assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_saving_leaves_whole_checkpoints_and_points_to_the_newest(tmp_path: Path) -> None:
    small_run(tmp_path)
    half = tmp_path / "checkpoints/partial_iter_0000001"
    half.mkdir(parents=True)
    (half / "left over").touch()
    for last_step in (1, 2, 2):
        run_workers(1, train_and_save, tmp_path, {}, None, last_step, True)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iter_0000001", "iter_0000002", "latest"]
    assert (tmp_path / "checkpoints/latest").read_text() == "iter_0000002\n"


def make_checkpoints(folder: Path, complete: list[int], half: list[int], latest: str | None) -> None:
    for step in complete + half:
        (folder / f"iter_{step:07d}").mkdir(parents=True)
    for step in complete:
        (folder / f"iter_{step:07d}" / "metadata.json").write_text("{}")
    if latest is not None:
        (folder / "latest").write_text(latest)


@pytest.mark.parametrize(
    ("complete", "half", "latest", "found"),
    [
        ([], [], None, None),
        ([5, 10], [], "iter_0000005\n", "iter_0000005"),
        ([5, 10], [], None, "iter_0000010"),
        ([5], [10], "iter_0000010\n", "iter_0000005"),
        ([5], [], "\x00garbage", "iter_0000005"),
        ([5], [], "", "iter_0000005"),
        ([], [10], "iter_0000010\n", None),
    ],
)
def test_auto_takes_the_newest_complete_checkpoint(
    tmp_path: Path, complete: list[int], half: list[int], latest: str | None, found: str | None
) -> None:
    config = small_run(tmp_path)
    folder = Path(config.monitor.folder) / "checkpoints"
    make_checkpoints(folder, complete, half, latest)
    assert find_checkpoint(config) == (None if found is None else folder / found)


def test_resume_can_be_turned_off_or_name_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "other/checkpoints"
    make_checkpoints(folder, [5, 10], [], "iter_0000010\n")

    def find(resume: str) -> Path | None:
        return find_checkpoint(small_run(tmp_path, checkpoint={"resume": resume}))

    assert find("none") is None
    assert find(str(folder / "iter_0000005")) == folder / "iter_0000005"
    assert find(str(folder)) == find(str(tmp_path / "other")) == folder / "iter_0000010"
    with pytest.raises(UserError, match="^checkpoint.resume: got nowhere, allowed"):
        find("nowhere")
