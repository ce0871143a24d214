"""Arithmetic on one device: tensors in, tensors out."""

from megatron_sse.kernels.conv import short_convolution
from megatron_sse.kernels.routing import Routes, route
from megatron_sse.kernels.segments import Edges
from megatron_sse.kernels.sse import BankInputs, sse_attention

__all__ = ["BankInputs", "Edges", "Routes", "route", "short_convolution", "sse_attention"]
