"""Installed packages: their versions, and those of the extras, which a run does not need."""

import importlib.metadata
import importlib.util
import logging
import shutil
import sys
from pathlib import Path

from megatron_sse import __version__
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Return the versions that files of results and checkpoints name."""
    others = {name: importlib.metadata.version(name.replace("_", "-")) for name in ("torch", "megatron_core")}
    return {"megatron_sse": __version__, **others}


def require(package: str, purpose: str, extra: str = "hf") -> None:
    """Raise UserError unless a package is installed.

    purpose: what needs it. extra: the extra of this package that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{purpose}: needs {package}, which is not installed: pip install "megatron-sse[{extra}]"')


def find_program(name: str) -> str:
    """Return how to call a program of this environment from here: by its name where that finds it, else by its path."""
    own = Path(sys.executable).absolute().with_name(name)
    found = shutil.which(name)
    if not own.exists() or (found is not None and Path(found).absolute() == own):
        return name
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


def has_pictures() -> bool:
    """Check whether the library that draws pictures is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def warn_without_pictures() -> None:
    """Warn that there will be no pictures, for commands that continue without them."""
    if not has_pictures():
        logger.warning('no pictures: matplotlib is not installed: pip install "megatron-sse[plot]"')
