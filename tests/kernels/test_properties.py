"""Properties for all inputs: separate documents, causality, no waiting for the device, a router that learns."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cases import UNEVEN, Case, Inputs, make_inputs, outputs_and_gradients, rms
from tests.kernels.implementations import FORMS, attention

RECURRENCES = ("gla", "gdn", "kda")
every_recurrence = pytest.mark.parametrize("recurrence", RECURRENCES)
every_form = pytest.mark.parametrize("form", FORMS)


def disturb(inputs: Inputs, tokens: slice) -> Inputs:
    """Return inputs with other queries, keys, values, gates and picks at the tokens."""

    def flip(x: Tensor) -> Tensor:
        x = x.clone()
        x[tokens] = x[tokens].flip(-1)
        return x

    return inputs.map(flip)


@every_form
@every_recurrence
def test_a_document_leaves_the_others_bitwise_alone(recurrence: str, form: str) -> None:
    case = Case(recurrence=recurrence, lengths=UNEVEN, num_writers=2, num_readers=2)
    inputs = make_inputs(case)
    document = 3
    start, end = inputs.offsets_D1[document : document + 2].tolist()
    before = outputs_and_gradients(attention(form), case, inputs)
    after = outputs_and_gradients(attention(form), case, disturb(inputs, slice(start, end)))
    for name, x in before.items():
        axis = (document, document + 1) if name == "final" else (start, end)
        assert torch.equal(x[: axis[0]], after[name][: axis[0]]) and torch.equal(x[axis[1] :], after[name][axis[1] :])
        assert not torch.equal(x[slice(*axis)], after[name][slice(*axis)])


@every_form
@every_recurrence
def test_what_is_not_finite_stays_in_its_document(recurrence: str, form: str) -> None:
    case = Case(recurrence=recurrence, lengths=UNEVEN)
    inputs = make_inputs(case)
    start, end = inputs.offsets_D1[3:5].tolist()
    inputs.v_THV.data[start] = float("inf")
    after = outputs_and_gradients(attention(form), case, inputs)
    for name, apart in (("o", (slice(start), slice(end, None))), ("final", (slice(3), slice(4, None)))):
        assert all(after[name][rows].isfinite().all() for rows in apart)
    assert not after["o"][start:end].isfinite().all()


@every_form
@every_recurrence
@pytest.mark.parametrize("first", [40, 63, 64, 97, 175])
def test_a_token_is_not_seen_by_earlier_ones(recurrence: str, form: str, first: int) -> None:
    case = Case(recurrence=recurrence, lengths=UNEVEN)
    inputs = make_inputs(case)
    before = outputs_and_gradients(attention(form), case, inputs)["o"]
    after = outputs_and_gradients(attention(form), case, disturb(inputs, slice(first, None)))["o"]
    assert torch.equal(before[:first], after[:first])
    assert not torch.equal(before[first], after[first])


class NoHostSync(TorchDispatchMode):
    """A mode that refuses operations whose result the host must wait for."""

    SYNCS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for arg in args if isinstance(arg, list) for i in arg
        )
        if name.strip("_").startswith(self.SYNCS) or name in self.SYNCS or by_mask:
            raise RuntimeError(f"host sync: {name}")
        return func(*args, **(kwargs or {}))


@every_form
@every_recurrence
def test_nothing_waits_for_the_device(recurrence: str, form: str) -> None:
    case = Case(recurrence=recurrence, lengths=UNEVEN, num_readers=2, num_value_heads=4, initial=True)
    inputs = make_inputs(case)
    with NoHostSync():
        outputs_and_gradients(attention(form), case, inputs)


@every_form
@every_recurrence
def test_shapes_follow_from_sizes_known_on_the_host(recurrence: str, form: str) -> None:
    """Meta tensors hold no values, so any look at a value raises."""
    case = Case(recurrence=recurrence, lengths=UNEVEN, num_writers=2, initial=True)
    inputs = make_inputs(case).to("meta")
    actual = outputs_and_gradients(attention(form), case, inputs)
    assert actual["o"].is_meta and actual["o"].shape == inputs.v_THV.shape


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.where(x > 0),
    ],
)
def test_a_host_sync_is_seen(sync) -> None:
    with NoHostSync(), pytest.raises(RuntimeError, match="host sync"):
        sync(torch.ones(3))


@pytest.mark.parametrize(("form", "options"), [("masks", {}), ("varlen", {"gate": "beta"})])
def test_unknown_forms_and_gates_are_refused(form: str, options: dict[str, str]) -> None:
    case = Case(lengths=(4,))
    inputs = make_inputs(case)
    with pytest.raises(KeyError):
        attention(form)(inputs, None, **options)


@every_form
def test_the_task_trains_the_router(form: str) -> None:
    """The delta rule's key normalisation cancels earlier weights, so only `post_norm` gives the router a gradient."""

    def router_gradient(**options) -> float:
        case = Case(lengths=(40, 30), num_writers=2, num_readers=2, **options)
        return rms(outputs_and_gradients(attention(form), case, make_inputs(case))["d prob"])

    gla = router_gradient(recurrence="gla")
    assert 0.3 < router_gradient(recurrence="gdn") / gla < 30
    assert router_gradient(recurrence="gdn", gate="reference") < 1e-3 * gla
