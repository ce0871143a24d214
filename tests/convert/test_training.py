"""Conversion of training checkpoints of any layout, and training from converted weights."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_sse.parallel.groups import init_groups
from megatron_sse.training.loop import Run
from tests.checkpoint.support import save, take_steps
from tests.convert.support import assert_same_tensors, convert
from tests.training.support import cpu, small_run, start
from tests.workers import run_workers

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "layers": "sse, softmax",
    "tie_embeddings": True,
    # Rows that pad the vocabulary affect the loss but are not converted.
    "vocab_multiple": 32,
    "sse": {"recurrence": "gdn", "num_heads": 2, "head_dim": 8, "num_value_heads": 4, "short_convolution": 4},
    "softmax": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "qkv_bias": True},
}


def save_new(folder: Path, name: str, sections: dict[str, Any]) -> None:
    """Save the checkpoint of a run before its first step."""
    run = start(small_run(folder, model=MODEL, monitor={"folder": str(folder / name)}, **sections))
    save(run, 0)


def first_steps(folder: Path, weights: Path | None, sections: dict[str, Any]) -> list[float]:
    """Return the losses of two steps, from a checkpoint's weights or from initial ones as in save_new."""
    model = MODEL | ({} if weights is None else {"init_std": 0.5})
    config = small_run(folder, model=model, **sections)
    parallel = config.parallel
    run = Run(config, init_groups(parallel.tensor, parallel.pipeline), cpu(), None, weights)
    return [losses["loss"] for losses, _ in take_steps(run, 2)]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"distributed_optimizer": True}], ids=str)
def test_a_layout_of_training_does_not_matter(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """Checkpoints of all layouts convert to the same weights, since initial weights are equal."""
    small_run(tmp_path)
    run_workers(1, save_new, tmp_path, "one", {})
    run_workers(2, save_new, tmp_path, "two", {"parallel": parallel})
    for name in ("one", "two"):
        assert convert(str(tmp_path / name), str(tmp_path / f"{name}-hf")) == 0
    assert_same_tensors(tmp_path / "one-hf", tmp_path / "two-hf")


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=str)
def test_training_starts_from_what_was_converted(tmp_path: Path, parallel: dict[str, Any]) -> None:
    small_run(tmp_path)
    world_size, sections = len(parallel) + 1, {"parallel": parallel}
    run_workers(1, save_new, tmp_path, "one", {})
    assert convert(str(tmp_path / "one"), str(tmp_path / "hf")) == 0
    # As a trainer of transformers saves it.
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    exported.save_pretrained(tmp_path / "saved")
    assert convert(str(tmp_path / "saved"), str(tmp_path / "back")) == 0
    expected = run_workers(1, first_steps, tmp_path, None, {})[0]
    losses = run_workers(world_size, first_steps, tmp_path, tmp_path / "back", sections)[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert run_workers(1, first_steps, tmp_path, None, {"training": {"seed": 2}})[0] != pytest.approx(
        expected, rel=1e-4
    )


def test_a_bf16_run_starts_from_what_was_converted(tmp_path: Path) -> None:
    small_run(tmp_path)
    sections = {"training": {"precision": "bf16", "steps": 8, "global_batch_size": 4}}
    run_workers(1, save_new, tmp_path, "one", sections)
    assert convert(str(tmp_path / "one"), str(tmp_path / "hf"), tolerance=1e-4) == 0
    assert convert(str(tmp_path / "hf"), str(tmp_path / "back")) == 0
    expected = run_workers(1, first_steps, tmp_path, None, sections)[0]
    losses = run_workers(1, first_steps, tmp_path, tmp_path / "back", sections)[0]
    assert losses == pytest.approx(expected, rel=1e-2)
