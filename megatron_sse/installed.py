"""Packages of the extras, which a run does not need."""

import importlib.util

from megatron_sse.errors import UserError


def require(package: str, purpose: str, extra: str = "hf") -> None:
    """Raise UserError unless a package is installed. purpose: what it is for. extra: that of ours that brings it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{purpose}: needs {package}, which is not installed: pip install "megatron-sse[{extra}]"')
