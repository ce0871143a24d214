"""The output layer and cross entropy in chunks against the plain form: all logits at once, in fp64, on one rank."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from megatron_sse.parallel import linear_cross_entropy
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.linear_cross_entropy import score_tokens
from megatron_sse.parallel.output_layer import OutputLayer
from tests.planning.live import LiveBytes
from tests.workers import run_workers

L, B, D, PADDED = 10, 3, 8, 24


@dataclass(frozen=True)
class Case:
    """What is computed. masked: "some" of the labels do not count, or "all". chunk: tokens."""

    vocab_size: int = 17
    chunk: int = 7
    sequence: bool = False
    main_grad: bool = False
    masked: str = "some"
    dtype: torch.dtype = torch.float64
    temperature: float = 1.0


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states [L, B, d], the complete weight [v, d], labels and their weights in the loss [L, B]."""
    generator = torch.Generator().manual_seed(0)
    hidden_LBd = torch.randn(L, B, D, generator=generator, dtype=torch.float64).to(case.dtype)
    weight_vd = torch.randn(PADDED, D, generator=generator, dtype=torch.float64).to(case.dtype)
    label_LB = torch.randint(case.vocab_size, (L, B), generator=generator)
    counts_LB = torch.rand(L, B, generator=generator, dtype=torch.float64)
    counts_LB[counts_LB < 0.4] = 0
    return hidden_LBd, weight_vd, label_LB, counts_LB * (case.masked != "all")


def plain(case: Case) -> dict[str, Tensor]:
    """Return losses, likeliest tokens and gradients by torch's autograd, from inputs of this dtype, in fp64."""
    hidden_LBd, weight_vd, label_LB, counts_LB = inputs(case)
    hidden_LBd, weight_vd = (x.double().requires_grad_() for x in (hidden_LBd, weight_vd))
    logits_LBv = (hidden_LBd @ weight_vd.t())[..., : case.vocab_size] / case.temperature
    loss_LB = cross_entropy(logits_LBv.flatten(0, 1), label_LB.flatten(), reduction="none").view_as(label_LB)
    (loss_LB * counts_LB).sum().backward()
    assert hidden_LBd.grad is not None and weight_vd.grad is not None
    return {
        "loss": loss_LB.detach(),
        "likeliest": logits_LBv.argmax(-1),
        "hidden": hidden_LBd.grad,
        "weight": weight_vd.grad,
    }


def chunked(case: Case) -> dict[str, Tensor]:
    """Return the same of this rank: its part of the hidden states' gradient and of the weight's."""
    group = init_groups(tensor=torch.distributed.get_world_size()).tp
    rank, size = group.rank(), group.size()
    hidden_LBd, weight_vd, label_LB, counts_LB = inputs(case)
    if case.sequence:
        hidden_LBd = hidden_LBd.chunk(size)[rank]
    hidden_LBd = hidden_LBd.clone().requires_grad_()
    weight_vd = torch.nn.Parameter(weight_vd.chunk(size)[rank].clone())
    layer = OutputLayer(case.vocab_size, group, case.sequence, case.chunk)
    if case.main_grad:
        wide = torch.promote_types(case.dtype, torch.float32)
        weight_vd.main_grad = torch.ones_like(weight_vd, dtype=wide)  # type: ignore[attr-defined]
    # As a model calls it: labels [B, L], transposed.
    label_LB = label_LB.t().contiguous().t()
    loss_LB, likeliest_LB, _ = score_tokens(hidden_LBd, weight_vd, label_LB, layer, True, case.temperature)
    assert likeliest_LB is not None
    (loss_LB * counts_LB).sum().backward()
    assert hidden_LBd.grad is not None and weight_vd.grad is not None
    weight_grad = weight_vd.grad
    if case.main_grad:
        # Nothing may be added a second time; with tied embeddings DDP adds what is in .grad.
        assert weight_vd.grad_added_to_main_grad and not weight_grad.any()  # type: ignore[attr-defined]
        weight_grad = weight_vd.main_grad - 1  # type: ignore[attr-defined]
    return {"loss": loss_LB.detach(), "likeliest": likeliest_LB, "hidden": hidden_LBd.grad, "weight": weight_grad}


