"""Work of a layer that does not need the states of other ranks, done while these are on their way."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from megatron_sse.kernels.segments import Exchange

T = TypeVar("T")


class Meanwhile(Generic[T]):
    """A value that is computed once: when an exchange has started, or else when it is asked for."""

    def __init__(self, compute: Callable[[], T]):
        # The kernels start exchanges inside functions of autograd, where gradients are off.
        self.compute, self.has_gradients = compute, torch.is_grad_enabled()
        self.values: list[T] = []

    def get(self) -> T:
        """Return the value."""
        if not self.values:
            with torch.set_grad_enabled(self.has_gradients):
                self.values.append(self.compute())
        return self.values[0]

    def during(self, exchange: Exchange) -> Exchange:
        """Return the exchange, which then computes the value once it has started."""

        def begin(transition: Tensor, state: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            begun = exchange(transition, state)
            self.get()
            return begun

        return begin
