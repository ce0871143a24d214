"""Triton's interpreter runs the kernels on the CPU; it is chosen when they are defined."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
