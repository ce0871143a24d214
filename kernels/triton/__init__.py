"""Triton kernels for GPUs, with the same arithmetic as the torch forms."""
