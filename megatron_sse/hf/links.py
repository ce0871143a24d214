"""Which tensors of another layout each tensor of ours is made of, and how: one description for both directions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_sse.checkpoint.full_weights import Weights
from megatron_sse.errors import UserError

_MAX_NAMED = 3


@dataclass(frozen=True)
class Part:
    """A tensor of the other layout."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """One tensor of ours, `ours`, and the tensors of the other layout that it holds, `theirs`.

    join: from theirs, in order, to ours. split: back. Both keep dtype and every bit.
    """

    ours: str
    theirs: tuple[Part, ...]
    join: Callable[..., Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]

    def shape(self) -> torch.Size:
        """Return the shape of our tensor."""
        return self.join(*(torch.empty(part.shape, device="meta") for part in self.theirs)).shape


def same(ours: str, theirs: str, *shape: int) -> Link:
    """Link the tensor as it is."""
    return Link(ours, (Part(theirs, shape),), lambda tensor: tensor, lambda tensor: [tensor])


def stacked(ours: str, *theirs: Part) -> Link:
    """Link theirs, one after the other along the first dim."""
    rows = [part.shape[0] for part in theirs]
    return Link(ours, theirs, lambda *tensors: torch.cat(tensors), lambda tensor: tensor.split(rows))


def by_head(ours: str, num_heads: int, *theirs: Part) -> Link:
    """Link theirs, each with the rows of `num_heads` heads; ours has the rows of each head together."""
    rows = [part.shape[0] // num_heads for part in theirs]

    def join(*tensors: Tensor) -> Tensor:
        return torch.cat([tensor.unflatten(0, (num_heads, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (num_heads, -1)).split(rows, dim=1)]

    return Link(ours, theirs, join, split)


def padded(ours: str, theirs: Part, num_rows: int) -> Link:
    """Link theirs, followed by rows of zeros up to `num_rows`."""
    missing = num_rows - theirs.shape[0]
    return Link(
        ours, (theirs,), lambda tensor: pad(tensor, (0, 0, 0, missing)), lambda tensor: [tensor[: theirs.shape[0]]]
    )


def to_ours(links: Iterable[Link], source: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors, one after the other."""
    for link in links:
        yield link.ours, link.join(*(source.get(part.name) for part in link.theirs))


def to_theirs(links: Iterable[Link], source: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the other layout, one after the other."""
    for link in links:
        for part, tensor in zip(link.theirs, link.split(source.get(link.ours)), strict=True):
            yield part.name, tensor


def check_shapes(
    expected: dict[str, tuple[int, ...]], found: Weights, where: str, unused: Callable[[str], bool] = lambda name: False
) -> None:
    """Raise UserError unless the names and shapes are those expected.

    unused: whether a name that is found and not expected may be left out.
    """
    there = {name: tuple(found.shape(name)) for name in found.keys() if name in expected or not unused(name)}
    lines = [
        f"{name} ({_show(there.get(name))} found, {_show(expected.get(name))} expected)"
        for name in sorted(expected.keys() | there.keys())
        if there.get(name) != expected.get(name)
    ]
    if lines:
        more = [f"and {len(lines) - _MAX_NAMED} more"] if len(lines) > _MAX_NAMED else []
        named = ", ".join(lines[:_MAX_NAMED] + more)
        raise UserError(f"{where}: got tensors that are not those of the model in its settings: {named}")


def _show(shape: tuple[int, ...] | None) -> str:
    return "not" if shape is None else " x ".join(map(str, shape)) or "one number"
