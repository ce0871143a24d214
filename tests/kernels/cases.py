"""Random inputs of an SSE attention, and the comparison of two implementations on them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_sse.kernels import BankInputs, Routes, join_routes, route

# Documents of one token, of lengths below, at and above the chunk sizes, and of several chunks.
UNEVEN = (1, 37, 1, 64, 3, 70)
SHORT = (5, 1, 33)


@dataclass(frozen=True)
class Case:
    recurrence: str = "gla"
    lengths: tuple[int, ...] = SHORT
    num_heads: int = 2
    num_value_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    num_partitions: int = 4
    num_writers: int = 1
    num_readers: int = 1
    own_reads: bool = False  # reads have a router of their own: they read what the previous token would write
    routing: str = "random"  # random, one (all tokens pick one partition), gaps (some partitions stay empty), ties
    decay: str = "long"  # long (memory of thousands of tokens), one (exactly), underflow
    beta_max: float = 1.0
    gate: str = "post_norm"
    weight_writes: bool = True
    weight_reads: bool = True
    initial: bool = False

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(changed).replace("recurrence=", "") or "gla"


@dataclass
class Inputs:
    """Inputs of T tokens in D documents; leaves: bank tensors, values, router probabilities, initial states."""

    shared: BankInputs
    sparse: BankInputs | None
    v_THV: Tensor
    prob_TN: Tensor | None
    initial_DAHKV: Tensor | None
    offsets_D1: Tensor
    document_T: Tensor

    def leaves(self) -> dict[str, Tensor]:
        named = {"v": self.v_THV, "prob": self.prob_TN, "initial": self.initial_DAHKV}
        for name, bank in (("shared", self.shared), ("sparse", self.sparse)):
            if bank is not None:
                named |= {f"{name}.{f.name[0]}": getattr(bank, f.name) for f in fields(bank)}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return a copy with new leaves."""

        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else function(x.detach()).requires_grad_()

        banks = [b and BankInputs(*(leaf(getattr(b, f.name)) for f in fields(b))) for b in (self.shared, self.sparse)]
        v, prob, initial = leaf(self.v_THV), leaf(self.prob_TN), leaf(self.initial_DAHKV)
        return replace(self, shared=banks[0], sparse=banks[1], v_THV=v, prob_TN=prob, initial_DAHKV=initial)

    def to(self, device: str) -> "Inputs":
        moved = self.map(lambda x: x.to(device))
        return replace(moved, offsets_D1=self.offsets_D1.to(device), document_T=self.document_T.to(device))


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Return the fp64 inputs of a case."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(case.lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def bank() -> BankInputs:
        shape = (num_tokens, case.num_heads, case.key_dim)
        q, k = normal(*shape), normal(*shape)
        if case.recurrence == "gla":
            return BankInputs(q, k.softmax(-1), _decay(case.decay, normal(*shape)))
        channels = (case.key_dim,) if case.recurrence == "kda" else ()
        x = normal(num_tokens, case.num_value_heads, *channels)
        beta = normal(num_tokens, case.num_value_heads)
        return BankInputs(q, k, _decay(case.decay, x), case.beta_max * beta.sigmoid())

    initial = None
    if case.initial:
        state = (case.num_value_heads, case.key_dim, case.value_dim)
        initial = normal(len(case.lengths), 1 + case.num_partitions, *state)
    sizes = torch.tensor(case.lengths)
    inputs = Inputs(
        shared=bank(),
        sparse=bank() if case.num_partitions else None,
        v_THV=normal(num_tokens, case.num_value_heads, case.value_dim),
        prob_TN=_probabilities(case, normal(num_tokens, case.num_partitions)) if case.num_partitions else None,
        initial_DAHKV=initial,
        offsets_D1=torch.nn.functional.pad(sizes.cumsum(0), (1, 0)),
        document_T=torch.repeat_interleave(torch.arange(len(sizes)), sizes),
    )
    return inputs.map(torch.clone)


def _decay(kind: str, x: Tensor) -> Tensor:
    if kind == "one":
        return torch.zeros_like(x)
    long = logsigmoid(x + 4) / 16
    if kind == "underflow":
        # One step in four forgets everything, since exp(-2000) is zero in fp64; the other steps keep their memory.
        return torch.where(x > 0.7, -2000.0, long)
    return long


def _probabilities(case: Case, logits_TN: Tensor) -> Tensor:
    if case.routing == "one":
        logits_TN[:, case.num_partitions // 2] += 30
    if case.routing == "gaps":
        logits_TN[:, 1::2] -= 30
    if case.routing == "ties":
        logits_TN = torch.zeros_like(logits_TN)
    return logits_TN.softmax(-1)


def routes_of(case: Case, inputs: Inputs, tokens: Tensor | slice = slice(None)) -> Routes | None:
    """Return the routes of some tokens."""
    if inputs.prob_TN is None:
        return None
    prob_TN = inputs.prob_TN[tokens]
    if not case.own_reads:
        return route(prob_TN, case.num_writers, case.num_readers)
    read_TN = inputs.prob_TN.roll(1, 0)[tokens]
    reads = route(read_TN, case.num_readers, case.num_readers)
    return join_routes(route(prob_TN, case.num_writers, case.num_writers), reads)


def run(function: Callable, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return output and final states of `sse_attention` (given a form) or `reference_sse`."""
    options = {name: getattr(case, name) for name in ("gate", "weight_writes", "weight_reads")}
    return function(inputs, routes_of(case, inputs), initial_DAHKV=inputs.initial_DAHKV, **options)


def outputs_and_gradients(function: Callable, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return output, final states and the gradient of every leaf for fixed random output gradients."""
    o_THV, final = run(function, case, inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device) for x in (o_THV, final)]
    loss = (o_THV * weights[0]).sum() + (final * weights[1]).sum()
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"o": o_THV, "final": final} | {f"d {n}": g for n, g in zip(leaves, gradients, strict=True)}


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the RMS of each difference over the RMS of the expected tensor; every expected name must exist."""
    largest_gradient = max((rms(x) for name, x in expected.items() if name.startswith("d ")), default=0.0)
    result = {}
    for name, x in expected.items():
        size = rms(x)
        # Gradients that cancel keep the rounding of their terms, so they are compared with the largest gradient.
        if name.startswith("d ") and size < 1e-3 * largest_gradient:
            size = largest_gradient
        result[name] = rms(actual[name].double() - x.double()) / size
    return result
