"""Runs on worker pools that stop, save and resume."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_sse.checkpoint.verify import first_intact
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.training.loop import Run
from megatron_sse.training.optimizer import set_learning_rate
from tests.training.support import small_run, start

# Losses and the gradient norm of each step.
Trace = list[tuple[dict[str, float], float]]


def take_steps(run: Run, last_step: int) -> Trace:
    """Train a run up to `last_step`."""
    batches, _ = build_data_iterators(run.stage, run.groups, run.consumed_samples)
    trace = []
    for step in range(run.first_step, last_step + 1):
        set_learning_rate(run.trainer.optimizer, run.learning_rate(step))
        run._seed(step)
        result = run.trainer.train_step(batches)
        run.consumed_samples += run.config.training.global_batch_size
        trace.append((result.losses, result.grad_norm))
    return trace


def save(run: Run, step: int, background: bool = False) -> None:
    run.saver.start(step, run.consumed_samples, background)
    run.saver.finish()


def whole_state(run: Run) -> dict[str, torch.Tensor]:
    """Return this rank's weights, optimizer state and states of the random generators."""
    state = {
        f"{number}.{name}": parameter.detach().clone()
        for number, chunk in enumerate(run.trainer.chunks)
        for name, parameter in chunk.named_parameters()
    }
    for number, moments in enumerate(run.trainer.optimizer.chained_optimizers[0].optimizer.state.values()):
        state |= {f"moments.{number}.{name}": tensor.clone() for name, tensor in moments.items()}
    state |= {f"rng.{name}": generator for name, generator in get_cuda_rng_tracker().get_states().items()}
    return state | {"rng": torch.get_rng_state()}


def train_and_save(
    folder: Path, sections: dict[str, Any], resume: Path | None, last_step: int, saves: bool
) -> tuple[Trace, dict[str, torch.Tensor]]:
    """Train up to `last_step` on every rank, optionally from a checkpoint and with a checkpoint at the end."""
    resume = first_intact([] if resume is None else [resume], hashes=True)
    run = start(small_run(folder, **sections), resume)
    trace = take_steps(run, last_step)
    if saves:
        save(run, last_step)
    return trace, whole_state(run)
