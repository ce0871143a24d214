"""Complete runs: where they end, what they save, and validation."""

import logging
import os
import re
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.model import metrics
from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.training.loop import Run, Signals
from tests.training.support import small_run, start
from tests.workers import run_workers


def terminated_on_one_rank(folder: Path) -> list[str]:
    """Send SIGTERM to rank 1 alone during step 3, and return the checkpoints that the run leaves."""
    run = start(small_run(folder))
    take_step = run.trainer.train_step

    def step_with_signal(batches: Any) -> Any:
        result = take_step(batches)
        if os.environ["RANK"] == "1" and run.consumed_samples == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    run.trainer.train_step = step_with_signal  # type: ignore[method-assign]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run.run(Signals())
    signal.signal(signal.SIGTERM, handlers[0])
    signal.signal(signal.SIGINT, handlers[1])
    return sorted(path.name for path in (folder / "run/checkpoints").iterdir())


def test_sigterm_on_one_rank_ends_all_after_the_same_step(tmp_path: Path) -> None:
    small_run(tmp_path)
    assert run_workers(2, terminated_on_one_rank, tmp_path) == [["iter_0000003", "latest"]] * 2


def saved_on_the_way(folder: Path, asynchronous: bool, steps_until_end: int) -> list[int]:
    """Return the steps that a run saves when its time is up in step `steps_until_end`."""
    training = {"steps": 9, "global_batch_size": 2, "precision": "fp32"}
    checkpoint = {"interval": 2, "keep_last": 2, "asynchronous": asynchronous}
    run = start(small_run(folder, training=training, checkpoint=checkpoint))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals = Signals(minutes=1000.0)
    take_step, save, saved = run.trainer.train_step, run.saver.start, []

    def step_that_takes_long(batches: Any) -> Any:
        if run.consumed_samples == 2 * (steps_until_end - 1) and os.environ["RANK"] == "0":
            signals.end = 0.0
        return take_step(batches)

    def save_and_note(step: int, consumed_samples: int, background: bool, finite: bool = True) -> None:
        saved.append(step)
        save(step, consumed_samples, background, finite)

    run.trainer.train_step = step_that_takes_long  # type: ignore[method-assign]
    run.saver.start = save_and_note  # type: ignore[method-assign]
    run.run(signals)
    signal.signal(signal.SIGTERM, handlers[0])
    signal.signal(signal.SIGINT, handlers[1])
    return saved


@pytest.mark.parametrize(("asynchronous", "end", "saved"), [(True, 7, [2, 4, 6, 7]), (False, 6, [2, 4, 6])])
def test_interval_keep_last_and_the_end_of_the_time(
    tmp_path: Path, asynchronous: bool, end: int, saved: list[int]
) -> None:
    small_run(tmp_path)
    assert run_workers(2, saved_on_the_way, tmp_path, asynchronous, end) == [saved] * 2
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [*(f"iter_{step:07d}" for step in saved[-2:]), "latest"]


