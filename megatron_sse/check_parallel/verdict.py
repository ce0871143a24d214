"""The verdict on a layout: errors of all its ranks merged, and the limits they must stay within."""

from dataclasses import dataclass, field
from math import inf

import torch

from megatron_sse.check_parallel.layouts import Layout
from megatron_sse.check_parallel.probe import EMBEDDING, OUTPUT, layer_row
from megatron_sse.check_parallel.step import RankErrors

# About ten times the largest error that fp32 rounding causes between layouts of a small model (numbers in
# docs/check_parallel.md).
TOLERANCE = 1e-5
# Deep models and terms that cancel amplify rounding. A correct layout changes a tensor less than twice as much as
# nudged weights do.
NOISE_FACTOR = 10.0


@dataclass
class Result:
    """Errors of one layout by tensor: outputs by row, gradients by parameter, scalars by name.

    An error is infinite where no rank held a part. moved: number of tokens with other unpinned picks; None without
    routers. failure: traceback of the rank that failed.
    """

    layout: Layout
    outputs: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    moved: int | None = None
    failure: str = ""

    def errors(self) -> dict[str, float]:
        """Return all errors by the name that the verdict gives the tensor."""
        outputs = {f"output of {row}": error for row, error in self.outputs.items()}
        return {**outputs, **{f"gradient of {name}": error for name, error in self.gradients.items()}, **self.scalars}

    def worst(self, limits: dict[str, float]) -> tuple[str, float, float]:
        """Return name, error and limit of the tensor whose error is largest relative to its limit."""
        errors = self.errors()
        name = max(errors, key=lambda name: errors[name] / limits[name])
        return name, errors[name], limits[name]

    def passes(self, limits: dict[str, float]) -> bool:
        """Check whether no rank failed, every tensor is within its limit and no pick moved."""
        if self.failure:
            return False
        _, error, limit = self.worst(limits)
        return error <= limit and not self.moved


def merge(layout: Layout, ranks: list[RankErrors], expected: Result | None = None) -> Result:
    """Return the worst errors of all ranks.

    Tensors that `expected` has count as infinitely wrong where the ranks together do not hold them completely.
    """
    result = Result(layout)
    for part in ("outputs", "gradients", "scalars"):
        merged: dict[str, float] = getattr(result, part)
        for rank in ranks:
            for name, error in getattr(rank, part).items():
                merged[name] = max(merged.get(name, 0.0), error)
        if expected is not None:
            merged.update({name: inf for name in getattr(expected, part) if name not in merged})
    for row in result.outputs:
        # Every token of a row must be held by some rank.
        masks = [rank.seen[row] for rank in ranks if row in rank.seen]
        if not masks or not bool(torch.stack(masks).any(0).all()):
            result.outputs[row] = inf
    moved = [rank.moved for rank in ranks if rank.moved is not None]
    result.moved = sum(moved) if moved else None
    return result


def make_limits(noise: Result, tolerance: float | None) -> dict[str, float]:
    """Return the largest error allowed for each tensor: `tolerance`, or by default a limit that follows its noise."""
    if tolerance is not None:
        return dict.fromkeys(noise.errors(), tolerance)
    return {name: max(TOLERANCE, NOISE_FACTOR * error) for name, error in noise.errors().items()}


def row_of(parameter: str) -> str:
    """Return the table's row for a parameter, whose name counts layers from 0."""
    if parameter.startswith("decoder.layers."):
        return layer_row(int(parameter.split(".")[2]) + 1)
    return EMBEDDING if parameter.startswith("embedding.") else OUTPUT
