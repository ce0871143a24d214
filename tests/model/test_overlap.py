"""While states of other ranks are on their way, a layer does what does not need them: shown by the order of calls."""

from typing import Any

import pytest
import torch.distributed as dist

from megatron_sse.config import SSEConfig
from megatron_sse.kernels import norm, routing, scan, sse
from megatron_sse.kernels.triton import gla
from megatron_sse.kernels.triton.delta_rule import Kernels
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.sharding import ContextShard
from tests.model.mixer_runs import Results, forward_backward, run_mixers, worst_error
from tests.model.support import layout_of, make_mixer
from tests.workers import run_workers

SETTINGS = {"num_heads": 1, "head_dim": 8, "value_head_dim": 8, "num_partitions": 2}
# A document that fills ranks, and one that starts in the middle of one.
LENGTHS = [[30, 10]]
Trace = list[str]


def traced(recurrence: str, triton: bool) -> tuple[Trace, Trace, Results]:
    """Return what a layer calls on this rank, forward and backward, and its outputs and gradients."""
    groups = init_groups(context=dist.get_world_size())
    mixer = make_mixer(groups, SSEConfig(**SETTINGS, recurrence=recurrence))
    layout = layout_of(LENGTHS, shard=ContextShard(groups.cp.rank(), groups.cp.size()))
    trace: Trace = []
    with pytest.MonkeyPatch.context() as patch:
        _record(patch, trace, mixer)
        if triton:
            mixer = mixer.float()
            for module in (norm, routing, scan, sse):
                patch.setattr(module, "use_triton", lambda x: True)
        results = forward_backward(mixer, layout, groups)
    forward = trace[: trace.index("out")]
    return forward, trace[len(forward) + 1 :], results


def _record(patch: pytest.MonkeyPatch, trace: Trace, mixer: Any) -> None:
    """Write to `trace` the exchanges' starts and waits, the recurrence's kernels, the output gate and its gradient."""
    exchange, wait = dist.all_to_all_single, dist.Work.wait

    class Work:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            trace.append("wait")
            wait(self.work)

    def start(*args: Any, async_op: bool, **options: Any) -> Work:
        trace.append("start")
        return Work(exchange(*args, async_op=async_op, **options))

    patch.setattr(dist, "all_to_all_single", start)
    launch_gla, launch = gla._launch, Kernels.launch

    def record_gla(kernel: Any, *args: Any, **options: Any) -> None:
        trace.append(kernel.__name__.removesuffix("_kernel"))
        launch_gla(kernel, *args, **options)

    def record(kernels: Kernels, kernel: Any, *args: Any, **options: Any) -> None:
        trace.append(kernel.__name__.removesuffix("_kernel"))
        launch(kernels, kernel, *args, **options)

    patch.setattr(gla, "_launch", record_gla)
    patch.setattr(Kernels, "launch", record)
    mixer.output_gate.register_forward_hook(lambda *args: trace.append("gate"))
    # The first matrix is multiplied with those of the other low-rank pairs, before the states start.
    mixer.output_gate.up.weight.register_hook(lambda grad: trace.append("gate's gradient"))
    mixer.out_proj.register_forward_hook(lambda *args: trace.append("out"))


EXCHANGED = ["wait", "start", "wait"]
TORCH = (["start", "gate", *EXCHANGED], ["start", "gate's gradient", *EXCHANGED])
KERNELS = {
    "gla": (
        ["gla_summarize", "start", "gate", "gla_prepare", "gla_steep_scores", *EXCHANGED, "gla_output"],
        ["gate's gradient", "gla_summarize", "start", "gla_prepare", "gla_steep_scores", "gla_states"]
        + [*EXCHANGED, "gla_values", "gla_inter", "gla_intra", "gla_intra"],
    ),
    "gdn": (
        ["gdn_gates", "gdn_prepare", "gdn_summarize", "start", "gate", *EXCHANGED, "gdn_attend"],
        ["gate's gradient", "gdn_gates", "gdn_prepare", "gdn_states_backward", "start", "gdn_attend"]
        + [*EXCHANGED, "gdn_states_backward", "gdn_scores_backward", "gdn_keys_backward", "gdn_gates_backward"],
    ),
}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Results]:
    cases = [(SETTINGS | {"recurrence": recurrence, "balance_loss": 0.0}, LENGTHS) for recurrence in KERNELS]
    [results] = run_workers(1, run_mixers, cases)
    return dict(zip(KERNELS, results, strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("recurrence", KERNELS)
@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_what_is_done_while_states_travel(
    triton: bool, recurrence: str, size: int, one_rank: dict[str, Results]
) -> None:
    runs = run_workers(size, traced, recurrence, triton)
    expected = KERNELS[recurrence] if triton else TORCH
    for forward, backward, _ in runs:
        assert (forward, backward) == expected
    whole = {name: x for name, x in one_rank[recurrence].items() if name != "balance loss"}
    error, tensor = worst_error([results for *_, results in runs], whole)
    # In fp32 the kernels are off by 4e-7.
    assert error < (2e-6 if triton else 1e-12), tensor