def errors(case: Case, world_size: int) -> dict[str, float]:
    """Return the largest distance of any rank's part from the plain form, over the plain form's largest element."""
    expected, found = plain(case), dict.fromkeys(("loss", "likeliest", "hidden", "weight"), 0.0)
    for rank, parts in enumerate(run_workers(world_size, chunked, case)):
        for name, part in parts.items():
            whole = expected[name]
            is_split = name == "weight" or (name == "hidden" and case.sequence)
            own = whole.chunk(world_size)[rank] if is_split else whole
            distance = (part.double() - own.double()).abs().max() / whole.double().abs().max().clamp(min=1e-30)
            found[name] = max(found[name], float(distance))
    return found


CASES = [
    Case(),
    Case(chunk=1),
    Case(chunk=1000),
    Case(vocab_size=PADDED),
    Case(main_grad=True),
    Case(masked="all"),
    Case(temperature=0.6, main_grad=True),
    Case(vocab_size=5, chunk=4),  # of two ranks or more, some hold only rows that pad the vocabulary
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_form(case: Case, world_size: int) -> None:
    assert max(errors(case, world_size).values()) < 1e-12


@pytest.mark.parametrize("main_grad", [False, True])
def test_equals_the_plain_form_under_sequence_parallelism(main_grad: bool) -> None:
    assert max(errors(Case(sequence=True, main_grad=main_grad), 2).values()) < 1e-12


@pytest.mark.parametrize("sequence", [False, True])
def test_bf16_is_as_near_to_fp64_in_chunks_as_at_once(sequence: bool) -> None:
    """Chunks round what they add to the weight's gradient; summed in fp32 this stays within twice the error at once."""
    for main_grad in (False, True):
        at_once, in_chunks = (
            errors(Case(dtype=torch.bfloat16, chunk=chunk, sequence=sequence, main_grad=main_grad), 2)
            for chunk in (1000, 4)
        )
        for name, error in in_chunks.items():
            assert error <= 2 * at_once[name], (name, error, at_once[name])


def peak(group: ProcessGroup, tokens: int, vocab_size: int, chunk: int) -> int:
    """Return the bytes that one forward and backward pass holds at most beside its inputs."""
    hidden_LBd = torch.randn(tokens, 1, 4, requires_grad=True)
    weight_vd = torch.nn.Parameter(torch.randn(vocab_size, 4))
    weight_vd.main_grad = torch.zeros_like(weight_vd)  # type: ignore[attr-defined]
    label_LB = torch.randint(vocab_size, (tokens, 1))
    with LiveBytes() as counted:
        score_tokens(hidden_LBd, weight_vd, label_LB, OutputLayer(vocab_size, group, chunk=chunk)).loss.sum().backward()
    return counted.peak


def peaks(sizes: list[tuple[int, int, int]]) -> list[int]:
    group = init_groups().tp
    return [peak(group, *size) for size in sizes]


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """Doubled tokens add a few numbers per token, and never logits: the logits are those of one chunk."""
    vocab, chunk = 1000, 64
    [(few, many, at_once)] = run_workers(1, peaks, [(256, vocab, chunk), (1024, vocab, chunk), (1024, vocab, 1024)])
    logits = 4 * chunk * vocab
    assert logits < few < 1.3 * logits
    assert many - few < 768 * 100  # bytes per token: gradients, labels, sums
    assert at_once > 4 * 1024 * vocab


@pytest.mark.parametrize("fault", ["_mask", "_join"])
def test_faults_are_noticed(fault: str) -> None:
    """Without the mask, or without the sums of the other rank, the losses are wrong."""
    expected = plain(Case())["loss"]
    for found in run_workers(2, chunked_with_fault, Case(), fault):
        assert (found["loss"] - expected).abs().max() > 1e-3


def chunked_with_fault(case: Case, fault: str) -> dict[str, Tensor]:
    pass_on = {
        "_mask": lambda logits_Cv, real: logits_Cv,
        "_join": lambda log_sum_T, logit_T, group: (log_sum_T, logit_T),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, fault, pass_on[fault])
        return chunked(case)
