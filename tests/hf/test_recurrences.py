"""The recurrences that exports carry: nothing of one document reaches another, finite or not."""

import pytest
import torch
from torch import Tensor

from megatron_sse.hf.exported.recurrences_megatron_sse import BLOCK, CHUNK, gdn, gla, kda

RUN = {"gla": gla, "gdn": gdn, "kda": kda}
# Documents of a sequence that begins inside the first one, which an earlier call left; chunks hold several.
LENGTHS = (5, 9, 2 * CHUNK, 3, 30)
STARTS = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
NUM_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 3


def make_inputs(recurrence: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    rows = (sum(LENGTHS), NUM_HEADS)
    inputs = {"q": normal(*rows, KEY_DIM), "k": normal(*rows, KEY_DIM).softmax(-1), "v": normal(*rows, VALUE_DIM)}
    inputs["g"] = -normal(*rows, *(KEY_DIM,) * (recurrence != "gdn")).abs() / 9
    if recurrence != "gla":
        inputs["beta"] = normal(*rows).sigmoid()
    return inputs | {"state": normal(NUM_HEADS, KEY_DIM, VALUE_DIM)}


def run(recurrence: str, inputs: dict[str, Tensor], away: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return outputs and, of all documents but `away`, everything by name: outputs, last state and gradients."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    document_L = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    starts_L = document_L.diff(prepend=document_L[:1]) > 0
    o, state = RUN[recurrence](*leaves.values(), starts_L.expand(2, -1))
    others_L = document_L != away
    loss = o[:, others_L].square().sum() + (state.square().sum() if away < len(LENGTHS) - 1 else 0)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = {f"d {name}": x[:, others_L] for name, x in gradients.items() if name != "state"} | {"o": o[:, others_L]}
    if away > 0:
        found["d state"] = gradients["state"]
    return o, found | ({"state": state} if away < len(LENGTHS) - 1 else {})


@pytest.mark.parametrize("recurrence", RUN)
def test_what_is_not_finite_stays_in_its_document(recurrence: str) -> None:
    """Bit by bit, outputs, state and gradients; the document with it is nan from there on."""
    clean = make_inputs(recurrence)
    for document, start in enumerate(STARTS):
        token = start + LENGTHS[document] // 2
        _, expected = run(recurrence, clean, document)
        for name, value in (("v", torch.inf), ("k", torch.nan), ("g", torch.nan), ("v", 3e38), ("qk", 1e30)):
            inputs = {other: x.clone() for other, x in clean.items()}
            for part in name:
                inputs[part][:, token] = value
            o, actual = run(recurrence, inputs, document)
            assert all(torch.equal(actual[part], x) for part, x in expected.items()), (document, name)
            assert o[:, :token].isfinite().all() and not o[:, token : start + LENGTHS[document]].isfinite().any()
    inputs = clean | {"state": torch.full_like(clean["state"], torch.inf)}
    _, expected = run(recurrence, clean, 0)
    o, actual = run(recurrence, inputs, 0)
    assert all(torch.equal(actual[part], x) for part, x in expected.items())
    assert not o[:, : LENGTHS[0]].isfinite().any()


@pytest.mark.parametrize("recurrence", RUN)
def test_a_decay_to_nothing_is_a_number(recurrence: str) -> None:
    inputs = make_inputs(recurrence)
    token = STARTS[2] + 7
    inputs["g"][:, token] = -torch.inf
    o, others = run(recurrence, inputs, 2)
    inputs["g"][:, token] = -2000.0
    expected, of_others = run(recurrence, inputs, 2)
    assert torch.equal(o, expected) and all(torch.equal(others[name], x) for name, x in of_others.items())


@pytest.mark.parametrize("recurrence", RUN)
@pytest.mark.parametrize("length", [1, 3, CHUNK, BLOCK + CHUNK + 5])
def test_chunks_do_what_single_tokens_do(recurrence: str, length: int) -> None:
    inputs = {name: x.double() for name, x in make_inputs(recurrence).items()}
    state = inputs.pop("state")
    repeats = -(-length // sum(LENGTHS))
    rows = {name: torch.cat([x] * repeats, dim=1)[:, :length].requires_grad_() for name, x in inputs.items()}
    found, expected = [], []
    o, final = RUN[recurrence](*rows.values(), state, None)
    found += [o, final, *torch.autograd.grad(o.square().sum() + final.sum(), list(rows.values()))]
    outputs, alone = [], state
    for token in range(length):
        o_token, alone = RUN[recurrence](*(x[:, token : token + 1] for x in rows.values()), alone, None)
        outputs.append(o_token)
    o = torch.cat(outputs, dim=1)
    expected += [o, alone, *torch.autograd.grad(o.square().sum() + alone.sum(), list(rows.values()))]
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-10, atol=1e-12)
