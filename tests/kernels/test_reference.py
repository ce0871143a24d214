"""The oracle against an independent recurrence over all banks at once."""

import pytest
import torch
from torch import Tensor, einsum

from tests.kernels.cases import UNEVEN, Case, Inputs, make_inputs, rms, run
from tests.kernels.implementations import oracle


def dense_recurrence(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Update all banks at every token, with masks for writes and reads and one key head per value head."""
    num_banks = 1 + case.num_partitions
    share = torch.ones(len(inputs.v_THV), num_banks, dtype=torch.float64)
    writes, reads = share.bool(), share.bool()
    if inputs.prob_TN is not None:
        share[:, 1:] = inputs.prob_TN
        rank_TN = inputs.prob_TN.argsort(-1, descending=True).argsort(-1)
        writes[:, 1:], reads[:, 1:] = rank_TN < case.num_writers, rank_TN < case.num_readers
    banks = [inputs.shared] + [inputs.sparse or inputs.shared] * case.num_partitions
    q, k, g = (torch.stack([getattr(b, name) for b in banks], 1) for name in ("q_THK", "k_THK", "g"))
    outputs, finals = [], []
    for document, (start, end) in enumerate(zip(inputs.offsets_D1[:-1], inputs.offsets_D1[1:], strict=True)):
        zeros = torch.zeros(num_banks, case.num_heads, case.key_dim, case.value_dim, dtype=torch.float64)
        state = zeros if inputs.initial_DAHKV is None else inputs.initial_DAHKV[document]
        for t in range(start, end):
            value = einsum("n,hv->nhv", share[t], inputs.v_THV[t])
            if case.recurrence == "gla":
                new = g[t].exp()[..., None] * state + einsum("nhk,nhv->nhkv", k[t], value)
                query = q[t]
            else:
                query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q[t], k[t]))
                beta = torch.stack([b.beta_TH[t] for b in banks])
                erase = torch.eye(case.key_dim) - einsum("nh,nhk,nhj->nhkj", beta, key, key)
                new = g[t].exp()[..., None, None] * (erase @ state) + einsum("nh,nhk,nhv->nhkv", beta, key, value)
            state = torch.where(writes[t][:, None, None, None], new, state)
            outputs.append(einsum("n,nhk,nhkv->hv", share[t] * reads[t], query, state) * case.key_dim**-0.5)
        finals.append(state)
    return torch.stack(outputs), torch.stack(finals)


@pytest.mark.parametrize("recurrence", ["gla", "gdn"])
@pytest.mark.parametrize(
    "options",
    [{"num_partitions": 0}, {"num_writers": 2, "num_readers": 2}, {"num_readers": 3, "initial": True, "value_dim": 5}],
    ids=str,
)
def test_the_oracle_is_the_definition(recurrence: str, options: dict) -> None:
    case = Case(recurrence=recurrence, lengths=UNEVEN, **options)
    inputs = make_inputs(case)
    for actual, expected in zip(run(oracle, case, inputs), dense_recurrence(case, inputs), strict=True):
        assert rms(actual - expected) < 1e-14 * rms(expected)
