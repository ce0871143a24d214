"""Packages of the extras, which a run does not need."""

import importlib.util
import logging

from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)


def require(package: str, purpose: str, extra: str = "hf") -> None:
    """Raise UserError unless a package is installed. purpose: what it is for. extra: that of ours that brings it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{purpose}: needs {package}, which is not installed: pip install "megatron-sse[{extra}]"')


def has_pictures() -> bool:
    """Whether what draws pictures is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def warn_without_pictures() -> None:
    """Say that there will be no pictures, for commands that go on without."""
    if not has_pictures():
        logger.warning('no pictures: matplotlib is not installed: pip install "megatron-sse[plot]"')
