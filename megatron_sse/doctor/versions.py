"""The versions of installed packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement

from megatron_sse.doctor.finding import BAD, GOOD, Finding

PACKAGE = "megatron-sse"


def check_versions(extra: str = "") -> Iterator[Finding]:
    """Compare installed packages with the requirements, or with those that an extra adds to them."""
    name = f"versions, {extra}" if extra else "versions"
    try:
        asked = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(BAD, name, f"{PACKAGE} is not installed; ./run.sh test --version installs it in place")
        return
    wrong, right = [], []
    for requirement in asked:
        if not _is_asked(requirement, extra) or (extra and _is_asked(requirement)):
            continue
        # A run starts without it; check_modules reports it.
        if requirement.name == "transformer-engine":
            continue
        problem = _problem(requirement)
        if problem is not None:
            wrong.append(problem)
        elif requirement.name in ("torch", "megatron-core", "triton"):
            right.append(f"{requirement.name} {importlib.metadata.version(requirement.name)}")
    if wrong:
        yield Finding(BAD, name, f"{'; '.join(wrong)}: ./run.sh test --version installs the tested ones")
    else:
        yield Finding(GOOD, name, ", ".join(right))


def _is_asked(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _problem(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version}, needed {requirement.specifier}"