def validation_losses(folder: Path, sections: dict[str, Any]) -> tuple[list[tuple[int, float]], list[int]]:
    """Return the validations, and the steps in which layers measure their health, once per layer and micro-batch."""
    run = start(small_run(folder, **sections))
    reported: list[tuple[int, float]] = []
    measured: list[int] = []
    run.monitor.validation = lambda step, means: reported.append((step, means["loss"]))  # type: ignore[method-assign]

    def describe(*parts: Any, describe: Any = metrics._describe) -> Any:
        measured.append(1 + run.consumed_samples // 4)
        return describe(*parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_describe", describe)
        run.run(Signals())
    return reported, measured


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=str)
def test_validation_comes_at_its_interval_and_at_the_end(tmp_path: Path, parallel: dict[str, Any]) -> None:
    train = str(tmp_path / "train")
    sections: dict[str, Any] = {
        "training": {
            "steps": 5,
            "global_batch_size": 4,
            "precision": "fp32",
            "validation_interval": 2,
            "validation_batches": 3,
        },
        "data": {"train": train, "validation": train, "sequence_length": 16},
        "checkpoint": {"resume": "none"},
        "monitor": {"health_interval": 2},
    }
    small_run(tmp_path)
    [(expected, measured)] = run_workers(1, validation_losses, tmp_path, sections)
    assert measured == [2] * 4 + [4] * 4
    assert [step for step, _ in expected] == [2, 4, 5]
    assert expected[-1][1] < expected[0][1]
    for reported, _ in run_workers(2, validation_losses, tmp_path, sections | {"parallel": parallel}):
        assert [step for step, _ in reported] == [2, 4, 5]
        assert [loss for _, loss in reported] == pytest.approx([loss for _, loss in expected], rel=1e-5)


def continued(folder: Path, sections: dict[str, Any], first: int) -> tuple[list[str], list[tuple[int, ...]]]:
    """End a run of batches of 4 after `first` steps, resume it otherwise; return warnings and the sequences seen."""
    run = start(small_run(folder, training=TRAINING))
    seen: list[tuple[int, ...]] = []
    signals = Signals()
    note_batches(run, seen)
    take_step = run.trainer.train_step

    def step_until_first(batches: Any) -> Any:
        signals.terminate = len(seen) == 4 * (first - 1)
        return take_step(batches)

    run.trainer.train_step = step_until_first  # type: ignore[method-assign]
    run.run(signals)
    destroy_groups()
    log: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_sse").addHandler(handler)
    run = start(small_run(folder, **sections), folder / f"run/checkpoints/iter_{first:07d}")
    note_batches(run, seen)
    run.run(Signals())
    logging.getLogger("megatron_sse").removeHandler(handler)
    destroy_groups()
    return log, seen


def note_batches(run: Run, seen: list[tuple[int, ...]]) -> None:
    """Add the tokens of each sequence that a run trains on to `seen`."""
    take_step = run.trainer.train_step

    def step_and_note(batches: Any) -> Any:
        taken = list(islice(batches, run.trainer.num_micro_batches))
        seen.extend(tuple(row.tolist()) for batch in taken for row in batch.tokens_BL)
        return take_step(iter(taken))

    run.trainer.train_step = step_and_note  # type: ignore[method-assign]


TRAINING = {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"}


def test_a_run_without_stages_goes_on_after_its_samples_with_another_batch(tmp_path: Path) -> None:
    """No sequence is skipped or seen twice, and a learning rate that jumps is reported (F38)."""
    (tmp_path / "other").mkdir()
    small_run(tmp_path)
    small_run(tmp_path / "other")
    [(log, seen)] = run_workers(1, continued, tmp_path, {"training": TRAINING | {"global_batch_size": 2}}, 3)
    assert log == ["validation losses before the resume are of 32 sequences, from here on of 16"]
    longer = {"training": TRAINING | {"steps": 12}}
    [(log, expected)] = run_workers(1, continued, tmp_path / "other", longer, 3)
    assert len(log) == 1 and log[0].startswith("the learning rate jumps: the checkpoint's last step had 0.00"), log
    [setting] = re.findall(r"; optimizer.schedule=constant optimizer.learning_rate=(\S+) continues", log[0])
    assert f"last step had {setting}, " in log[0]
    assert len(seen) == 3 * 4 + 5 * 2 and seen == expected[: len(seen)]


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    """Both times it closes with what doctor says of it."""
    small_run(tmp_path)
    [(taken, lines)] = run_workers(1, finish_twice, tmp_path)
    done = "all 3 steps are done; raise training.steps to train longer"
    closing = f"checkpoint: {tmp_path}/run/checkpoints/iter_0000003 ({done})"
    assert taken == [3, 0] and lines == [closing, f"nothing to do: {done}", closing]


def finish_twice(folder: Path) -> tuple[list[int], list[str]]:
    """Return the number of steps taken by a run of three steps, and by the same run started again, and their log."""
    taken, lines = [], []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_sse.training.loop")
    logger.setLevel(logging.INFO)
    for resume in (None, folder / "run/checkpoints/iter_0000003"):
        run: Run = start(small_run(folder, training={"steps": 3, "global_batch_size": 4, "precision": "fp32"}), resume)
        before = run.consumed_samples
        logger.addHandler(handler)
        run.run(Signals())
        logger.removeHandler(handler)
        taken.append((run.consumed_samples - before) // 4)
        destroy_groups()
    return taken, lines
