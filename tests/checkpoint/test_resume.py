"""A resumed run is bitwise the same as one that never stopped (F32)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.support import train_and_save
from tests.training.support import small_run
from tests.workers import run_workers

SHORT = {"steps": 100, "global_batch_size": 2, "micro_batch_size": 1, "precision": "fp32"}
DROPOUT = {"model": {"transformer": {"hidden_dropout": 0.1}}}

RESUMED = [
    # The long case: 100 steps against 50 + 50.
    (2, 50, {"parallel": {"distributed_optimizer": True}, **DROPOUT}),
    (1, 4, {}),
    (1, 4, {"training": SHORT | {"precision": "bf16"}}),
    (2, 4, {"training": SHORT | {"precision": "bf16"}, "parallel": {"tensor": 2}}),
    (2, 4, {"parallel": {"pipeline": 2}, **DROPOUT}),
]


@pytest.mark.parametrize(("world_size", "half", "sections"), RESUMED, ids=str)
def test_two_halves_equal_one_run_bitwise(tmp_path: Path, world_size: int, half: int, sections: dict[str, Any]) -> None:
    sections = {"training": SHORT, **sections}
    small_run(tmp_path)
    straight = run_workers(world_size, train_and_save, tmp_path, sections, None, 2 * half, False)
    run_workers(world_size, train_and_save, tmp_path, sections, None, half, True)
    checkpoint = tmp_path / f"run/checkpoints/iter_{half:07d}"
    resumed = run_workers(world_size, train_and_save, tmp_path, sections, checkpoint, 2 * half, False)
    for (trace, state), (resumed_trace, resumed_state) in zip(straight, resumed, strict=True):
        assert resumed_trace == trace[half:]
        assert state.keys() == resumed_state.keys() and len(state) > 20
        assert [name for name in state if not torch.equal(state[name], resumed_state[name])] == []


PRECISIONS = [("fp32", "bf16"), ("bf16", "fp32")]


@pytest.mark.parametrize(("before", "after"), PRECISIONS)
def test_precision_may_change(tmp_path: Path, before: str, after: str) -> None:
    """fp32 weights are loaded unchanged, whichever tensors hold them."""
    small_run(tmp_path)
    [(_, old)] = run_workers(1, train_and_save, tmp_path, {"training": SHORT | {"precision": before}}, None, 3, True)
    checkpoint = tmp_path / "run/checkpoints/iter_0000003"
    [(_, new)] = run_workers(
        1, train_and_save, tmp_path, {"training": SHORT | {"precision": after}}, checkpoint, 3, False
    )
    weights = [name for name in old if not name.startswith(("rng", "moments"))]
    assert weights
    for name in weights:
        # A bf16 weight is its fp32 copy after rounding.
        low = torch.bfloat16 if torch.bfloat16 in (old[name].dtype, new[name].dtype) else torch.float32
        assert torch.equal(old[name].to(low), new[name].to(low)), name
    if after == "fp32":
        assert any(not torch.equal(old[name].float(), new[name]) for name in weights)


@pytest.mark.parametrize(("before", "after"), [(128, 32), (32, 128)])
def test_padding_of_the_vocabulary_may_change(tmp_path: Path, before: int, after: int) -> None:
    """The embedding's 64 rows of real tokens are kept; padding rows follow vocab_multiple."""

    def sections(multiple: int) -> dict[str, Any]:
        model = {"vocab_multiple": multiple, "tie_embeddings": True}
        return {
            "training": SHORT,
            "model": model,
            "parallel": {"tensor": 2, "distributed_optimizer": multiple == after},
        }

    small_run(tmp_path)
    checkpoint = tmp_path / "run/checkpoints/iter_0000003"
    old = run_workers(2, train_and_save, tmp_path, sections(before), None, 3, True)
    new = run_workers(2, train_and_save, tmp_path, sections(after), checkpoint, 3, False)
    name = "0.module.embedding.word_embeddings.weight"
    whole_old, whole_new = (torch.cat([state[name] for _, state in ranks]) for ranks in (old, new))
    assert (len(whole_old), len(whole_new)) == (max(64, before), max(64, after))
    assert torch.equal(whole_old[:64], whole_new[:64])
