"""The trainer's loss: gradients of the plain form in every layout, and one distribution of the model everywhere."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.evaluation.perplexity import measure_losses, validation_files
from megatron_sse.evaluation.read import Reader
from megatron_sse.model.initialize import global_name, own_part
from tests.data.files import write_tokens
from tests.training.support import small_run, start
from tests.training.test_layouts import Part
from tests.workers import run_workers

VOCAB, LENGTH = 70, 16
# 26 of the 96 rows pad the vocabulary, and weights are large: a sum over all rows would be another one.
MODEL = {"num_layers": 2, "layers": "sse, softmax", "vocab_size": VOCAB, "vocab_multiple": 48, "init_std": 0.3}
MODEL |= {"hidden_size": 32, "sse": {"num_heads": 2, "head_dim": 8, "balance_loss": 0.0}}
MODEL |= {"softmax": {"num_heads": 2, "head_dim": 8}}
TRAINING = {"micro_batch_size": 2, "loss_chunk": 7}


def sections(tied: bool, parallel: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    model = MODEL | {"tie_embeddings": tied}
    # Gradients are compared as they are, not clipped.
    optimizer = {"clip_grad": 1e9}
    data = {"sequence_length": LENGTH}
    return {"model": model, "training": TRAINING, "parallel": parallel or {}, "data": data, "optimizer": optimizer}


def step_gradients(folder: Path, tied: bool, parallel: dict[str, Any]) -> tuple[float, dict[str, Part], int]:
    """Return the loss of a step, this rank's gradients by name in the complete model, and the tensor rank."""
    run = start(small_run(folder, **sections(tied, parallel)))
    batches, _ = build_data_iterators(run.stage, run.groups, 0)
    loss = run.trainer.train_step(batches).losses["loss"]
    return loss, gradients(run.trainer.chunks), run.groups.tp.rank()


def gradients(chunks: list[Any]) -> dict[str, Part]:
    return {
        global_name(name, chunk.module): Part(parameter)
        for chunk in chunks
        for name, parameter in chunk.module.named_parameters()
    }


def plain_gradients(folder: Path, tied: bool) -> tuple[float, dict[str, Tensor]]:
    """Return the same of one process by Megatron-Core's own output layer and torch's cross entropy."""
    run = start(small_run(folder, **sections(tied)))
    batches, _ = build_data_iterators(run.stage, run.groups, 0)
    [chunk] = run.trainer.chunks
    chunk.train()
    chunk.zero_grad_buffer()
    loss = tokens = 0.0
    for batch in islice(batches, run.trainer.num_micro_batches):
        logits_BLv = chunk(batch.tokens_BL, packed_seq_params=batch.layout)[..., :VOCAB]
        loss_BL = cross_entropy(logits_BLv.transpose(1, 2), batch.labels_BL, reduction="none")
        total = (loss_BL * batch.loss_mask_BL).sum()
        total.backward()
        loss, tokens = loss + float(total), tokens + float(batch.loss_mask_BL.sum())
    return loss / tokens, {name: part.gradient / tokens for name, part in gradients([chunk]).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a token file of documents of LENGTH + 1 tokens."""
    folder = tmp_path_factory.mktemp("loss")
    generator = np.random.default_rng(0)
    write_tokens(str(folder / "train"), [generator.integers(VOCAB, size=LENGTH + 1).tolist() for _ in range(32)])
    return folder


LAYOUTS = [(1, {}), (2, {"tensor": 2, "sequence": False}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_plain_form(folder: Path, tied: bool) -> None:
    """The embedding's own gradient is not lost, nor counted twice, where the output layer is tied to it."""
    [(expected_loss, expected)] = run_workers(1, plain_gradients, folder, tied)
    for world_size, parallel in LAYOUTS:
        for loss, parts, tensor_rank in run_workers(world_size, step_gradients, folder, tied, parallel):
            assert loss == pytest.approx(expected_loss, rel=1e-5), parallel
            for name, part in parts.items():
                # The last stage's copy of a tied embedding.
                whole = expected[name.replace("output_layer", "embedding.word_embeddings") if tied else name]
                own = own_part(whole, part, tensor_rank, parallel.get("tensor", 1))
                assert (part.gradient - own).norm() < 1e-5 * whole.norm(), (parallel, name)


def validate_and_evaluate(folder: Path) -> tuple[float, float]:
    """Return the validation loss of a run, and what `evaluate perplexity` measures on the same documents."""
    prefix = str(folder / "train")
    data = {"validation": [{"prefix": prefix}], "packing": "best_fit"}
    run = start(small_run(folder, **sections(False) | {"data": data | {"sequence_length": LENGTH}}))
    _, make_validation = build_data_iterators(run.stage, run.groups, 0)
    assert make_validation is not None
    said = run.trainer.validate(make_validation())["loss"]
    [chunk] = run.trainer.chunks
    [file] = validation_files(run.config, None)
    reader = Reader(chunk.module, VOCAB, batch=2, chunk=64)
    num_tokens = run.config.training.validation_batches * run.config.training.global_batch_size * (LENGTH + 1)
    return said, measure_losses(reader, file, LENGTH, num_tokens).loss


def test_validation_is_evaluation(folder: Path) -> None:
    """Each document is a sample of its own, so both predict the same tokens from the same tokens."""
    [(said, measured)] = run_workers(1, validate_and_evaluate, folder)
    assert said == pytest.approx(measured, rel=1e-5)
