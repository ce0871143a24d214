"""Validation on tasks: loss and share of correct answers, the same in every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sse.data.batch import make_batch
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.data.sources import open_validation
from megatron_sse.training.loop import Run
from tests.data.files import write_tokens
from tests.training.support import small_run, start
from tests.workers import run_workers

VOCAB = 15
# The second of two tensor ranks holds 5 tokens and 5 padding rows of the vocabulary.
MODEL = {"num_layers": 4, "vocab_size": VOCAB, "vocab_multiple": 20, "layers": "sse, softmax, sse, sse"}
# Large weights make answers differ.
MODEL |= {"init_std": 0.5, "sse": {"num_heads": 2, "head_dim": 8}, "softmax": {"num_heads": 2}}
MQAR = {"mqar": {"pairs": 8, "keys": 8, "values": 6}}
TRAINING = {"steps": 8, "precision": "fp32", "micro_batch_size": 4, "global_batch_size": 16, "validation_batches": 4}


def write_texts(folder: Path) -> str:
    prefix = str(folder / "train")
    generator = np.random.default_rng(0)
    write_tokens(prefix, [generator.integers(VOCAB, size=30).tolist() for _ in range(60)])
    return prefix


def validate(folder: Path, parallel: dict[str, Any], sources: list[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return validation's results, and those that one process counts sample by sample."""
    data = {"validation": sources, "sequence_length": 24}
    run = start(small_run(folder, model=MODEL, data=data, training=TRAINING, parallel=parallel))
    _, make_validation = build_data_iterators(run.stage, run.groups, 0)
    assert make_validation is not None
    said = run.trainer.validate(make_validation())
    return said, {} if parallel else count_one_by_one(run)


@torch.no_grad()
def count_one_by_one(run: Run) -> dict[str, float]:
    samples, found = open_validation(run.config), []
    losses = []
    [net] = [chunk.module for chunk in run.trainer.chunks]
    for position in range(TRAINING["global_batch_size"] * TRAINING["validation_batches"]):
        batch = make_batch([sample := samples[position]], reset_at_documents=True)
        counts_L = batch.loss_mask_BL[0] > 0
        losses += net(batch.tokens_BL, None, None, labels=batch.labels_BL, packed_seq_params=batch.layout).loss[
            0, counts_L
        ]
        # The labels of a text are its own tokens.
        if sample.labels_E1 is not None:
            logits_Lv = net(batch.tokens_BL, None, None, packed_seq_params=batch.layout)[0, :, :VOCAB]
            found += (logits_Lv.argmax(-1).numpy()[counts_L] == sample.labels_E1[1:][counts_L]).tolist()
    return {"loss": float(torch.stack(losses).mean()), "accuracy": sum(found) / len(found)}


LAYOUTS = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {"context": 2, "layout": "zigzag"}),
    (4, {"tensor": 2, "sequence": False, "context": 2}),
    (4, {"pipeline": 2, "data": 2}),
]


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Return a folder, and texts and a task for validation."""
    folder = tmp_path_factory.mktemp("accuracy")
    return folder, [{"prefix": write_texts(folder)}, MQAR]


@pytest.fixture(scope="module")
def one_process(blend: tuple[Path, list[Any]]) -> dict[str, float]:
    [(said, counted)] = run_workers(1, validate, blend[0], {}, blend[1])
    assert said == pytest.approx(counted, rel=1e-5) and 0.03 < said["accuracy"] < 0.3
    return said


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=str)
def test_like_one_process(
    world_size: int, parallel: dict[str, Any], blend: tuple[Path, list[Any]], one_process: dict[str, float]
) -> None:
    for said, _ in run_workers(world_size, validate, blend[0], parallel, blend[1]):
        assert said == pytest.approx(one_process, rel=1e-5)


def test_token_files_have_no_accuracy(blend: tuple[Path, list[Any]]) -> None:
    for said, _ in run_workers(2, validate, blend[0], {"data": 2}, blend[1][:1]):
        assert said.keys() == {"loss"}
