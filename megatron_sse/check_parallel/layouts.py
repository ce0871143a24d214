"""The layouts that are compared with one process, and which of them a model allows."""

import difflib
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_sse.config import ParallelConfig, RunConfig, check_world_size, choose_layout
from megatron_sse.config.megatron import find_transformer_problem
from megatron_sse.errors import UserError

MAX_RANKS = 8
OWN = "own"
# Settings that differ from one process. Where sequence, layout and hand_off are missing, the user's values apply.
STANDARD: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "sequence": False},
    "tp2-sequence": {"tensor": 2, "sequence": True},
    "cp2": {"context": 2, "layout": "contiguous"},
    "cp2-zigzag": {"context": 2, "layout": "zigzag"},
    "cp4": {"context": 4},
    "pp2": {"pipeline": 2},
    "pp2-virtual": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {"data": 2},
    "cp2-tp2": {"context": 2, "tensor": 2},
    "cp2-pp2": {"context": 2, "pipeline": 2},
}


@dataclass(frozen=True)
class Layout:
    """A named layout; config is None where it is not possible, and reason says why."""

    name: str
    parallel: ParallelConfig
    config: RunConfig | None = None
    reason: str = ""


def num_ranks(parallel: ParallelConfig) -> int:
    """Return the number of processes of a layout."""
    return parallel.replica_size * (parallel.data or 1)


def choose_layouts(config: RunConfig, names: list[str] | None) -> dict[str, ParallelConfig]:
    """Return the layouts with these names, or all that differ from each other. Raises UserError for an unknown name.

    "own" is the user's layout, with one copy of the model unless parallel.data says more.
    """
    given = config.parallel
    if given.context > 1:
        # layout: auto is decided by the model's own sizes, not by the small ones.
        given = given.model_copy(update={"layout": "zigzag" if choose_layout(config)[0] else "contiguous"})
    length = config.data.sequence_length
    layouts = {name: _beside(given, changes, length) for name, changes in STANDARD.items()}
    own = _comparable(given, data=given.data or 1)
    if names is not None:
        layouts[OWN] = own
        for name in names:
            if name not in layouts:
                nearest = difflib.get_close_matches(name, layouts, n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise UserError(f"--layouts: got {name!r}, allowed {', '.join(layouts)}{hint}")
        return {name: layouts[name] for name in dict.fromkeys(names)}
    if num_ranks(own) > 1 and own not in layouts.values():
        layouts[OWN] = own
    return layouts


def one_process(given: ParallelConfig) -> ParallelConfig:
    """Return the layout of one process, with which the others are compared."""
    return _beside(given, {}, 1)


def _beside(given: ParallelConfig, changes: dict[str, Any], length: int) -> ParallelConfig:
    context, tensor = changes.get("context", 1), changes.get("tensor", 1)
    base: dict[str, Any] = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 1}
    # Without tensor ranks of their own, users have not chosen: the default for several applies, where it can.
    by_default = given.tensor == 1 and length % (context * tensor) == 0
    base["sequence"] = tensor > 1 and (given.sequence or by_default)
    # A zigzag layout needs at least two ranks.
    base |= {"layout": given.layout if context > 1 else "auto"}
    # Ranks count as two nodes, so that states also cross between nodes; with auto, where exscan is not all there is.
    two_nodes = given.hand_off == "two_level" or (given.hand_off == "auto" and context > 2)
    base |= {"context_per_node": max(1, context // 2) if two_nodes else None}
    return _comparable(given, **(base | changes))


def _comparable(given: ParallelConfig, **changes: Any) -> ParallelConfig:
    # Every rank must end with complete gradients, and states must not be rounded when they are sent.
    always = {"distributed_optimizer": False, "hand_off_wire": "fp32"}
    return given.model_copy(update=always | changes)


def fit_layout(
    name: str, parallel: ParallelConfig, values: dict[str, Any], given: dict[str, Any], num_gpus: int
) -> Layout:
    """Return the layout with the run of `values` (sections of settings), or with the reason why it is not possible.

    given: the user's settings, from which `values` were made; the reason names these where they do not fit either.
    """
    ranks = num_ranks(parallel)
    if ranks > MAX_RANKS:
        return Layout(name, parallel, reason=f"needs {ranks} ranks, at most {MAX_RANKS} are started")
    if num_gpus and ranks > num_gpus:
        reason = f"needs {ranks} ranks, found {num_gpus} GPUs (set CUDA_VISIBLE_DEVICES= to compare on the CPU)"
        return Layout(name, parallel, reason=reason)
    try:
        return Layout(name, parallel, make_config(values, parallel))
    except UserError as error:
        return Layout(name, parallel, reason=_refusal(given, parallel) or str(error))


def _refusal(values: dict[str, Any], parallel: ParallelConfig) -> str:
    try:
        make_config(values, parallel)
    except UserError as error:
        return str(error)
    return ""


def make_config(values: dict[str, Any], parallel: ParallelConfig) -> RunConfig:
    """Return the checked configuration of these settings in a layout. Raises UserError where they do not fit."""
    try:
        config = RunConfig.model_validate(values | {"parallel": parallel.model_dump()})
    except ValidationError as error:
        details = error.errors()[0]
        context = details.get("ctx", {})
        key = context.get("key", ".".join(map(str, details["loc"])))
        raise UserError(f"{key}: {context.get('text', details['msg'])}") from None
    problem = find_transformer_problem(config)
    if problem is not None:
        raise UserError(f"{problem.key}: {problem.text}")
    check_world_size(config, num_ranks(parallel))
    return config
