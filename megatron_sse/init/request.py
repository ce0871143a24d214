"""The arguments of `megatron-sse init`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_sse.options import Command, option, positional


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """List the configurations that come with the package, or write one of them, with its comments, to a file of your
    own. A file that exists is never overwritten. docs/train.md explains what to change in it."""

    command, help = "init", "list the shipped configurations, or write one to a file"
    prints_result: ClassVar[bool] = True

    name: str | None = positional("NAME", "configuration to write; without it they are listed", default=None)
    output: str | None = option("FILE", "file to write", unset="NAME.yaml in this folder")
