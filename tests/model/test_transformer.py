"""The fields of model.transformer: each changes what is trained, and every other one is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_sse.config import RunConfig
from megatron_sse.config.megatron import FIELDS, find_transformer_problem
from megatron_sse.convert.export import hf_settings
from megatron_sse.errors import UserError
from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.pretrained.open import HF
from megatron_sse.training.loop import Signals
from tests.model.support import run_config
from tests.training.support import small_run, start
from tests.workers import run_workers

VALUES = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "softmax_scale": 0.5}
# Its effect needs Transformer Engine; tests/config/test_context.py checks what is chosen.
WITH_ENGINE = {"cp_comm_type"}


def trained(folder: Path, name: str, fields: dict[str, Any]) -> list[torch.Tensor]:
    """Return the weights after a run of two steps."""
    training = {"steps": 2, "global_batch_size": 2, "precision": "fp32"}
    model, monitor = {"transformer": fields}, {"folder": str(folder / name)}
    run = start(small_run(folder, model=model, training=training, monitor=monitor))
    run.run(Signals())
    weights = [parameter.detach().clone() for chunk in run.trainer.chunks for parameter in chunk.parameters()]
    destroy_groups()
    return weights


def without_effect(folder: Path) -> list[str]:
    base = trained(folder, "base", {})
    found = []
    for name, value in VALUES.items():
        weights = trained(folder, name, {name: value})
        if all(torch.equal(old, new) for old, new in zip(base, weights, strict=True)):
            found.append(name)
    return found


def test_each_field_changes_the_weights(tmp_path: Path) -> None:
    assert set(VALUES) | WITH_ENGINE == set(FIELDS)
    small_run(tmp_path)
    assert run_workers(1, without_effect, tmp_path) == [[]]


def with_fields(fields: dict[str, Any]) -> RunConfig:
    model = {"num_layers": 2, "hidden_size": 32, "vocab_size": 64, "layers": "sse, softmax"}
    heads = {"sse": {"num_heads": 2, "head_dim": 16}, "softmax": {"num_heads": 2}}
    return run_config(model | heads | {"transformer": fields})


def test_every_other_field_is_refused() -> None:
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert names > set(FIELDS)
    for name in names - set(FIELDS):
        problem = find_transformer_problem(with_fields({name: True}))
        assert problem is not None and "allowed nothing: " in problem.text


def test_a_scale_cannot_be_exported() -> None:
    with pytest.raises(UserError, match="^model.transformer.softmax_scale: got 0.5, allowed null: no Hugging Face"):
        hf_settings(with_fields({"softmax_scale": 0.5}), HF)
