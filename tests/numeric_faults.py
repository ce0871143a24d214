"""Numeric faults on some ranks and their required outcomes (for test_faults.py)."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sse.config import load_config
from megatron_sse.data.batch import Batch
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.training.loop import NonFiniteError, Run, Signals
from megatron_sse.training.optimizer import set_learning_rate
from tests.check_parallel import broken
from tests.monitor.events import read_events
from tests.training.support import small_run, start
from tests.workers import run_workers

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
PIPELINE: dict[str, Any] = {"parallel": {"pipeline": 2}}
TENSOR: dict[str, Any] = {"parallel": {"tensor": 2}}
CONTEXT: dict[str, Any] = {"parallel": {"context": 2}}
DISTRIBUTED: dict[str, Any] = {"parallel": {"distributed_optimizer": True}}
OVERLAPPED: dict[str, Any] = {
    "parallel": {"distributed_optimizer": True, "overlap_gradients": True, "overlap_parameters": True}
}


def batches_of(run: Run) -> list[Batch]:
    """Return this rank's micro-batches of one step."""
    iterator, _ = build_data_iterators(run.stage, run.groups, 0)
    return [next(iterator) for _ in range(run.trainer.num_micro_batches)]


def weights(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in run.trainer.chunks for parameter in chunk.parameters()]


def poisoned_step(folder: Path, sections: dict[str, Any], where: str) -> tuple[bool, bool, bool]:
    """Put a fault on rank 1; return whether the step was skipped, weights stayed, and the next step moved them."""
    run = start(small_run(folder, **sections))
    set_learning_rate(run.trainer.optimizer, 1e-2)
    before = weights(run)
    batches = batches_of(run)
    if dist.get_rank() == 1 and where == "loss":
        batches[0].loss_mask_BL[0, 0] = float("nan")
    handle = None
    if dist.get_rank() == 1 and where == "gradient":
        parameter = next(run.trainer.chunks[0].parameters())
        handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    skipped = run.trainer.train_step(iter(batches)).skipped
    stayed = all(torch.equal(old, new) for old, new in zip(before, weights(run), strict=True))
    if handle is not None:
        handle.remove()
    clean = run.trainer.train_step(iter(batches_of(run)))
    moved = all(not torch.equal(old, new) for old, new in zip(before, weights(run), strict=True))
    return skipped, stayed, moved and not clean.skipped


