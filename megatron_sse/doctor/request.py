"""The arguments of `megatron-sse doctor`."""

from dataclasses import dataclass

from megatron_sse.config.request import ConfigRequest


@dataclass(frozen=True, kw_only=True)
class Request(ConfigRequest):
    """Check settings, token files, checkpoints, disk, versions and GPUs. Exit status 1 if a check fails.
    docs/doctor.md explains the checks."""

    command, help = "doctor", "find what would keep a run from starting"

    def check(self) -> None:
        # Wrong settings are a failed check, which does not keep the others from being made.
        pass
