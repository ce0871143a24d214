"""The command `megatron-sse doctor`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sse.doctor.finding import BAD, GOOD, Finding
from megatron_sse.doctor.request import Request
from megatron_sse.doctor.versions import check_versions
from megatron_sse.errors import UserError

FAULT_EXIT = 1


def run(request: Request) -> int:
    """Print one line for each check; returns the exit status, 1 if one failed."""
    findings = []
    for finding in find_all(request):
        findings.append(finding)
        print(finding.line(), flush=True)
    faults = sum(finding.mark == BAD for finding in findings)
    print(f"{faults} of {len(findings)} checks failed" if faults else "nothing is wrong")
    return FAULT_EXIT if faults else 0


def find_all(request: Request) -> Iterator[Finding]:
    """Yield all findings. The machine is checked even if the settings are wrong."""
    yield from check_versions()
    # Imported late: torch, for which the first line does not wait.
    import torch

    from megatron_sse.doctor import run as of_run
    from megatron_sse.doctor.machine import check_disk, check_gpu

    checks = [of_run.check_layout, of_run.check_token_files, of_run.check_problems, of_run.check_checkpoints]
    checks += [of_run.check_teacher, check_disk, of_run.check_memory]
    yield from check_gpu()
    if torch.cuda.is_available():
        # Imported late: Megatron-Core, which without a GPU is not needed.
        from megatron_sse.doctor.modules import check_attention, check_connections, check_modules

        yield from check_modules()
        checks += [check_attention, check_connections]
    try:
        config = request.run_config
    except UserError as error:
        yield Finding(BAD, "settings", str(error))
        return
    yield Finding(GOOD, "settings", request.config)
    for check in checks:
        yield from check(config)
