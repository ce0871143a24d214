"""Weights that modules have only while they compute, so that a forward pass takes the memory of one layer's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter


def lend_weights(module: Module, values: dict[Parameter, Callable[[], Tensor]]) -> None:
    """Give parameters their values when the module's forward pass starts, and what they have now when it ends.

    values: what returns the value of each parameter.
    """
    at_rest = {parameter: parameter.data for parameter in values}

    def give(*unused: Any) -> None:
        for parameter, value in values.items():
            parameter.data = value()

    def take(*unused: Any) -> None:
        for parameter, data in at_rest.items():
            parameter.data = data

    module.register_forward_pre_hook(give)
    module.register_forward_hook(take)


def compute_in_fp32(network: Module) -> None:
    """Let each module of a network compute with fp32 copies of its weights, which are made when they are needed."""
    for module in network.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype != torch.float32]
        if own:
            lend_weights(module, {parameter: partial(parameter.data.to, torch.float32) for parameter in own})
