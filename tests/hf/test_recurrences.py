"""The recurrences that exports carry: nothing of one document reaches another, finite or not."""

import pytest
import torch
from torch import Tensor

from megatron_sse.hf.exported.recurrences_megatron_sse import GDN_CHUNK, Documents, gdn, gla, kda

RUN = {"gla": gla, "gdn": gdn, "kda": kda}
# Documents of a sequence that begins inside the first one, which an earlier call left; chunks hold several.
LENGTHS = (5, 9, GDN_CHUNK, 3, 30)
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
    o, state = RUN[recurrence](*leaves.values(), Documents(document_L.expand(2, -1), torch.zeros(2, dtype=torch.long)))
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
        for name, value in (("v", torch.inf), ("k", torch.nan), ("g", torch.nan), ("v", 3e38)):
            inputs = {other: x.clone() for other, x in clean.items()}
            inputs[name][:, token] = value
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
