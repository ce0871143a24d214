"""The choice, from the settings, of how softmax layers attend over context ranks."""

from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ValidationError

from megatron_sse.config import (
    ParallelConfig,
    attention_kind,
    choose_hand_off,
    choose_layout,
    ignored_settings,
    transformer_settings,
)
from tests.model.support import run_config

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "vocab_size": 64,
    "layers": "sse, softmax",
    "sse": {"num_heads": 2, "head_dim": 8},
}
HEADS = {"num_heads": 4, "num_kv_heads": 2}


def settings_of(
    softmax: dict, reset: bool = True, length: int = 64, given: dict | None = None, **sections: Any
) -> dict:
    config = run_config(
        MODEL | {"softmax": HEADS | softmax, "transformer": given or {}},
        data={"sequence_length": length, "reset_at_documents": reset},
        training={"precision": sections.get("precision", "bf16")},
        parallel={"context": sections.get("context", 2), "tensor": sections.get("tensor", 1)},
    )
    settings = transformer_settings(config)
    TransformerConfig(**settings)
    assert settings["cp_comm_type"] == attention_kind(config)
    return settings


@pytest.mark.parametrize(
    ("expected", "softmax", "others"),
    [
        ("p2p", {}, {}),
        ("p2p", {}, {"given": {"cp_comm_type": None}}),
        ("a2a", {}, {"given": {"cp_comm_type": "a2a"}}),
        ("all_gather", {}, {"given": {"cp_comm_type": "all_gather"}, "reset": False}),
        # p2p has no window, all_gather no packed documents, and a2a needs a head for each rank.
        ("a2a", {"window": 8}, {}),
        ("all_gather", {"window": 8}, {"reset": False}),
        ("a2a", {"window": 8}, {"reset": False, "length": 66}),
        (None, {"window": 8}, {"context": 4}),
        (None, {"window": 8}, {"tensor": 2}),
        (None, {"window": 8, "num_kv_heads": 1}, {}),
        ("all_gather", {"window": 8}, {"context": 4, "reset": False}),
        (None, {"head_dim": 20}, {}),
        (None, {}, {"precision": "fp32"}),
        (None, {}, {"precision": "fp32", "given": {"cp_comm_type": "p2p"}}),
        (None, {}, {"context": 1}),
    ],
)
def test_kind(expected: str | None, softmax: dict, others: dict) -> None:
    assert settings_of(softmax, **others)["cp_comm_type"] == expected


def test_no_softmax_layer() -> None:
    config = run_config(MODEL | {"layers": "sse"}, parallel={"context": 2})
    assert attention_kind(config) is None


def test_parts_of_an_input_convolution_lie_in_one_slot() -> None:
    odd = {"context": 2, "tensor": 3, "sequence": True}
    model = MODEL | {
        "layers": "softmax",
        "softmax": {"num_heads": 6, "head_dim": 8},
        "ffn_hidden_size": 192,
        "vocab_multiple": 3,
    }
    unpacked = {"sequence_length": 48, "reset_at_documents": False}
    assert choose_layout(run_config(model, data=unpacked, parallel=odd))[0]
    convolved = model | {"input_convolution": 4}
    assert not choose_layout(run_config(convolved, data=unpacked, parallel=odd))[0]
    with pytest.raises(ValidationError, match="allowed auto, contiguous with model.input_convolution"):
        run_config(convolved, data=unpacked, parallel=odd | {"layout": "zigzag"})


@pytest.mark.parametrize(
    ("expected", "gpus", "parallel"),
    [
        (("exscan", 8), 8, {"context": 8}),
        (("two_level", 8), 8, {"context": 16}),
        (("two_level", 4), 8, {"context": 8, "tensor": 2}),
        # A machine's GPUs all work on one context rank.
        (("exscan", 1), 8, {"context": 4, "tensor": 8}),
        # Groups of 12 begin in the middle of a machine.
        (("exscan", 1), 8, {"context": 12}),
        (("two_level", 3), 8, {"context": 12, "context_per_node": 3}),
        (("p2p", 8), 8, {"context": 16, "hand_off": "p2p"}),
    ],
)
def test_the_hand_off_fits_the_machines(expected: tuple[str, int], gpus: int, parallel: dict) -> None:
    assert choose_hand_off(ParallelConfig(**parallel), gpus) == expected


def test_context_per_node_counts_for_two_level_alone() -> None:
    """Elsewhere it is ignored, whatever it is: with one context rank, and by other algorithms."""
    for parallel in ({"context": 1}, {"context": 4, "hand_off": "exscan"}):
        config = run_config(MODEL | {"softmax": HEADS}, parallel=parallel | {"context_per_node": 8})
        assert choose_hand_off(config.parallel, 8) == ("exscan", min(8, parallel["context"]))
        assert any("parallel.context_per_node is ignored" in line for line in ignored_settings(config))
