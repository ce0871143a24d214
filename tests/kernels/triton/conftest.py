"""Set-up of Triton's interpreter, which runs the kernels on the CPU: bf16 arithmetic corrected, scans made faster."""

import os
import sys

import numpy as np
import pytest
from triton.runtime import interpreter

_convert = interpreter._convert_float
_multiply = interpreter.InterpreterBuilder.create_dot


def _convert_float(x, source, target, rounding_mode):
    """Convert floats; fp32 to bf16 rounds to nearest, as on GPUs, where the original truncates."""
    if (source.name, target.name) == ("fp32", "bf16"):
        bits = np.ascontiguousarray(x).view(np.uint32)
        return ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    return _convert(x, source, target, rounding_mode)


def _widen(x):
    if x.dtype.scalar.name != "bf16":
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)


def _create_dot(self, a, b, *rest):
    """Multiply bf16 as fp32; the original would multiply the integers that hold the bits."""
    return _multiply(self, _widen(a), _widen(b), *rest)


def _generic_scan(self, input):
    """Scan row by row; the original calls the function for each element."""
    rows = zip(*(np.moveaxis(x.handle.data, self.axis, 0) for x in input), strict=True)
    types = [x.dtype for x in input]
    sums: list = []
    for row in rows:
        row = [self.to_tensor(x, dtype) for x, dtype in zip(row, types, strict=True)]
        sums.append(row if not sums else self.combine_fn.fn(*sums[-1], *row))
    stacked = (np.stack([x.handle.data for x in column], self.axis) for column in zip(*sums, strict=True))
    return [self.to_tensor(x, dtype) for x, dtype in zip(stacked, types, strict=True)]


@pytest.fixture(autouse=True)
def mended_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # Under ttsem (test_ttsem.py) it executes the kernels.
    if "ttsem" in sys.modules:
        return
    if os.environ.get("TRITON_INTERPRET") != "1" and not request.path.name.startswith("gpu_"):
        pytest.skip("needs TRITON_INTERPRET=1; gpu_attention.py runs what is compiled")
    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", _generic_scan)