def skipped_on_all_ranks(sections: dict[str, Any], where: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that a value that is not finite on rank 1 makes all ranks skip the step, and that the next one is taken."""
    small_run(folder)
    assert run_workers(2, poisoned_step, folder, sections, where) == [(True, True, True)] * 2


def steps_until_stopped(folder: Path) -> tuple[int, str]:
    run = start(small_run(folder, training={"max_skipped_steps": 3}))
    bad = batches_of(run)
    bad[0].loss_mask_BL[0, 0] = float("nan")
    good = batches_of(run)
    # Two bad steps are followed by a good one and then by bad ones only.
    for step, batches in enumerate([bad, bad, good, *[bad] * 9], start=1):
        try:
            run._report(step, run.trainer.train_step(iter(batches)), 1e-3, 1.0)
        except NonFiniteError as error:
            return step, str(error)
    return 0, "never stopped"


def stopped_after_too_many(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [(step, message)] = run_workers(1, steps_until_stopped, folder)
    assert step == 6
    assert "training.max_skipped_steps" in message and "3 steps in a row" in message


def masked_step(folder: Path, masked_ranks: list[int]) -> tuple[float, float]:
    """Return loss and gradient norm where all tokens of some of the two ranks are masked."""
    run = start(small_run(folder))
    batches = batches_of(run)
    # One process masks the micro-batches that the two-rank layout gives to the masked ranks.
    for number, batch in enumerate(batches):
        rank = dist.get_rank() if dist.get_world_size() == 2 else number % 2
        if rank in masked_ranks:
            batch.loss_mask_BL.zero_()
    result = run.trainer.train_step(iter(batches))
    return result.losses["loss"], result.grad_norm


def masked_data_rank(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that a masked data-parallel rank gives the loss and gradient norm of one process, which are finite."""
    small_run(folder)
    [(loss, norm)] = run_workers(1, masked_step, folder, [1])
    for result in run_workers(2, masked_step, folder, [1]):
        assert result == pytest.approx((loss, norm), rel=1e-5)


def masked_half_step(folder: Path, context: int) -> tuple[float, float]:
    """Return loss and gradient norm where the second half of every sequence, held by rank 1, is masked."""
    run = start(small_run(folder, parallel={"context": context}))
    batches = batches_of(run)
    for batch in batches:
        half = batch.layout.column_L >= run.config.data.sequence_length // 2
        batch.loss_mask_BL[:, half] = 0
    result = run.trainer.train_step(iter(batches))
    return result.losses["loss"], result.grad_norm


def masked_context_rank(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_run(folder)
    [expected] = run_workers(1, masked_half_step, folder, 1)
    for result in run_workers(2, masked_half_step, folder, 2):
        assert result == pytest.approx(expected, rel=1e-5)


def broken_hand_off_seen(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that check-parallel reports a broken hand-off, only in the layout that uses it, from the first layer on."""
    config = load_config(QUICKSTART, ["model.layers=sse, softmax", "model.num_layers=2"])
    path = folder / "numbers.json"
    assert broken.check_broken(config, ["cp2", "dp2"], path, broken.hand_off_disabled) == 1
    numbers = json.loads(path.read_text())
    layouts, allowed = numbers["layouts"], numbers["allowed"]
    assert layouts["dp2"]["verdict"] == "same" and layouts["cp2"]["verdict"] == "different"
    errors = layouts["cp2"]["errors"]
    assert errors["output of embedding"] <= allowed["output of embedding"]
    assert errors["output of layer 1"] > max(1e-3, allowed["output of layer 1"])


def flipped_after_the_reduction(folder: Path, sections: dict[str, Any]) -> tuple[str | None, bool, bool]:
    """Put an inf into rank 1's reduced gradient; return why the step was skipped, and whether weights stayed."""
    run = start(small_run(folder, **sections))
    set_learning_rate(run.trainer.optimizer, 1e-2)
    before, optimizer = weights(run), run.trainer.optimizer
    prepare = optimizer.prepare_grads

    def prepare_grads() -> Any:
        if dist.get_rank() == 1:
            next(run.trainer.chunks[0].parameters()).main_grad.view(-1)[0] = float("inf")
        return prepare()

    optimizer.prepare_grads = prepare_grads  # type: ignore[method-assign]
    skip = run.trainer.train_step(iter(batches_of(run))).skip
    stayed = all(torch.equal(old, new) for old, new in zip(before, weights(run), strict=True))
    optimizer.prepare_grads = prepare  # type: ignore[method-assign]
    clean = run.trainer.train_step(iter(batches_of(run)))
    return None if skip is None else skip.reason, stayed, clean.skipped


def one_replica_not_finite(sections: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that all ranks skip the step, and say that replicas differ."""
    small_run(folder)
    expected = ("gradient not finite on some of the replicas only", True, False)
    assert run_workers(2, flipped_after_the_reduction, folder, sections) == [expected] * 2


def everything_masked(folder: Path) -> tuple[list[str], str]:
    """Run with all tokens masked; return the warnings, and why the run ended."""
    run = start(small_run(folder, training={"max_skipped_steps": 3}))
    lines, take_step = listen(), run.trainer.train_step

    def masked(batches: Iterator[Batch]) -> Any:
        taken = [next(batches) for _ in range(run.trainer.num_micro_batches)]
        for batch in taken:
            batch.loss_mask_BL.zero_()
        return take_step(iter(taken))

    run.trainer.train_step = masked  # type: ignore[method-assign]
    before = weights(run)
    try:
        run.run(Signals())
    except NonFiniteError as error:
        assert all(torch.equal(old, new) for old, new in zip(before, weights(run), strict=True))
        return lines, str(error)
    return lines, "never stopped"


def stopped_when_all_is_masked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_run(folder)
    for lines, message in run_workers(2, everything_masked, folder):
        assert len(lines) in (0, 3) and all(line.endswith("SKIPPED: all tokens are masked") for line in lines)
        assert message.startswith("training.max_skipped_steps: 3 steps in a row were skipped (the last was step 3: all")
    assert read_events(folder / "run")["train/skipped"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not list((folder / "run").glob("checkpoints/iter_*"))


def listen() -> list[str]:
    """Return a list to which warnings and errors of the monitor are added from now on."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_sse.monitor.monitor").addHandler(handler)
    return lines


def flipped_weight(folder: Path, sections: dict[str, Any]) -> list[str]:
    """Flip a bit of a weight on rank 1 before step 4 of a run; return what the monitor warns of."""
    run = start(small_run(folder, monitor={"replica_check": 2}, **sections))
    lines, take_step = listen(), run.trainer.train_step

    def train_step(batches: Iterator[Batch]) -> Any:
        if dist.get_rank() == 1 and run.consumed_samples == 12:
            bits = next(run.trainer.chunks[0].parameters()).data.view(torch.int32)
            bits.view(-1)[5] ^= 1 << 12
        return take_step(batches)

    run.trainer.train_step = train_step  # type: ignore[method-assign]
    run.run(Signals())
    return lines


def replicas_compared(
    sections: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str], steps: tuple[int, ...] = (4, 6, 8)
) -> None:
    """Check that rank 0 names the rank and a weight at the comparisons in `steps`, after the flip."""
    small_run(folder)
    first, second = run_workers(2, flipped_weight, folder, sections)
    assert [line.split(" | ")[0] for line in first] == [f"step {step}/8" for step in steps] and second == []
    found = "replicas differ: rank 1 against rank 0 in embedding.word_embeddings.weight"
    assert all(line.split(" | ")[1].startswith(found) for line in first)
