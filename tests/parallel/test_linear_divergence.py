"""The divergence from a teacher in chunks against the plain form: all logits at once, in fp64, on one rank."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from megatron_sse.parallel import linear_divergence
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.linear_divergence import Teacher, diverge
from megatron_sse.parallel.output_layer import OutputLayer
from tests.planning.live import LiveBytes
from tests.workers import run_workers

L, B, D, TEACHER_D, PADDED = 10, 3, 8, 6, 24


@dataclass(frozen=True)
class Case:
    """What is computed. chunk: tokens. same: the model says what the teacher says."""

    vocab_size: int = 17
    chunk: int = 7
    sequence: bool = False
    main_grad: bool = False
    temperature: float = 1.0
    same: bool = False
    dtype: torch.dtype = torch.float64


def inputs(case: Case) -> list[Tensor]:
    """Return hidden states [L, B, d] and weight [v, d] of the model, the teacher's, and weights in the loss [L, B]."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((L, B, D), (PADDED, D), (L, B, TEACHER_D), (PADDED, TEACHER_D), (L, B))
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    # Large logits, whose exponentials have to be kept from overflowing.
    drawn[3] *= 4
    if case.same:
        drawn[:2] = drawn[2:4]
    return [*(part.to(case.dtype) for part in drawn[:4]), drawn[4]]


def plain(case: Case) -> dict[str, Tensor]:
    """Return divergences and gradients by torch's autograd, from inputs of this dtype, in fp64."""
    hidden_LBd, weight_vd, teacher_LBe, weight_ve, counts_LB = (part.double() for part in inputs(case))
    hidden_LBd.requires_grad_()
    weight_vd.requires_grad_()
    log_q, log_p = (
        log_softmax((hidden @ weight.t())[..., : case.vocab_size] / case.temperature, -1)
        for hidden, weight in ((hidden_LBd, weight_vd), (teacher_LBe, weight_ve))
    )
    divergence_LB = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    (divergence_LB * counts_LB).sum().backward()
    assert hidden_LBd.grad is not None and weight_vd.grad is not None
    return {"divergence": divergence_LB.detach(), "hidden": hidden_LBd.grad, "weight": weight_vd.grad}


def chunked(case: Case) -> dict[str, Tensor]:
    """Return the same of this rank: its part of the hidden states' gradient and of the weight's."""
    group = init_groups(tensor=torch.distributed.get_world_size()).tp
    rank, size = group.rank(), group.size()
    hidden_LBd, weight_vd, teacher_LBe, weight_ve, counts_LB = inputs(case)
    if case.sequence:
        hidden_LBd, teacher_LBe = hidden_LBd.chunk(size)[rank], teacher_LBe.chunk(size)[rank]
    hidden_LBd = hidden_LBd.clone().requires_grad_()
    weight_vd = torch.nn.Parameter(weight_vd.chunk(size)[rank].clone())
    if case.main_grad:
        wide = torch.promote_types(case.dtype, torch.float32)
        weight_vd.main_grad = torch.ones_like(weight_vd, dtype=wide)  # type: ignore[attr-defined]
    layer = OutputLayer(case.vocab_size, group, case.sequence, case.chunk)
    teacher = Teacher(teacher_LBe, weight_ve.chunk(size)[rank], case.temperature)
    divergence_LB = diverge(hidden_LBd, weight_vd, teacher, layer)
    (divergence_LB * counts_LB).sum().backward()
    assert hidden_LBd.grad is not None and weight_vd.grad is not None
    weight_grad = weight_vd.main_grad - 1 if case.main_grad else weight_vd.grad  # type: ignore[attr-defined]
    return {"divergence": divergence_LB.detach(), "hidden": hidden_LBd.grad, "weight": weight_grad}


def errors(case: Case, world_size: int, fault: str | None = None) -> dict[str, float]:
    """Return the largest distance of any rank's part from the plain form, over the plain form's largest element."""
    expected = plain(case)
    found = dict.fromkeys(expected, 0.0)
    ranks = run_workers(world_size, chunked_with_fault if fault else chunked, case, *([fault] if fault else []))
    for rank, parts in enumerate(ranks):
        for name, part in parts.items():
            whole = expected[name]
            is_split = name == "weight" or (name == "hidden" and case.sequence)
            own = whole.chunk(world_size)[rank] if is_split else whole
            # Where both say the same, everything is 0.
            largest = 1.0 if case.same else whole.abs().max()
            found[name] = max(found[name], float((part.double() - own).abs().max() / largest))
    return found


CASES = [
    Case(),
    Case(chunk=1),
    Case(chunk=1000),
    Case(vocab_size=PADDED),
    Case(main_grad=True),
    Case(temperature=2.5),
    Case(temperature=0.1),
    Case(same=True),
    Case(vocab_size=5, chunk=4),  # of two ranks, one holds only rows that pad the vocabulary
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_form(case: Case, world_size: int) -> None:
    assert max(errors(case, world_size).values()) < 1e-12


@pytest.mark.parametrize("main_grad", [False, True])
def test_equals_the_plain_form_under_sequence_parallelism(main_grad: bool) -> None:
    assert max(errors(Case(sequence=True, main_grad=main_grad), 2).values()) < 1e-12


def test_bf16_is_as_near_to_fp64_in_chunks_as_at_once() -> None:
    at_once, in_chunks = (errors(Case(dtype=torch.bfloat16, chunk=chunk), 2) for chunk in (1000, 4))
    for name, error in in_chunks.items():
        assert error <= 2 * at_once[name], (name, error, at_once[name])


@pytest.mark.parametrize("fault", ["_scale", "_join"])
def test_faults_are_noticed(fault: str) -> None:
    """Without the mask of the padding, or without the sums of the other rank, the divergences are wrong."""
    assert errors(Case(), 2, fault)["divergence"] > 1e-3


def chunked_with_fault(case: Case, fault: str) -> dict[str, Tensor]:
    pass_on = {
        "_scale": lambda logits_Cv, real, temperature, dtype: logits_Cv.to(dtype) / temperature,
        "_join": lambda most_2T, sums_3T, group: (most_2T, sums_3T),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_divergence, fault, pass_on[fault])
        return chunked(case)


def peaks(lengths: list[int], vocab_size: int, chunk: int) -> list[int]:
    """Return the bytes that one forward and backward pass holds at most beside its inputs, by the number of tokens."""
    layer, found = OutputLayer(vocab_size, init_groups().tp, chunk=chunk), []
    for length in lengths:
        hidden_LBd = torch.randn(length, 1, 4, requires_grad=True)
        weight_vd = torch.nn.Parameter(torch.randn(vocab_size, 4))
        teacher = Teacher(torch.randn(length, 1, 4), torch.randn(vocab_size, 4), 1.0)
        with LiveBytes() as counted:
            diverge(hidden_LBd, weight_vd, teacher, layer).sum().backward()
        found.append(counted.peak)
    return found


def test_memory_is_that_of_one_chunk() -> None:
    """More chunks add a few numbers per token: no chunk's logits are there while the next one's are made."""
    vocab_size, chunk = 1000, 64
    [(one, many)] = run_workers(1, peaks, [64, 512], vocab_size, chunk)
    logits = 4 * chunk * vocab_size
    assert 3 * logits < one < 4.3 * logits
    assert many - one < 448 * 100  # bytes per token: gradients, sums
