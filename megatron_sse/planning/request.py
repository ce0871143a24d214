"""The arguments of `megatron-sse plan`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_sse.config.request import ConfigRequest
from megatron_sse.costs.gpus import GPUS, GPUS_PER_NODE
from megatron_sse.errors import UserError
from megatron_sse.options import option

_MAX_GPUS = 1 << 20
_UNITS = {"GiB": 2**30, "GB": 1e9, "MiB": 2**20, "MB": 1e6}


@dataclass(frozen=True, kw_only=True)
class Request(ConfigRequest):
    """Print what a run needs, from its YAML alone: parameters, memory, operations, bytes sent, time. Exit status 1 if
    it does not fit. docs/plan.md explains the output."""

    command, help = "plan", "memory, bytes sent and time of a run"

    gpus: int | None = option("N", "number of GPUs", unset="as many as the layout needs")
    gpu: str = option("NAME", f"kind of GPU: {', '.join(GPUS)}", default="h100")
    memory: str | None = option("SIZE", "memory of a GPU, such as 80GiB", unset="that of the kind")
    tflops: float | None = option("X", "1e12 operations per second of a GPU", unset="those of the kind")
    bandwidth: float | None = option("X", "TB per second of a GPU's memory", unset="those of the kind")
    gpus_per_node: int = option("N", "GPUs of a machine", default=GPUS_PER_NODE)
    documents: int | None = option("N", "documents of a sequence", unset="as in the token files, or 1")
    search: bool = option(help="rank the layouts that fit")

    def check(self) -> None:
        super().check()
        numbers = {"gpus": self.gpus, "gpus-per-node": self.gpus_per_node, "documents": self.documents}
        for name, number in numbers.items():
            if number is not None and not 1 <= number <= _MAX_GPUS:
                raise UserError(f"--{name}: got {number}, allowed 1 to {_MAX_GPUS}")
        if self.gpu not in GPUS:
            raise UserError(f"--gpu: got {self.gpu}, allowed {', '.join(GPUS)}")
        for name, value in (("tflops", self.tflops), ("bandwidth", self.bandwidth)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name}: got {value}, allowed more than 0")
        if self.memory is not None:
            parse_bytes(self.memory)


def parse_bytes(text: str) -> float:
    """Return the number of bytes that 80GiB, 80GB, ... means. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text)
    if match is None or match[2] not in _UNITS or not 0 < float(match[1]) < 1e12:
        raise UserError(f"--memory: got {text}, allowed a number with {', '.join(_UNITS)}, such as 80GiB")
    return float(match[1]) * _UNITS[match[2]]
