"""One training step in a layout, as each process runs it: recorded, or compared with the record of one process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sse.check_parallel.documents import rank_batches
from megatron_sse.check_parallel.probe import Piece, Probe
from megatron_sse.check_parallel.processes import TIMEOUT_MINUTES
from megatron_sse.config import RunConfig
from megatron_sse.model import build_model
from megatron_sse.model.initialize import global_name, own_part
from megatron_sse.parallel.device import Device
from megatron_sse.parallel.groups import init_groups
from megatron_sse.training.optimizer import build_optimizer, set_learning_rate
from megatron_sse.training.step import Trainer, wrap_model


@dataclass
class Record:
    """Tensors of one process's step, on the CPU.

    outputs: by row, [samples, E, ...]. picks: by layer number, int64 [samples, E, P]. hidden: input of the first
    router, [samples, E, d]. gradients: by the parameter's name. scalars: losses and the gradient's norm.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    picks: dict[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass
class RankErrors:
    """Distance of a rank's part from the record: RMS of the difference over RMS of the complete recorded tensor.

    seen: by row of outputs, a mask [samples, E] of the tokens that this rank held. moved: number of tokens whose
    unpinned picks differ; None where this rank does not have the first router.
    """

    outputs: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    moved: int | None = None


class Step:
    """A model in a layout, and one step of it."""

    def __init__(self, config: RunConfig, device: Device):
        parallel = config.parallel
        self.groups = init_groups(
            parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context, TIMEOUT_MINUTES
        )
        self.config = config
        self.chunks = build_model(config, self.groups, device)
        self.batches = list(rank_batches(config, self.groups, device.type))
        self.probe = Probe(self.chunks, self.batches, self.groups)

    def run(self) -> dict[str, float]:
        """Run the step and return the losses and the gradient's norm; gradients stay in the parameters."""
        chunks = wrap_model(self.config, self.chunks, self.groups)
        trainer = Trainer(self.config, self.groups, chunks, build_optimizer(self.config, chunks, self.groups))
        set_learning_rate(trainer.optimizer, self.config.optimizer.learning_rate)
        result = trainer.train_step(batch for _, batch in self.batches)
        return {**result.losses, "gradient norm": result.grad_norm}

    def parameters(self) -> dict[str, Any]:
        """Return this rank's parameters by their names in the complete model."""
        return {
            global_name(name, chunk): parameter for chunk in self.chunks for name, parameter in chunk.named_parameters()
        }


def record(device: Device, config: RunConfig, path: Path) -> None:
    """Run a step in one process and save its Record at `path`."""
    step = Step(config, device)
    step.probe.record_routing()
    scalars = step.run()
    outputs = _join(step.probe.outputs, config)
    picks, hidden = _join(step.probe.picks, config), _join(step.probe.hidden, config)
    gradients = {name: parameter.main_grad.cpu() for name, parameter in step.parameters().items()}
    first = hidden[min(hidden)] if hidden else None
    torch.save(vars(Record(outputs, picks, first, gradients, scalars)), path)


def _join(pieces: dict[tuple[Any, int], tuple[Piece, Tensor]], config: RunConfig) -> dict[Any, Tensor]:
    """Return tensors over all tokens by name (row or layer number), joined from the parts of the micro-batches."""
    whole: dict[Any, Tensor] = {}
    for (name, _), (piece, value) in pieces.items():
        if name not in whole:
            tokens = config.training.global_batch_size, config.data.sequence_length
            whole[name] = value.new_zeros(*tokens, *value.shape[2:])
        piece.put(whole[name], value)
    return whole


def compare(device: Device, config: RunConfig, path: Path, nudge: bool) -> RankErrors:
    """Run a step in this layout with the recorded picks, and compare this rank's part with the record at `path`.

    nudge: move every weight to a neighbouring number first, to see what rounding does.
    """
    # Mapped into memory, so that all processes share the same pages.
    expected = Record(**torch.load(path, mmap=True, weights_only=True))
    step = Step(config, device)
    errors = RankErrors()
    if nudge:
        _move_weights(step)
    elif expected.picks:
        errors.moved = _moved_picks(step, expected)
    step.probe.replay_routing(expected.picks)
    scalars = step.run()
    _compare_outputs(step.probe, expected, errors)
    tensor = step.groups.tp
    for name, parameter in step.parameters().items():
        whole = expected.gradients[name]
        # Weights and gradients are split the same way, so the slice of the complete gradient is this rank's.
        part = own_part(whole, parameter, tensor.rank(), tensor.size())
        errors.gradients[name] = _ratio(_sum_squares(parameter.main_grad.cpu(), part), part.numel(), whole)
    for name, value in expected.scalars.items():
        errors.scalars[name] = _ratio((scalars[name] - value) ** 2, 1, torch.tensor(value))
    return errors


def _compare_outputs(probe: Probe, expected: Record, errors: RankErrors) -> None:
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for (row, _), (piece, value) in probe.outputs.items():
        whole = expected.outputs[row]
        seen = errors.seen.setdefault(row, torch.zeros(whole.shape[:2], dtype=torch.bool))
        piece.put(seen, torch.tensor(True))
        sums[row] = sums.get(row, 0.0) + _sum_squares(value, piece.cut(whole))
        counts[row] = counts.get(row, 0) + value.numel()
    errors.outputs = {row: _ratio(sums[row], counts[row], expected.outputs[row]) for row in sums}


def _sum_squares(ours: Tensor, expected: Tensor) -> float:
    return (ours.double() - expected.double()).square().sum().item()


def _ratio(sum_squares: float, count: int, expected: Tensor) -> float:
    """Return the RMS of a difference over that of the complete expected tensor; infinite where one is not finite."""
    # Also where the expected tensor is all zeros.
    if sum_squares == 0:
        return 0.0
    ratio = (sum_squares / count) ** 0.5 / expected.double().square().mean().sqrt().clamp(min=1e-300).item()
    return ratio if ratio == ratio else float("inf")


def _moved_picks(step: Step, expected: Record) -> int | None:
    """Return the number of tokens for which the first router, given the recorded input, picks other partitions."""
    first = min(expected.picks)
    if first not in step.probe.routers or expected.hidden is None:
        return None
    pieces = step.probe.route_again(first, expected.hidden)
    return sum(int((picks != piece.cut(expected.picks[first])).any(-1).sum()) for piece, picks in pieces)


@torch.no_grad()
def _move_weights(step: Step) -> None:
    """Move every weight to the next larger or smaller fp32 number, at random."""
    generator = torch.Generator().manual_seed(step.config.training.seed)
    for parameter in step.parameters().values():
        # nextafter moves towards +inf or -inf by one unit in the last place.
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        target = torch.where(up, torch.inf, -torch.inf).to(parameter)
        parameter.copy_(torch.nextafter(parameter, target))
