"""The mixer split over a tensor group: outputs and all gradients are those of one rank."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import SSEConfig
from megatron_sse.model import mixer as mixer_module
from megatron_sse.model import router as router_module
from megatron_sse.model.initialize import own_part
from megatron_sse.parallel.groups import init_groups
from tests.model.support import HIDDEN, layout_of, make_mixer, rms_error
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
    "gla, no partitions": BASE | {"num_partitions": 0},
    "gdn, no partitions": BASE | {"recurrence": "gdn", "num_partitions": 0},
}


def run_mixer(cases: list[dict], sequence: bool, mutation: str | None = None) -> list[dict[str, Tensor]]:
    """Output and gradients of each case on this rank: output and input gradient whole, parameters' as parts with their
    names; runs on every rank of the world as one tensor group."""
    groups = init_groups(tensor=torch.distributed.get_world_size())
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            MUTATIONS[mutation](patch)
        return [_run_case(case, groups, sequence) for case in cases]


def _run_case(case: dict, groups: ProcessGroupCollection, sequence: bool) -> dict[str, Tensor]:
    settings = SSEConfig(**case)
    mixer = make_mixer(groups, settings, settings.recurrence, sequence)
    layout = layout_of(LENGTHS, padding=3)
    layout.layer_loss_scale = torch.tensor(2.0)
    generator = torch.Generator().manual_seed(2)
    shape = (layout.length, layout.batch_size, HIDDEN)
    hidden, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if mixer.config.sequence_parallel:
        hidden, grad = (x.chunk(groups.tp.size())[groups.tp.rank()].clone() for x in (hidden, grad))
    hidden.requires_grad_()
    out, _ = mixer(hidden, None, layout)
    out.backward(grad)

    results = {"output": out.detach(), "input": hidden.grad}
    if mixer.config.sequence_parallel:
        results = {name: _gather(x, groups) for name, x in results.items()}
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        if mixer.config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            # What Megatron-Core does for these at the end of a step.
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
        results[name] = parameter.grad
    if settings.num_partitions:
        results["balance loss"] = mixer.metrics.means()["balance_loss"]
    return results


def _gather(x: Tensor, groups: ProcessGroupCollection) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(groups.tp.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=groups.tp)
    return torch.cat(parts)


def _worst(case: dict, ours: list[dict[str, Tensor]], whole: dict[str, Tensor]) -> tuple[float, str]:
    """The largest RMS error over ranks and tensors, against the parts of one rank's results."""
    worst = (0.0, "")
    parameters = _parameters(case)
    for rank, results in enumerate(ours):
        assert results.keys() == whole.keys()
        for name, value in results.items():
            expected = whole[name]
            if name in parameters:
                expected = own_part(expected, parameters[name], rank, len(ours))
            worst = max(worst, (rms_error(value, expected), name))
    return worst


def _parameters(case: dict) -> dict[str, Tensor]:
    return dict(run_workers(1, _describe, case)[0])


def _describe(case: dict) -> dict[str, Tensor]:
    settings = SSEConfig(**case)
    mixer = make_mixer(init_groups(), settings, settings.recurrence)
    return {name: _Part(parameter) for name, parameter in mixer.named_parameters()}


class _Part:
    """How a parameter is split."""

    def __init__(self, parameter: Tensor):
        self.tensor_model_parallel = getattr(parameter, "tensor_model_parallel", False)
        self.partition_dim = getattr(parameter, "partition_dim", -1)
        self.partition_stride = getattr(parameter, "partition_stride", 1)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, dict[str, Tensor]]:
    [results] = run_workers(1, run_mixer, list(CASES.values()), False)
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("size", [2, 4])
def test_like_one_rank(size: int, sequence: bool, one_rank: dict[str, dict[str, Tensor]]) -> None:
    by_rank = run_workers(size, run_mixer, list(CASES.values()), sequence)
    for number, (name, case) in enumerate(CASES.items()):
        error, tensor = _worst(case, [results[number] for results in by_rank], one_rank[name])
        # The reference gate's task gradient of the router cancels; what is left of it is rounding.
        assert error < (1e-8 if case.get("gate") == "reference" else TOLERANCE), (name, tensor)


def _forget_router_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(router_module, "sum_gradient", lambda x, group: x)
    patch.setattr(
        router_module,
        "gather_from_sequence_parallel_region",
        lambda x, group: router_module_gather(x, tensor_parallel_output_grad=False, group=group),
    )


def _multiply_balance_loss(patch: pytest.MonkeyPatch) -> None:
    original = router_module.AttachLoss.backward
    patch.setattr(
        router_module.AttachLoss,
        "backward",
        staticmethod(lambda ctx, grad: (grad, original(ctx, grad)[1] * torch.distributed.get_world_size(), None)),
    )


def _balance_inside_heads(patch: pytest.MonkeyPatch) -> None:
    """The balance loss taken from the probabilities whose gradient is summed over the heads."""
    original = router_module.Router._balance_loss

    def wrong(self, own_LBN, routes, layout):
        prob = routes.prob_TN.unflatten(0, (layout.batch_size, layout.length)).transpose(0, 1)
        return original(self, prob, routes, layout)

    patch.setattr(router_module.Router, "_balance_loss", wrong)


def _forget_norm_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mixer_module, "sum_gradient", lambda x, group: x)


router_module_gather = router_module.gather_from_sequence_parallel_region
MUTATIONS = {
    "router sum forgotten": _forget_router_sum,
    "balance loss multiplied": _multiply_balance_loss,
    "balance loss inside the heads' region": _balance_inside_heads,
    "norm sum forgotten": _forget_norm_sum,
}


@pytest.mark.parametrize(
    ("mutation", "sequence"),
    [
        ("router sum forgotten", False),
        ("router sum forgotten", True),
        ("balance loss multiplied", False),
        ("balance loss multiplied", True),
        # Under sequence parallelism the gather's backward would give the same.
        ("balance loss inside the heads' region", False),
        ("norm sum forgotten", False),
        ("norm sum forgotten", True),
    ],
)
def test_seeded_bugs_are_seen(mutation: str, sequence: bool, one_rank: dict[str, dict[str, Tensor]]) -> None:
    by_rank = run_workers(2, run_mixer, [CASES["gla"]], sequence, mutation)
    error, _ = _worst(CASES["gla"], [results[0] for results in by_rank], one_rank["gla"])
    assert error > 1e-3


def test_mixer_of_each_kind_has_no_dead_parameters(one_rank: dict[str, dict[str, Tensor]]) -> None:
    for name, results in one_rank.items():
        for tensor, value in results.items():
            assert value.abs().max() > 0, (name, tensor)


def test_split_parameters_are_marked() -> None:
    parts = _parameters(CASES["gdn, value head groups"])
    assert {name for name, part in parts.items() if part.tensor_model_parallel} == {
        "A_log",
        "dt_bias",
        "conv_weight",
        "in_proj.weight",
        "query_lora.up.weight",
        "key_lora.up.weight",
        "output_gate.up.weight",
        "out_proj.weight",
    }
