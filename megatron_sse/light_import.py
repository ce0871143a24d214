"""Import of Megatron-Core without TorchDynamo, Inductor and wandb.

torch.compile, with which Megatron-Core decorates its fused functions, imports the first two: 800 modules and 2 CPU
seconds, for functions that a run on CPUs never calls. Here the decorators compile at the first call instead.

Where wandb is installed, Megatron-Core imports it too, for inference engines and timers that no run uses: 240 modules
and 0.4 CPU seconds. It does without, and a run that reports to wandb imports it by itself.
"""

import functools
import gc
import importlib.abc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = "megatron.core"
OPTIONAL = "wandb"


def make_import_light() -> None:
    """Let Megatron-Core's import do without what no run needs: functions are compiled at their first call.

    Has no effect where Megatron-Core is imported already.
    """
    if PACKAGE not in sys.modules:
        sys.meta_path.insert(0, _Finder())


@contextmanager
def importing() -> Iterator[None]:
    """Import in the block without the garbage collector, which takes a fifth of the time of torch's modules.

    What there is afterwards stays out of all later collections: each would look through it, while other ranks wait.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the package where Python would, but loads it with another torch.compile and without wandb."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        # Whoever asks the module later (inspect, importlib.resources) needs the loader that knows its files.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        # The package's __init__ imports megatron.core.jit, which gives this function to all its modules.
        at_once, torch.compile = torch.compile, _compile_at_first_call  # type: ignore[assignment]
        is_hidden = OPTIONAL not in sys.modules
        if is_hidden:
            # Python takes a module that is None as one that is not installed.
            sys.modules[OPTIONAL] = None  # type: ignore[assignment]
        try:
            self.loader.exec_module(module)
        finally:
            torch.compile = at_once
            if is_hidden:
                del sys.modules[OPTIONAL]


def _compile_at_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
