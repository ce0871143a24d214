"""What commands on the YAML file of a run have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_sse.config.load import load_config
from megatron_sse.config.run import RunConfig
from megatron_sse.options import Command, positional


@dataclass(frozen=True, kw_only=True)
class ConfigRequest(Command):
    """A request about the run that a YAML file describes."""

    config: str = positional("CONFIG", "YAML file; configs/reference.yaml documents every key")
    overrides: tuple[str, ...] = positional("section.key=value", "settings that override the file's", default=())

    @cached_property
    def run_config(self) -> RunConfig:
        """The settings of the run. Raises UserError."""
        return load_config(self.config, list(self.overrides))

    def check(self) -> None:
        self.run_config  # noqa: B018
