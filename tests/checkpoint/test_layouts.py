"""A checkpoint of any layout resumes in any other, and with the other optimizer, with the same losses (F18)."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sse.parallel.groups import destroy_groups
from tests.checkpoint.support import save, take_steps
from tests.training.support import small_run, start
from tests.workers import run_workers

NUM_BEFORE, NUM_AFTER = 3, 4
# Rounding causes 1.2e-6 in the steps after a checkpoint; a number of steps that is wrong by one, 6e-5.
TOLERANCE = 5e-6
# Everything that a tensor group splits differently; the vocabulary is padded to 128 rows.
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "vocab_size": 64,
        "layers": "sse, gdn, sse, softmax",
        "tie_embeddings": True,
        "sse": {"num_heads": 2, "head_dim": 8, "num_partitions": 2, "short_convolution": 3},
        "softmax": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    },
    "training": {"steps": 20, "global_batch_size": 2, "precision": "fp32"},
    # AdamW's first steps amplify rounding, the more so at higher learning rates.
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
}
SAVED: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2_cp2": (4, {"tensor": 2, "context": 2, "distributed_optimizer": True}),
    "dp2": (2, {"distributed_optimizer": True}),
    "pp2_virtual": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}
# Layouts for loading; some use another optimizer than the one that saved.
LOADED = {name: (size, parallel | {"distributed_optimizer": name != "dp2"}) for name, (size, parallel) in SAVED.items()}


def save_at(folder: Path, name: str, parallel: dict[str, Any]) -> list[float]:
    run = start(config_of(folder, name, parallel))
    trace = take_steps(run, NUM_BEFORE)
    save(run, NUM_BEFORE)
    # One process continues, for comparison.
    return losses_of(trace + (take_steps_after(run) if name == "one" else []))


def config_of(folder: Path, name: str, parallel: dict[str, Any]) -> Any:
    # The smallest number of micro-batches that the layout allows.
    micro_batch_size = 2 if parallel.get("context", 1) > 1 else 1
    training = SECTIONS["training"] | {"micro_batch_size": micro_batch_size}
    sections = SECTIONS | {"training": training, "parallel": parallel, "monitor": {"folder": str(folder / name)}}
    return small_run(folder, **sections)


def take_steps_after(run: Any) -> Any:
    run.first_step = NUM_BEFORE + 1
    return take_steps(run, NUM_BEFORE + NUM_AFTER)


def losses_of(trace: Any) -> list[float]:
    return [losses["loss"] for losses, _ in trace]


def load_at(folder: Path, parallel: dict[str, Any], names: list[str]) -> dict[str, list[float]]:
    """Return the losses after each of the checkpoints, in one layout."""
    losses = {}
    for name in names:
        checkpoint = folder / name / f"checkpoints/iter_{NUM_BEFORE:07d}"
        run = start(config_of(folder, "other", parallel), checkpoint)
        assert run.first_step == NUM_BEFORE + 1
        losses[name] = losses_of(take_steps_after(run))
        destroy_groups()
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Return a folder with a run for each layout, and the losses of the steps after them."""
    folder = tmp_path_factory.mktemp("layouts")
    small_run(folder)
    [expected] = run_workers(1, save_at, folder, "one", {})
    for name, (world_size, parallel) in SAVED.items():
        for losses in run_workers(world_size, save_at, folder, name, parallel):
            assert losses == pytest.approx(expected[:NUM_BEFORE], rel=1e-5)
    return folder, expected[NUM_BEFORE:]


@pytest.mark.parametrize("at", LOADED)
def test_the_next_losses_are_the_same(at: str, saved: tuple[Path, list[float]]) -> None:
    folder, expected = saved
    world_size, parallel = LOADED[at]
    others = [name for name in SAVED if name != at]
    for losses in run_workers(world_size, load_at, folder, parallel, others):
        for name in others:
            assert losses[name] == pytest.approx(expected, rel=TOLERANCE), f"saved at {name}, loaded at {at}"


def test_one_process_loads_and_is_loaded(saved: tuple[Path, list[float]]) -> None:
    folder, expected = saved
    [losses] = run_workers(1, load_at, folder, {}, ["tp2_pp2", "tp2_cp2"])
    losses |= run_workers(2, load_at, folder, LOADED["dp2"][1], ["one"])[0]
    for name, values in losses.items():
        assert values == pytest.approx(expected, rel=TOLERANCE), name
