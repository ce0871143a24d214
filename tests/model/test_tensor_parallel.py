"""A mixer split over a tensor group has the outputs and gradients of one rank."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_sse.config import SSEConfig
from megatron_sse.model import mixer as mixer_module
from megatron_sse.model import projections as projections_module
from megatron_sse.model import router as router_module
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.traffic import Traffic
from tests.model.mixer_runs import Results, run_mixers, worst_error
from tests.model.support import HIDDEN, layout_of, make_mixer
from tests.workers import run_workers

LENGTHS = [[5, 27], [32], [1, 1, 30]]
TOLERANCE = 1e-12
BASE = {"num_heads": 4, "head_dim": 4, "value_head_dim": 6, "num_partitions": 3, "balance_loss": 1.0}

CASES = {
    "gla": BASE,
    "gla, two writers, one reader": BASE | {"num_writers": 2, "num_readers": 1, "form": "mask"},
    "gla, value head groups": BASE | {"num_value_heads": 8, "short_convolution": 4},
    "gla, row-sparse keys, no gate": BASE | {"key_map": "topk_softmax", "key_topk": 2, "output_gate": False},
    "hgrn2": BASE | {"key_map": "one_minus_decay", "short_convolution": 2},
    "constant decay": BASE | {"decay": "constant", "query_map": "softmax", "weight_writes": False},
    "no decay": BASE | {"decay": "none", "weight_reads": False},
    "gdn": BASE | {"recurrence": "gdn", "num_readers": 2, "negative_eigenvalues": True},
    "gdn, value head groups": BASE | {"recurrence": "gdn", "num_value_heads": 8, "short_convolution": 3},
    "gdn, reference gate": BASE | {"recurrence": "gdn", "gate": "reference"},
    "gdn, weights on beta": BASE | {"recurrence": "gdn", "gate": "beta"},
    "gla, no shared bank": BASE | {"shared_bank": False, "input_convolution": 4, "weight_scale": 3.0},
    "gla, two routers": BASE | {"own_read_router": True, "num_readers": 2},
    "gdn, two routers, mask": BASE | {"recurrence": "gdn", "own_read_router": True, "num_writers": 2, "form": "mask"},
    "gdn, no shared bank": BASE | {"recurrence": "gdn", "shared_bank": False},
    "gla, no partitions": BASE | {"num_partitions": 0},
    "kda": BASE | {"recurrence": "kda", "num_value_heads": 8, "short_convolution": 3, "negative_eigenvalues": True},
    "kda, no partitions": BASE | {"recurrence": "kda", "num_partitions": 0},
    "gdn, no partitions": BASE | {"recurrence": "gdn", "num_partitions": 0},
}
RUNS = [(case, LENGTHS) for case in CASES.values()]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Results]:
    [results] = run_workers(1, run_mixers, RUNS)
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("size", [2, 4])
def test_like_one_rank(size: int, sequence: bool, one_rank: dict[str, Results]) -> None:
    by_rank = run_workers(size, run_mixers, RUNS, 1, sequence)
    for number, (name, case) in enumerate(CASES.items()):
        error, tensor = worst_error([results[number] for results in by_rank], one_rank[name])
        # With the reference gate the router's task gradient cancels, and only rounding remains.
        assert error < (1e-8 if case.get("gate") == "reference" else TOLERANCE), (name, tensor)


def keep_own_gradient(parts: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    return tuple(gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group) for x in parts)


def forget_sum(patch: pytest.MonkeyPatch) -> None:
    """Leave unsummed the gradients of what enters the heads: those of the router and of low-rank pairs."""
    patch.setattr(projections_module, "sum_gradient", lambda x, group: x)
    patch.setattr(projections_module, "gather_tokens", keep_own_gradient)


def multiply_balance_loss(patch: pytest.MonkeyPatch) -> None:
    original = router_module.AttachLoss.backward

    def wrong(ctx, grad):
        grad, scale, _ = original(ctx, grad)
        return grad, scale * dist.get_world_size(), None

    patch.setattr(router_module.AttachLoss, "backward", staticmethod(wrong))


def balance_inside_heads(patch: pytest.MonkeyPatch) -> None:
    """Take the balance loss from probabilities whose gradient is summed over heads, which counts it several times."""
    original = router_module.Router._balance_loss

    def wrong(self, own_LBN, routes, layout):
        prob = routes.prob_TN.unflatten(0, (layout.batch_size, layout.length)).transpose(0, 1)
        return original(self, prob, routes, layout)

    patch.setattr(router_module.Router, "_balance_loss", wrong)


def forget_norm_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mixer_module, "sum_gradient", lambda x, group: x)


@pytest.mark.parametrize(
    ("mutation", "sequence"),
    [
        (forget_sum, False),
        (forget_sum, True),
        (multiply_balance_loss, False),
        (multiply_balance_loss, True),
        # With sequence parallelism, the backward pass of the gather gives the same result.
        (balance_inside_heads, False),
        (forget_norm_sum, False),
        (forget_norm_sum, True),
    ],
)
def test_seeded_bugs_are_seen(mutation, sequence: bool, one_rank: dict[str, Results]) -> None:
    by_rank = run_workers(2, run_mixers, [(CASES["gla"], LENGTHS)], 1, sequence, False, mutation)
    error, _ = worst_error([results[0] for results in by_rank], one_rank["gla"])
    assert error > 1e-3


def test_no_parameter_is_dead(one_rank: dict[str, Results]) -> None:
    for name, results in one_rank.items():
        for tensor, result in results.items():
            assert result.value.abs().max() > 0, (name, tensor)


def split_parameters() -> set[str]:
    settings = SSEConfig(**CASES["gdn, value head groups"])
    mixer = make_mixer(init_groups(), settings)
    return {name for name, x in mixer.named_parameters() if getattr(x, "tensor_model_parallel", False)}


def test_split_parameters_are_marked() -> None:
    ups = {f"{part}.up.weight" for part in ("query_lora", "key_lora", "output_gate")}
    assert run_workers(1, split_parameters) == [
        ups | {"A_log", "dt_bias", "conv_weight", "in_proj.weight", "out_proj.weight"}
    ]


def count_collectives(sequence: bool) -> tuple[Counter[str], Counter[str]]:
    """Return the collectives of a mixer with router and five low-rank pairs, forward and backward."""
    groups = init_groups(tensor=dist.get_world_size())
    mixer = make_mixer(groups, SSEConfig(**CASES["gla"]), sequence)
    layout = layout_of([[32]])
    layout.layer_loss_scale = torch.tensor(1.0)
    length = 32 // groups.tp.size() if sequence else 32
    hidden = torch.ones(length, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    with Traffic() as forward:
        out, _ = mixer(hidden, None, layout)
    with Traffic() as backward:
        out.sum().backward()
    return forward.calls, backward.calls


def test_low_rank_pairs_share_a_collective() -> None:
    # One gather is the input projection's, made again in backward, one that of the low-rank pairs and the router; the
    # all-reduces are those of the balance loss and of the gradient of the norm's weight.
    forward, backward = run_workers(2, count_collectives, True)[0]
    assert forward == {"_allgather_base_": 2, "_reduce_scatter_base_": 1, "allreduce_": 1}
    assert backward == {"_allgather_base_": 2, "_reduce_scatter_base_": 3, "allreduce_": 1}
    # Without sequence parallelism: the gradients of the input, of what enters the heads, and of the norm's weight.
    forward, backward = run_workers(2, count_collectives, False)[0]
    assert forward == {"allreduce_": 1}
    assert backward == {"allreduce_": 4}
