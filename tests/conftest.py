"""Set-up of all tests: a separate environment and working directory, and workers that stop at the end."""

import gc
import os
import signal
from collections.abc import Generator

import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels on the CPU; it must be chosen before Triton is imported. With
# one, tests of compiled kernels must not be interpreted unnoticed.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.workers import close_pools

# Variables that launchers and Slurm set would make tests join another run.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "NNODES", "NODE_RANK")
_LAUNCH_PREFIXES = ("MASTER_", "SLURM_", "PET_", "TORCHELASTIC_")
for _name in list(os.environ):
    if _name in _LAUNCH or _name.startswith(_LAUNCH_PREFIXES):
        del os.environ[_name]

# A shell without job control ignores SIGINT for background jobs, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take the longest start first, so that no process is left with one of them at the end.
_LONGEST = (
    "training/test_layouts.py",
    "tools/test_rehearse_gpu.py",
    "model/test_context_parallel.py",
    "kernels/triton/test_attention.py",
    "tests/test_docs.py",
    "launch/test_start_faults.py",
    "checkpoint/test_layouts.py",
    "inference/test_context.py",
    "planning/test_memory.py",
    "launch/test_multi_node.py",
    "tools/test_recall_study.py",
    "checkpoint/test_processes.py",
    "rl/test_layouts.py",
    "distill/test_distill.py",
    "distill/test_docs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; pytest-xdist keeps the order with --no-loadscope-reorder."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(_LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _working_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run all tests in an empty folder: relative paths must not reach runs/ or corpora/ of the checkout."""
    os.chdir(tmp_path_factory.mktemp("working_directory"))


def pytest_collection_finish(session: pytest.Session) -> None:
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    yield
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Take what has been imported out of the garbage collector, which otherwise takes most of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    close_pools()
