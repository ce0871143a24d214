"""The errors of all ranks of a layout put together, and what is too much."""

from dataclasses import dataclass, field
from math import inf

import torch

from megatron_sse.check_parallel.layouts import Layout
from megatron_sse.check_parallel.probe import EMBEDDING, OUTPUT, layer_row
from megatron_sse.check_parallel.step import RankErrors

# About ten times what fp32 does to a small model's layouts (docs/check_parallel.md has the numbers).
TOLERANCE = 1e-5
# Deep models and terms that cancel: a layout changes a tensor less than twice as much as moved weights do.
NOISE_FACTOR = 10.0


@dataclass
class Result:
    """Errors of one layout by tensor: outputs by row, gradients by parameter, scalars by name; inf where a part was on
    no rank. moved: tokens with other unpinned picks, None without routers. failure: a rank's traceback.
    """

    layout: Layout
    outputs: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    moved: int | None = None
    failure: str = ""

    def errors(self) -> dict[str, float]:
        """All errors by what a verdict calls the tensor."""
        outputs = {f"output of {row}": error for row, error in self.outputs.items()}
        return {**outputs, **{f"gradient of {name}": error for name, error in self.gradients.items()}, **self.scalars}

    def worst(self, limits: dict[str, float]) -> tuple[str, float, float]:
        """The tensor that comes closest to its limit or is farthest above it: name, error, limit."""
        errors = self.errors()
        name = max(errors, key=lambda name: errors[name] / limits[name])
        return name, errors[name], limits[name]

    def passes(self, limits: dict[str, float]) -> bool:
        """Whether no rank failed, every tensor is within its limit and no pick moved."""
        if self.failure:
            return False
        _, error, limit = self.worst(limits)
        return error <= limit and not self.moved


def merge(layout: Layout, ranks: list[RankErrors], expected: Result | None = None) -> Result:
    """The worst of all ranks. What `expected` has and no rank held whole counts as infinitely wrong."""
    result = Result(layout)
    for part in ("outputs", "gradients", "scalars"):
        merged: dict[str, float] = getattr(result, part)
        for rank in ranks:
            for name, error in getattr(rank, part).items():
                merged[name] = max(merged.get(name, 0.0), error)
        if expected is not None:
            merged.update({name: inf for name in getattr(expected, part) if name not in merged})
    for row in result.outputs:
        masks = [rank.seen[row] for rank in ranks if row in rank.seen]
        if not masks or not bool(torch.stack(masks).any(0).all()):
            result.outputs[row] = inf
    moved = [rank.moved for rank in ranks if rank.moved is not None]
    result.moved = sum(moved) if moved else None
    return result


def make_limits(noise: Result, tolerance: float | None) -> dict[str, float]:
    """The largest error allowed by tensor: `tolerance` for all, or the default that knows what rounding does."""
    if tolerance is not None:
        return dict.fromkeys(noise.errors(), tolerance)
    return {name: max(TOLERANCE, NOISE_FACTOR * error) for name, error in noise.errors().items()}


def row_of(parameter: str) -> str:
    """The table's row of a parameter."""
    if parameter.startswith("decoder.layers."):
        return layer_row(int(parameter.split(".")[2]))
    return EMBEDDING if parameter.startswith("embedding.") else OUTPUT
