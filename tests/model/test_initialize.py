"""Initial weights: the embedding's standard deviation is a separate setting."""

import pytest

from megatron_sse.config.weights import Weight, model_weights
from megatron_sse.model import build_model
from megatron_sse.model.initialize import bind_weights
from megatron_sse.parallel.groups import init_groups
from tests.model.support import cpu, run_config
from tests.workers import run_workers

MODEL = {
    "num_layers": 1,
    "hidden_size": 64,
    "vocab_size": 256,
    "layers": "gla",
    "init_std": 0.1,
    "sse": {"num_heads": 2, "head_dim": 16},
}


def measured_std(settings: dict) -> dict[str, float]:
    [chunk] = build_model(run_config(MODEL | settings), init_groups(), cpu())
    return {name: float(parameter.std()) for name, parameter in chunk.named_parameters() if parameter.numel() > 4096}


@pytest.mark.parametrize(
    ("settings", "embedding"),
    [
        ({}, 0.1),
        ({"embedding_init_std": 1.0}, 1.0),
        ({"embedding_init_std": 1.0, "tie_embeddings": True}, 1.0),
    ],
)
def test_std(settings: dict, embedding: float) -> None:
    [found] = run_workers(1, measured_std, settings)
    assert found.pop("embedding.word_embeddings.weight") == pytest.approx(embedding, rel=0.05)
    assert ("output_layer.weight" in found) != settings.get("tie_embeddings", False)
    # With one layer, matrices that add to the residual stream are smaller by the root of 2.
    for name, std in found.items():
        smaller = 2**0.5 if name.endswith(("out_proj.weight", "linear_fc2.weight")) else 1
        assert std == pytest.approx(0.1 / smaller, rel=0.05), name


def missing_weight(name: str) -> str | None:
    """Return what binding says of a declared weight that the model does not have."""
    config, groups = run_config(MODEL), init_groups()
    [chunk] = build_model(config, groups, cpu(), draw=False)
    weights = {weight.name: weight for weight in (*model_weights(config.model), Weight(name, "gla", (7,)))}
    try:
        bind_weights(chunk, weights, groups)
    except AssertionError as error:
        return str(error)
    return None


def test_every_declared_weight_is_built() -> None:
    name = "decoder.layers.0.self_attention.extra"
    [found] = run_workers(1, missing_weight, name)
    assert found == f"declared in config/weights.py but not built: ['{name}']"
    # Layer 1 would be another pipeline stage's.
    assert run_workers(1, missing_weight, "decoder.layers.1.self_attention.extra") == [None]
