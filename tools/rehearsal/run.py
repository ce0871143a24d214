"""A rehearsed run of one rank."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.checkpoint import default_planner

import megatron_sse.checkpoint.save as save
from megatron_sse.config import RunConfig
from megatron_sse.tools.rehearsal.cuda import install_generators
from megatron_sse.tools.rehearsal.findings import Findings, Kind, Phase
from megatron_sse.tools.rehearsal.ranks import install_ranks
from megatron_sse.tools.rehearsal.watch import Watch
from megatron_sse.training import loop
from megatron_sse.training.step import Trainer

# One micro-batch is computed while the next one is copied.
_ON_THE_GPU = 2


def rehearse(config: RunConfig, rank: int, num_ranks: int, findings: Findings) -> int:
    """Train as rank `rank` of `num_ranks` in this process, which can do nothing else afterwards; return train()'s exit.

    `findings` receives what was found. The guard and the stand-ins for torch.cuda have to be installed.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    install_ranks(rank, num_ranks, findings)
    install_generators()
    _install_megatron(num_ranks)
    _watch_steps(findings)
    # In the thread of its caller, so that the place of what the backward pass does is known.
    torch.autograd.set_multithreading_enabled(False)
    with Watch(findings):
        return loop.train(config)


def _install_megatron(num_ranks: int) -> None:
    # The states of random numbers are bytes that only a GPU's generator understands.
    state = torch.zeros(16, dtype=torch.uint8)
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: state
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    torch.nn.Module._apply = _apply  # type: ignore[method-assign,assignment]
    make_folder = save.Saver._make_folder

    def make_own_folder(saver: save.Saver, step: int) -> Path:
        # Rank 0, which makes the folder of a checkpoint and tells the others its name, is not there.
        return make_folder(saver, step) or save.make_partial(saver.folder, step)

    save.Saver._make_folder = make_own_folder  # type: ignore[method-assign,assignment]
    if num_ranks > 1:
        # The peers' parts are copies of this rank's: together they make up no complete tensors.
        preprocess = save.save_preprocess
        save.save_preprocess = lambda state, **kwargs: preprocess(state, validate_access_integrity=False)
        default_planner._validate_global_plan = lambda *args: []


def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Do what Module._apply does. That of torch keeps a parameter's attributes only if its tensor class stays."""
    for child in module.children():
        _apply(child, function)
    for tensors in (module._parameters, module._buffers):
        for name, x in tensors.items():
            if x is None:
                continue
            moved = function(x)
            if isinstance(x, torch.nn.Parameter) and moved is not x:
                moved = torch.nn.Parameter(moved.detach(), x.requires_grad)
                moved.__dict__.update(x.__dict__)
            tensors[name] = moved
    return module


def _watch_steps(findings: Findings) -> None:
    """Tell `findings` when a step or validation runs, and look where parameters, buffers and micro-batches are."""
    train_step, validate, start = Trainer.train_step, Trainer.validate, Trainer.__init__
    wrap_model = loop.wrap_model

    def wrap(config: RunConfig, chunks: list[Any], groups: Any) -> Any:
        for chunk in chunks:
            for name, x in [*chunk.named_parameters(), *chunk.named_buffers()]:
                if not isinstance(x, FakeTensor):
                    findings.note(Kind.LEFT_ON_HOST, name)
        return wrap_model(config, chunks, groups)

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.chunks[0].register_forward_pre_hook(functools.partial(_count_forward, self))

    def step(self: Trainer, batches: Iterator[Any]) -> Any:
        self.batches_taken = self.forwards = 0  # type: ignore[attr-defined]
        with findings.during(Phase.STEP):
            return train_step(self, _counted(self, batches, findings))

    def validation(self: Trainer, batches: Iterator[Any]) -> Any:
        with findings.during(Phase.VALIDATION):
            return validate(self, batches)

    loop.wrap_model = wrap
    Trainer.__init__ = init  # type: ignore[method-assign]
    Trainer.train_step, Trainer.validate = step, validation  # type: ignore[method-assign]


def _counted(trainer: Any, batches: Iterator[Any], findings: Findings) -> Iterator[Any]:
    for batch in batches:
        trainer.batches_taken += 1
        if trainer.batches_taken - trainer.forwards > _ON_THE_GPU:
            findings.note(Kind.COPIED_AHEAD)
        yield batch


def _count_forward(trainer: Any, module: Any, args: Any) -> None:
    if trainer.chunks[0].training:
        trainer.forwards += 1
