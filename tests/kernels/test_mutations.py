"""Seeded bugs, each of which the comparison with the oracle must detect."""

from dataclasses import replace

import pytest
import torch

from megatron_sse.kernels import banks, chunks, registry, routing, scan
from tests.kernels.cases import Case, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import FORMS, attention, oracle

Patch = pytest.MonkeyPatch


def drop_the_reset(patch: Patch) -> None:
    make_grid = chunks.make_grid

    def without_reset(*args):
        grid = make_grid(*args)
        return replace(grid, chunks=replace(grid.chunks, segment_M=torch.zeros_like(grid.chunks.segment_M)))

    patch.setattr(chunks, "make_grid", without_reset)


def forget_the_write_mask(patch: Patch) -> None:
    patch.setattr(routing.Routes, "write_weight_TP", lambda self, weighted: self.read_weight_TP(weighted))


def do_not_transpose_in_backward(patch: Patch) -> None:
    patch.setattr(scan, "_transposed", lambda transition: transition)


def decay_what_is_written_at_once(patch: Patch) -> None:
    """k decays by its own token's gate too."""
    for name, act in registry.KERNELS.items():
        mutated = lambda q, k, v, g, *beta, act=act: act(q, k * g.exp(), v, g, *beta)  # noqa: E731
        patch.setitem(registry.KERNELS, name, mutated)


def ignore_the_write_weights(patch: Patch) -> None:
    of = banks.Picks.of
    patch.setattr(banks.Picks, "of", lambda routes, dtype, writes, *reads: of(routes, dtype, False, *reads))


def ignore_the_last_chunk(patch: Patch) -> None:
    waves = scan._waves
    patch.setattr(scan, "_waves", lambda pieces: waves(pieces)[:-1])


def read_where_is_written(patch: Patch) -> None:
    """Read where writes go, ignoring the reads' own router."""
    join = routing.join_routes
    patch.setattr("tests.kernels.cases.join_routes", lambda writes, reads: replace(join(writes, reads), first_reader=0))


def ties_to_the_higher_index(patch: Patch) -> None:
    def route(prob, num_writers, num_readers):
        ranked = prob.shape[-1] - 1 - prob.detach().flip(-1).sort(dim=-1, descending=True, stable=True).indices
        return routing.route(prob, num_writers, num_readers, ranked[:, : max(num_writers, num_readers)])

    patch.setattr("tests.kernels.cases.route", route)


MUTATIONS = {
    drop_the_reset: ("gla", "gdn", "kda"),
    forget_the_write_mask: ("gla", "gdn", "kda"),
    do_not_transpose_in_backward: ("gdn", "kda"),
    decay_what_is_written_at_once: ("gla", "gdn", "kda"),
    ignore_the_write_weights: ("gla", "gdn", "kda"),
    ignore_the_last_chunk: ("gla", "gdn", "kda"),
    ties_to_the_higher_index: ("gla", "gdn", "kda"),
    read_where_is_written: ("gla", "gdn", "kda"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mutate, recurrence",
    [pytest.param(m, r, id=f"{m.__name__}-{r}") for m, recurrences in MUTATIONS.items() for r in recurrences],
)
def test_a_seeded_bug_is_seen(mutate, recurrence: str, form: str, monkeypatch: Patch) -> None:
    routing = "ties" if mutate is ties_to_the_higher_index else "random"
    own = mutate is read_where_is_written
    case = Case(recurrence=recurrence, lengths=(40, 1, 70), routing=routing, num_readers=2, own_reads=own)
    expected = outputs_and_gradients(oracle, case, make_inputs(case))
    assert max(errors(outputs_and_gradients(attention(form), case, make_inputs(case)), expected).values()) < 1e-12
    mutate(monkeypatch)
    assert max(errors(outputs_and_gradients(attention(form), case, make_inputs(case)), expected).values()) > 1e-3
