"""Weights-only checkpoints hold the same tensors as Megatron-Core's, and need no process groups."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_sse.checkpoint import full_weights as weights
from megatron_sse.checkpoint.full_weights import read_weights, write_weights
from megatron_sse.errors import UserError
from megatron_sse.model import build_model
from megatron_sse.parallel.groups import init_groups
from tests.model.support import cpu, run_config
from tests.workers import run_workers

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "vocab_size": 96,
    "layers": "sse, softmax",
    "sse": {"num_heads": 2, "head_dim": 16, "recurrence": "gdn", "short_convolution": 4},
    "softmax": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
}


def draw_and_load(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return a model's parameters, and those that Megatron-Core loaded from its file into another model."""
    groups = init_groups()
    (drawn,) = build_model(run_config(MODEL), groups, cpu())
    write_weights(folder, run_config(MODEL), drawn.named_parameters())
    (other,) = build_model(run_config(MODEL, training={"seed": 77}), groups, cpu())
    state = other.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    state = {name: entry for name, entry in state.items() if not name.endswith("_extra_state")}
    other.load_state_dict(dist_checkpointing.load({"model0": state}, str(folder))["model0"], strict=False)
    loaded = dict(other.named_parameters())
    return {name: (tensor.detach(), loaded[name].detach()) for name, tensor in drawn.named_parameters()}


def test_megatron_loads_what_was_written(tmp_path: Path) -> None:
    [tensors] = run_workers(1, draw_and_load, tmp_path)
    read = read_weights(tmp_path)
    assert tensors.keys() == set(read.keys()) and len(tensors) > 20
    for name, (drawn, loaded) in tensors.items():
        assert torch.equal(loaded, drawn) and torch.equal(read.get(name), drawn), name


def write_small(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tensors = {f"layer.{i}": torch.arange(10.0) + i for i in range(5)} | {"half": torch.ones(3, 2).bfloat16().t()}
    write_weights(folder, run_config(MODEL), tensors.items())
    return tensors


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 80)
    tensors = write_small(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.distcp"))) == 3
    read = read_weights(tmp_path / "a")
    assert list(read.keys()) == list(tensors)
    assert all(torch.equal(read.get(name), tensor) for name, tensor in tensors.items())
    assert read.shape("half") == (2, 3) and read.dtype("half") == torch.bfloat16


def test_damage_is_named_by_file(tmp_path: Path) -> None:
    write_small(tmp_path / "a")
    file = tmp_path / "a/__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:3000] + b"?" + whole[3001:])
    with pytest.raises(UserError, match="a/__0_0.distcp: its SHA-256"):
        read_weights(tmp_path / "a")
    file.write_bytes(whole)
    read = read_weights(tmp_path / "a")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a/__0_0.distcp: half cannot be read"):
        read.get("half")
    (tmp_path / "a/.metadata").unlink()
    with pytest.raises(UserError, match="a/.metadata: not found"):
        read_weights(tmp_path / "a")
    with pytest.raises(UserError, match="manifest.json: not found"):
        read_weights(tmp_path)
