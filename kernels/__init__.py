"""Arithmetic on one device: tensors in, tensors out."""

from megatron_sse.kernels.banks import BankInputs, BankOutputs
from megatron_sse.kernels.conv import short_convolution
from megatron_sse.kernels.norm import gated_norm
from megatron_sse.kernels.routing import Routes, join_routes, route
from megatron_sse.kernels.segments import Edges
from megatron_sse.kernels.sse import sse_attention

__all__ = [
    "BankInputs",
    "BankOutputs",
    "Edges",
    "Routes",
    "gated_norm",
    "join_routes",
    "route",
    "short_convolution",
    "sse_attention",
]
