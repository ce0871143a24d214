"""Parity with numbers of the authors' code: single layers in fp64, and logits of a complete model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_sse.config import SSEConfig
from megatron_sse.config.mixer import MixerSpec
from megatron_sse.hf.links import to_ours
from megatron_sse.hf.name_map import SSE_NAMES, mixer_links, model_links
from megatron_sse.model import build_model
from megatron_sse.parallel.layout import TokenLayout
from tests.model.support import HIDDEN, Tensors, cpu, make_mixer, rms_error, run_config

GOLDEN = Path(__file__).parent.parent / "golden"
# The golden data has router probabilities rounded to fp32.
TOLERANCE = 1e-5


@pytest.mark.parametrize("form", ["varlen", "mask"])
@pytest.mark.parametrize("name", ["sse_gla_n4_k1", "sse_gla_n6_k2_packed", "sse_gdn_n4_k1"])
def test_layer(name: str, form: str, groups: ProcessGroupCollection) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        theirs = json.loads(file.metadata()["config"])
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    recurrence = {"SSEGLA": "gla", "SSEGDN": "gdn"}[theirs["kind"]]
    settings = SSEConfig(
        recurrence=recurrence,
        num_heads=theirs["num_heads"],
        head_dim=theirs["head_dim"],
        num_partitions=theirs["num_sparse_partition"],
        num_writers=theirs["num_writer"],
        num_readers=theirs["num_reader"],
        gate="reference",
        balance_loss=1.0,
        form=form,
    )
    mixer = make_mixer(groups, settings)
    links = mixer_links(MixerSpec(settings, "sse"), HIDDEN)
    weights = dict(to_ours(links, Tensors(_with_prefix(tensors, "param."))))
    gradients = dict(to_ours(links, Tensors(_with_prefix(tensors, "grad."))))
    parameters = dict(mixer.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])

    hidden_LBd = tensors["input"].transpose(0, 1).clone().requires_grad_()
    starts = np.zeros((1, hidden_LBd.shape[0]), dtype=bool)
    if "cu_seqlens" in tensors:
        starts[0, tensors["cu_seqlens"][:-1].numpy()] = True
    layout = TokenLayout.from_starts(starts)
    layout.layer_loss_scale = torch.ones(())
    out, _ = mixer(hidden_LBd, None, layout)
    out.backward(tensors["grad_output"].transpose(0, 1))

    assert rms_error(out.transpose(0, 1), tensors["output"]) < TOLERANCE
    assert rms_error(mixer.metrics.means()["balance_loss"], tensors["aux_loss"]) < TOLERANCE
    assert rms_error(hidden_LBd.grad.transpose(0, 1), tensors["grad_input"]) < TOLERANCE
    for key, parameter in parameters.items():
        assert rms_error(parameter.grad, gradients[key]) < TOLERANCE, key


def test_model(groups: ProcessGroupCollection) -> None:
    theirs = json.loads((GOLDEN / "hf_sse_gla" / "config.json").read_text())
    model = {
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "ffn_hidden_size": theirs["intermediate_size"],
        "vocab_size": theirs["vocab_size"],
        "vocab_multiple": theirs["vocab_size"],
        "layers": "sse",
        "norm_epsilon": theirs["norm_eps"],
        "sse": {"num_heads": theirs["num_heads"], "head_dim": theirs["head_dim"]},
    }
    config = run_config(model, sequence_length=160)
    (chunk,) = build_model(config, groups, cpu())
    theirs = Tensors(load_file(GOLDEN / "hf_sse_gla" / "model.safetensors"))
    weights = dict(to_ours(model_links(config.model, SSE_NAMES), theirs))
    parameters = dict(chunk.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    expected = load_file(GOLDEN / "hf_sse_gla" / "expected.safetensors")
    layout = TokenLayout.from_starts(np.zeros(expected["input_ids"].shape, dtype=bool))
    logits = chunk(expected["input_ids"], None, None, packed_seq_params=layout)
    assert rms_error(logits, expected["logits"]) < 2e-6


def _with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
