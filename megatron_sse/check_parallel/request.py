"""The arguments of `megatron-sse check-parallel`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sse.config.request import ConfigRequest
from megatron_sse.errors import UserError
from megatron_sse.options import option


@dataclass(frozen=True, kw_only=True)
class Request(ConfigRequest):
    """Run one training step of a YAML file's model, made small, in several layouts, and compare each with one process.
    Exit status 1 where they differ. docs/check_parallel.md explains the output."""

    command, help = "check-parallel", "compare layouts with one process"

    as_is: bool = option(help="keep the model's sizes")
    layouts: str | None = option("LIST", "names of layouts, separated by commas", unset="all that differ")
    tolerance: float | None = option("X", "largest relative error of a tensor", unset="what rounding explains")
    json: Path | None = option("FILE", "file to write all numbers to", unset="")

    def check(self) -> None:
        super().check()
        if self.tolerance is not None and not self.tolerance >= 0:
            raise UserError(f"--tolerance: got {self.tolerance}, allowed a number from 0")
        if self.json is not None and self.json.is_dir():
            raise UserError(f"--json: {self.json} is a folder; give the path of a file")
        if self.json is not None and not self.json.parent.is_dir():
            raise UserError(f"--json: folder {self.json.parent} not found; create it first")

    def layout_names(self) -> list[str] | None:
        """Return the names of the layouts to compare, None for all."""
        return None if self.layouts is None else [name.strip() for name in self.layouts.split(",")]
