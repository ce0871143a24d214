"""Saving in the background, starting from weights, and the order of samples after a resume."""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.checkpoint.full_weights import read_weights, write_weights
from megatron_sse.checkpoint.shards import ShardWriter
from megatron_sse.checkpoint.state import held_by
from megatron_sse.checkpoint.verify import first_intact
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.training.loop import Run
from tests.checkpoint.support import save, take_steps, train_and_save, whole_state
from tests.convert.support import convert
from tests.data.files import write_tokens
from tests.training.support import cpu, small_run, start
from tests.workers import run_workers

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"}


def train_while_saving(folder: Path, parallel: dict[str, Any]) -> list[str]:
    """Start a save after step 2, write it after step 4, load it, and return what differs from step 2."""
    run = start(small_run(folder, training=TRAINING, parallel=parallel))
    take_steps(run, 2)
    before = whole_state(run)
    begin, ShardWriter.start = ShardWriter.start, lambda self: None  # type: ignore[method-assign]
    try:
        run.saver.start(2, run.consumed_samples, background=True)
    finally:
        ShardWriter.start = begin  # type: ignore[method-assign]
    run.first_step = 3
    take_steps(run, 4)
    assert not torch.equal(whole_state(run)["0.module.embedding.word_embeddings.weight"], next(iter(before.values())))
    run.saver._save.shards.write()  # type: ignore[union-attr]
    run.saver.finish()
    destroy_groups()
    again = start(run.config, folder / "run/checkpoints/iter_0000002")
    assert (again.first_step, again.consumed_samples) == (3, 8)
    after = whole_state(again)
    return [name for name in before if not name.startswith("rng") and not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("parallel", [{}, {"distributed_optimizer": True}], ids=str)
def test_what_is_saved_is_the_state_at_the_start_of_the_save(tmp_path: Path, parallel: dict[str, Any]) -> None:
    small_run(tmp_path)
    assert run_workers(2, train_while_saving, tmp_path, parallel) == [[], []]


def start_from_weights(folder: Path, weights: Path, sections: dict[str, Any]) -> tuple[int, dict[str, torch.Tensor]]:
    config = small_run(folder, **sections)
    run = Run(config, start(config).groups, cpu(), None, first_intact([weights], hashes=True))
    # This creates the moments, as happens before a save.
    list(held_by(run.trainer.optimizer))
    return run.first_step, whole_state(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_starts_from_weights(tmp_path: Path, precision: str) -> None:
    """A run starts from a full or a weights-only checkpoint, with the moments of a new run."""
    sections = {"training": TRAINING | {"precision": precision}, "parallel": {"tensor": 2}}
    small_run(tmp_path)
    run_workers(2, train_and_save, tmp_path, {"training": TRAINING}, None, 2, True)
    trained = tmp_path / "run/checkpoints/iter_0000002"
    source = read_weights(trained)
    alone = tmp_path / "weights"
    alone.mkdir()
    write_weights(alone, small_run(tmp_path), ((name, source.get(name)) for name in source.keys()))
    for folder in (trained, alone):
        for first_step, state in run_workers(2, start_from_weights, tmp_path, folder, sections):
            assert first_step == 1
            norm = state["0.module.decoder.final_layernorm.weight"]
            assert torch.equal(norm, source.get("decoder.final_layernorm.weight").to(norm.dtype))
            assert all(not tensor.any() for name, tensor in state.items() if name.startswith("moments"))
    for error in run_workers(2, resume_from_weights_alone, tmp_path, alone):
        assert re.match("checkpoint.resume: .*/weights holds only weights; give a run's checkpoint", error)


def resume_from_weights_alone(folder: Path, weights: Path) -> str:
    with pytest.raises(Exception, match="only weights") as raised:
        start(small_run(folder), weights)
    return str(raised.value)


def samples_of(folder: Path, sections: dict[str, Any], resume: Path | None, last_step: int) -> list[list[int]]:
    """Return the first tokens of all sequences that this rank trains on, by step; save a checkpoint at the end."""
    run = start(small_run(folder, **sections), resume)
    batches, _ = build_data_iterators(run.stage, run.groups, run.consumed_samples)
    seen = []
    for _ in range(run.first_step, last_step + 1):
        taken = [next(batches) for _ in range(run.trainer.num_micro_batches)]
        first = [int(token) for batch in taken for token in batch.tokens_BL[:, 0]]
        # Other context ranks hold later parts of the sequences.
        seen.append(first if run.groups.cp.rank() == 0 else [])
        run.consumed_samples += run.config.training.global_batch_size
    save(run, last_step)
    destroy_groups()
    return seen


@pytest.mark.parametrize("after", [{"context": 2}, {}], ids=str)
@pytest.mark.parametrize("last_step", [2, 3])
def test_the_order_of_samples_continues(tmp_path: Path, after: dict[str, Any], last_step: int) -> None:
    """The order continues at another data-parallel or context size, within and at the end of an epoch (F33, F34)."""
    length, num_samples = 16, 12
    # Each sample begins with a unique token.
    tokens = [(1 + place // length) if place % length == 0 else 0 for place in range(num_samples * length + 1)]
    write_tokens(str(tmp_path / "train"), [tokens])
    sections = {"training": TRAINING}
    [whole] = run_workers(1, samples_of, tmp_path, sections, None, 8)
    assert sorted(sum(whole[:3], [])) == list(range(1, 13)) and whole[:3] != whole[3:6]
    run_workers(1, samples_of, tmp_path, sections, None, last_step)
    checkpoint = tmp_path / f"run/checkpoints/iter_{last_step:07d}"
    resumed = run_workers(2, samples_of, tmp_path, sections | {"parallel": after}, checkpoint, 8)
    for step, expected in enumerate(whole[last_step:]):
        assert sorted(sum((ranks[step] for ranks in resumed), [])) == sorted(expected)


def saved_folder(folder: Path, train: Any) -> Path:
    """Save the checkpoint of a run before its first step."""
    folder.mkdir()
    data = {"train": train, "sequence_length": 128}
    sections = {"model": {"vocab_size": 300}, "monitor": {"folder": str(folder / "run")}}
    run = start(small_run(folder, data=data, **sections))
    run._enter(run.stages[0])
    save(run, 0)
    return folder / "run/checkpoints/iter_0000000"


def test_texts_made_while_training_are_of_byte_tokens(tmp_path: Path) -> None:
    """Runs on generated texts record the byte tokenizer for export; other tasks have no tokenizer."""
    needle, mqar = {"needle": {"digits": 3}}, {"mqar": {"pairs": 4, "keys": 8, "values": 6}}
    [saved] = run_workers(1, saved_folder, tmp_path / "needle", [mqar, needle])
    described = json.loads((saved / "tokens.json").read_text())
    assert (described["tokenizer"], described["end"]) == ("bytes", 256)
    assert convert(str(saved), str(tmp_path / "exported")) == 0
    assert len(json.loads((tmp_path / "exported/tokenizer.json").read_text())["model"]["vocab"]) == 256
    [saved] = run_workers(1, saved_folder, tmp_path / "mqar", mqar)
    assert not (saved / "tokens.json").exists()


def test_every_torch_load_is_restricted() -> None:
    """No source file unpickles freely: every torch.load is restricted, and the index has a list of allowed names."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in files.split() if not name.startswith("tests/") and (ROOT / name).exists()]
    loads = 0
    for name in names:
        for call in (node for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            # Messages between check-parallel's own processes are not files.
            assert not function.startswith("pickle.load") or name == "megatron_sse/check_parallel/processes.py", name
            assert function != "pickle.Unpickler" or name == "megatron_sse/checkpoint/index.py", name
            if function == "torch.load":
                loads += 1
                assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only") == "True", name
    assert loads >= 2
