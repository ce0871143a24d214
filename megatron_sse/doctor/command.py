"""The command `megatron-sse doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_sse.config import RunConfig, load_config
from megatron_sse.doctor.finding import BAD, GOOD, Finding
from megatron_sse.doctor.machine import check_disk, check_gpu, check_versions
from megatron_sse.doctor.run import check_checkpoints, check_layout, check_memory, check_token_files
from megatron_sse.errors import UserError

FAULT_EXIT = 1
_OF_A_RUN: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (
    check_layout,
    check_token_files,
    check_checkpoints,
    check_disk,
    check_memory,
)


def examine(path: str, overrides: list[str]) -> int:
    """Print what was found, a line for each check; 1 where something keeps the run from starting, else 0."""
    findings = []
    for finding in find_all(path, overrides):
        findings.append(finding)
        print(finding.line(), flush=True)
    faults = sum(finding.mark == BAD for finding in findings)
    print(f"{faults} of {len(findings)} checks failed" if faults else "nothing is wrong")
    return FAULT_EXIT if faults else 0


def find_all(path: str, overrides: list[str]) -> Iterator[Finding]:
    """All findings. What belongs to the machine is looked at even where the settings are wrong."""
    yield from check_versions()
    yield from check_gpu()
    try:
        config = load_config(path, overrides)
    except UserError as error:
        yield Finding(BAD, "settings", str(error))
        return
    yield Finding(GOOD, "settings", path)
    for check in _OF_A_RUN:
        yield from check(config)
