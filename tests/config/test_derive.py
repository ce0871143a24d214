"""Values derived from the settings, such as parameter counts, which must match the built model."""

from pathlib import Path

import pytest

from megatron_sse.config import load_config
from megatron_sse.config.derive import count_parameters, describe_run
from megatron_sse.errors import UserError
from megatron_sse.model import build_model
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import destroy_groups, init_groups
from tests.workers import run_workers

REFERENCE = Path(__file__).resolve().parents[2] / "configs" / "reference.yaml"
MODELS = [
    "",
    "model.sse.recurrence=gdn model.sse.num_value_heads=4",
    "model.sse.recurrence=kda model.sse.num_value_heads=4",
    "model.layers=[kda,softmax]",
    "model.layers=[sse,gla,gdn,2*gla,softmax] model.softmax.qk_norm=true model.softmax.num_kv_heads=2",
    "model.softmax.qkv_bias=true model.softmax.num_kv_heads=1",
    "model.sse.key_map=one_minus_decay model.sse.short_convolution=4 model.softmax.head_dim=24",
    "model.sse.decay=none model.sse.output_gate=false model.tie_embeddings=true model.sse.value_head_dim=16",
    "model.input_convolution=4 model.sse.shared_bank=false",
    "model.sse.shared_bank=false model.sse.recurrence=gdn",
    "model.sse.num_partitions=0 model.sse.short_convolution=4 model.ffn_hidden_size=100",
]


def built_sizes() -> list[int]:
    groups = init_groups()
    device = setup_device(0)
    sizes = []
    for overrides in MODELS:
        chunks = build_model(load_config(REFERENCE, overrides.split()), groups, device)
        sizes.append(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
    destroy_groups()
    return sizes


def test_counts_are_those_of_the_built_model() -> None:
    counted = [sum(count_parameters(load_config(REFERENCE, o.split()).model).values()) for o in MODELS]
    assert counted == run_workers(1, built_sizes)[0]


def test_description() -> None:
    config = load_config(REFERENCE, ["parallel.tensor=2"])
    text = "\n".join(describe_run(config, 4))
    for part in (
        "6 (5 sse, 1 softmax)",
        "tensor 2 x pipeline 1 x context 1 x data 2",
        "tensor ranks      split the tokens of norms, residual stream, router and low-rank projections",
        "1,024 (4 sequences of 256)",
        "2 per step",
    ):
        assert part in text
    with pytest.raises(UserError, match="got 3 processes"):
        describe_run(config, 3)
    whole = load_config(REFERENCE, ["parallel.tensor=2", "parallel.sequence=false"])
    assert "of all tokens, each (parallel.sequence is false)" in "\n".join(describe_run(whole, 4))
    with pytest.raises(UserError, match="^monitor.profile_ranks: got 4, allowed ranks below 4, the world size$"):
        describe_run(load_config(REFERENCE, ["monitor.profile_ranks=[0,4]", "monitor.profile_steps=[1,2]"]), 4)
