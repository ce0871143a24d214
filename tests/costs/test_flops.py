"""Operations counted by hand: hidden 8, MLP 24, vocabulary 10, one layer; a multiply-add is two operations."""

import pytest

from megatron_sse.config import ModelConfig
from megatron_sse.costs.flops import forward_flops_per_token, mean_context, train_flops_per_token
from megatron_sse.costs.gpus import peak_flops

HIDDEN, VOCAB = 8, 10
OUTPUT_AND_MLP = 8 * 10 + 3 * 8 * 24
SOFTMAX = {"num_heads": 4, "head_dim": 2, "num_kv_heads": 2}


def model(layers, num_layers=1, softmax=None, **sse):
    sse = {"num_heads": 2, "head_dim": 3, "value_head_dim": 5, "num_value_heads": 4, "decay_low_rank": 7, **sse}
    return ModelConfig.model_validate(
        {
            "num_layers": num_layers,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 24,
            "vocab_size": VOCAB,
            "layers": layers,
            "sse": sse,
            "softmax": softmax or {},
        }
    )


# q and k are 8 x 6 each, v 8 x 20, out 20 x 8, the output gate 8 x 5 and 5 x 20.
LINEAR = 2 * 8 * 6 + 8 * 20 + 20 * 8 + 8 * 5 + 5 * 20
GLA_GATE = 8 * 7 + 7 * 6
GDN_GATES = 2 * 8 * 4
# Write strengths 8 x 4, decays 8 x 7 and 7 x (4 x 3).
KDA_GATES = 8 * 4 + 8 * 7 + 7 * 4 * 3
# There are 4 value heads with states of 3 x 5.
STATE = 4 * 3 * 5
# The router is 8 x 3; the sparse banks' queries and keys are 8 x 5 and 5 x 6 each.
SPARSE = 8 * 3 + 2 * (8 * 5 + 5 * 6)
TWO_READERS = {"num_partitions": 3, "num_writers": 1, "num_readers": 2}

CASES = {
    "gla": (model("gla"), LINEAR + GLA_GATE + 2 * STATE),
    "gdn": (model("gdn"), LINEAR + GDN_GATES + 3 * STATE),
    "kda": (model("kda"), LINEAR + KDA_GATES + 3 * STATE),
    "sse kda": (model("sse", recurrence="kda", **TWO_READERS), LINEAR + SPARSE + 2 * KDA_GATES + (2 * 2 + 3) * STATE),
    "sse without partitions": (model("sse", num_partitions=0), LINEAR + GLA_GATE + 2 * STATE),
    "sse gla": (model("sse", **TWO_READERS), LINEAR + SPARSE + 2 * GLA_GATE + (2 + 3) * STATE),
    "sse gdn": (model("sse", recurrence="gdn", **TWO_READERS), LINEAR + SPARSE + 2 * GDN_GATES + (2 * 2 + 3) * STATE),
    "two routers": (
        model("sse", own_read_router=True, **TWO_READERS),
        LINEAR + SPARSE + 8 * 3 + 2 * GLA_GATE + (2 + 3) * STATE,
    ),
    "constant decay": (model("gla", decay="constant"), LINEAR + 2 * STATE),
    "no output gate": (model("gla", output_gate=False), LINEAR - 8 * 5 - 5 * 20 + GLA_GATE + 2 * STATE),
    "no shared bank": (
        model("sse", shared_bank=False, **TWO_READERS),
        LINEAR + SPARSE + GLA_GATE + (1 + 2) * STATE,
    ),
    "convolution": (model("gla", short_convolution=4), LINEAR + 2 * 4 * 6 + GLA_GATE + 2 * STATE),
    "key from decay": (model("gla", key_map="one_minus_decay"), LINEAR - 8 * 6 + GLA_GATE + 2 * STATE),
    # q is 8 x 8, k and v 8 x 4 each, out 8 x 8; 4 heads of 2 score and sum over (1 + ... + 16) / 16 = 8.5 tokens.
    "softmax": (model("softmax", softmax=SOFTMAX), 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * 8 * 8.5),
    # A window of 4 covers 1, 2, 3, then 4 tokens for the other 13.
    "window": (model("softmax", softmax={**SOFTMAX, "window": 4}), 192 + 2 * 8 * (1 + 2 + 3 + 13 * 4) / 16),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_count_by_hand(name):
    config, products = CASES[name]
    assert forward_flops_per_token(config, 16) == pytest.approx(2 * (OUTPUT_AND_MLP + products), rel=1e-12)


def test_layers_add_up_and_backward_is_twice_the_forward():
    one, two = (forward_flops_per_token(model("gla", num_layers=n), 16) for n in (1, 2))
    assert two - one == pytest.approx(2 * (3 * 8 * 24 + CASES["gla"][1]))
    assert train_flops_per_token(model("gla"), 16) == 3 * one


def test_input_convolution():
    plain, convolved = (
        forward_flops_per_token(model("gla", 2).model_copy(update={"input_convolution": width}), 16) for width in (0, 4)
    )
    assert convolved - plain == 2 * 2 * 4 * HIDDEN


def test_sse_work_does_not_grow_with_the_number_of_partitions_but_for_the_router():
    few, many = (forward_flops_per_token(model("sse", num_partitions=n), 16) for n in (4, 64))
    assert many - few == 2 * 8 * 60


def test_mean_context_is_a_mean_over_tokens():
    for length, window in [(16, None), (16, 1), (16, 5), (16, 16), (16, 99)]:
        expected = sum(min(t + 1, window or length) for t in range(length)) / length
        assert mean_context(length, window) == expected


def test_peak_of_known_gpus_only():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA B200") == 2250e12
    assert peak_flops("CPU (2 threads a process)") is None
    assert peak_flops("NVIDIA GeForce RTX 3090") is None
