"""One training step and the validation loop, over Megatron-Core's forward-backward schedules.

The loss is the mean over the counted tokens of the global batch, so a rank with more of them weighs more.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, tee
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import RunConfig, overlaps_gradients, overlaps_parameters, uses_distributed_optimizer
from megatron_sse.data.batch import Batch
from megatron_sse.model import SSEMixer
from megatron_sse.model.attention import SoftmaxAttention
from megatron_sse.parallel.device import without_stand_ins
from megatron_sse.training.objective import LanguageModelling, Objective


@dataclass(frozen=True)
class Skip:
    """Why a step leaves the weights unchanged, and what may help where it happens again and again."""

    reason: str
    advice: str


NOT_FINITE = Skip(
    "loss or gradient not finite",
    "a lower optimizer.learning_rate or a longer optimizer.warmup_steps may help",
)
REPLICAS_DIFFER = Skip(
    "gradient not finite on some of the replicas only",
    "replicas have the same gradient unless a machine computes or stores wrongly",
)
ALL_MASKED = Skip(
    "all tokens are masked",
    "no token of the batch counts in the loss: check what data.train masks",
)


# Sums over micro-batches and ranks that every objective has beside its own: counted tokens, balance losses and the
# number of layers that have one, and ranks whose gradient is not finite.
TOKENS, BALANCE_LOSS, LAYERS, NOT_FINITE_RANKS = "tokens", "balance_loss", "layers", "ranks_not_finite"


@contextmanager
def _lean_backward() -> Iterator[None]:
    """Let Megatron-Core's schedules run backward passes without the stand-ins for CUDA, like our forward passes.

    Only inside: Megatron-Core's own layers, which other code may train, name devices when they are recomputed.
    """
    given = schedules.backward_step

    def backward_step(*args: Any, **options: Any) -> Any:
        with without_stand_ins():
            return given(*args, **options)

    # The schedules look for it by its name.
    schedules.backward_step = backward_step
    try:
        yield
    finally:
        schedules.backward_step = given


@dataclass(frozen=True)
class StepResult:
    """The result of one step, the same on every rank but for grad_norm where replicas differ.

    losses: "loss" in nats per token; with SSE layers "balance_loss", the mean over layers without its coefficient.
    grad_norm: before clipping. skip: why the weights are unchanged; None where the optimizer stepped.
    """

    losses: dict[str, float]
    grad_norm: float
    skip: Skip | None

    @property
    def skipped(self) -> bool:
        return self.skip is not None


class Trainer:
    """The model of this rank, its optimizer, and the settings to run a step.

    chunks: the model chunks in DDP. num_micro_batches: per data-parallel rank and step. measures_health: whether layers
    compute in the next step what the monitor reports of their health; the run sets it. before_update: called in the
    next step when its gradients are complete and its weights, gathered for the forward pass, are still the same on all
    replicas; the run sets it. layer_loss_factor: of the losses
    that layers add themselves, on top of their coefficient.
    """

    layer_loss_factor = 1.0

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroupCollection,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        self.groups, self.chunks, self.optimizer = groups, chunks, optimizer
        self.objective: Objective = LanguageModelling()
        self.measures_health = True
        self.before_update: Callable[[], None] | None = None
        self.start_stage(config)
        self.mixers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, SSEMixer)]
        settings = chunks[0].config
        # Megatron-Core's schedules take these functions from the model's configuration.
        settings.finalize_model_grads_func = finalize_model_grads
        settings.grad_scale_func = optimizer.scale_loss
        settings.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
        # With other settings, gradients are silently wrong on two interleaved pipeline stages.
        assert settings.overlap_p2p_comm == (len(chunks) > 1) and settings.batch_p2p_comm != settings.overlap_p2p_comm
        assert settings.calculate_per_token_loss
        self.communicator = P2PCommunicator(pp_group=groups.pp, config=settings)

    def start_stage(self, config: RunConfig) -> None:
        """Continue with a stage's sequence length, batch size and rotary base."""
        self.config = config
        training = config.training
        self.num_micro_batches = training.global_batch_size // (training.micro_batch_size * self.groups.dp.size())
        for chunk in self.chunks:
            for module in chunk.modules():
                if isinstance(module, SoftmaxAttention):
                    module.rotary_base = config.model.softmax.rotary_base

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """Take one global batch from `batches`, and one optimizer step unless a loss or gradient is not finite."""
        with without_stand_ins():
            for chunk in self.chunks:
                # Goes through all modules, so only behind a validation.
                if not chunk.training:
                    chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        for mixer in self.mixers:
            mixer.metrics.reset(self.measures_health)
        sums = self._run_schedule(self._scale(islice(batches, self.num_micro_batches)), training=True)

        with without_stand_ins():
            self.optimizer.prepare_grads()
        grad_norm = self.optimizer.get_grad_norm()
        losses, skip = self._reduce(sums, grad_norm)
        if self.before_update is not None:
            self.before_update()
        if skip is None:
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), self.config.optimizer.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
        return StepResult(losses, grad_norm, skip)

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Return means over all batches of the iterator, the same on every rank.

        "loss" is in nats per token; "accuracy", where there are answers of tasks, is the share of their tokens that are
        the model's likeliest.
        """
        for chunk in self.chunks:
            chunk.eval()
        sums: list[dict[str, Tensor]] = []
        for first in batches:
            micro_batches = chain([first], islice(batches, self.num_micro_batches - 1))
            sums += self._run_schedule(micro_batches, training=False)
        means, _ = self._reduce(sums)
        return {name: mean for name, mean in means.items() if name != BALANCE_LOSS}

    def _scale(self, micro_batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield micro-batches with the scale of the layers' own losses set."""
        loss_scale = self.layer_loss_factor * self.optimizer.get_loss_scale().squeeze()
        for batch in micro_batches:
            # Megatron-Core divides all gradients by the number of counted tokens: weighted by its tokens, a layer's own
            # loss becomes a mean over tokens as well.
            batch.layout.layer_loss_scale = loss_scale * batch.loss_tokens
            yield batch

    def _run_schedule(self, micro_batches: Iterator[Batch], training: bool) -> list[dict[str, Tensor]]:
        """Return each micro-batch's sums: filled on the last pipeline stage, empty on the others."""
        virtual_size = self.config.parallel.virtual_pipeline
        run = get_forward_backward_func(self.groups.pp.size(), virtual_size if virtual_size > 1 else None)
        with _lean_backward():
            return run(
                forward_step_func=partial(self._forward_step, training=training),
                # Each virtual stage iterates over all micro-batches itself.
                data_iterator=list(tee(one_ahead(micro_batches), len(self.chunks))),
                model=self.chunks,
                num_microbatches=self.num_micro_batches,
                seq_length=self.config.data.sequence_length,
                micro_batch_size=self.config.training.micro_batch_size,
                forward_only=not training,
                p2p_communicator=self.communicator,
                pg_collection=self.groups,
            )

    def _forward_step(self, batches: Iterator[Batch], model: Any, training: bool) -> tuple[Any, Any]:
        """Return this stage's output for the next micro-batch, and the function that makes the last one's a loss.

        The function returns what Megatron-Core's schedules ask for: loss, number of tokens, and what is reported.
        """
        batch = next(batches)

        def add_up(output: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            found = self.objective.loss(output, batch)
            return found.loss, found.tokens, {TOKENS: found.tokens, **found.sums}

        # The stand-ins would slow thousands of small calls down: forward, backward and the optimizer by a third of a
        # step of a tiny model.
        with without_stand_ins():
            return self.objective.forward(model, batch, training), add_up

    def _reduce(self, sums: list[dict[str, Tensor]], grad_norm: float = 0.0) -> tuple[dict[str, float], Skip | None]:
        """Return means over all ranks, and why the step has to be skipped, the same on every rank.

        sums: of each micro-batch, on the last pipeline stage. grad_norm: this rank's. Replicas have the same, unless a
        bit flipped on one of them.
        """
        names = (TOKENS, *self.objective.sums, BALANCE_LOSS, LAYERS, NOT_FINITE_RANKS)
        device = self.optimizer.get_loss_scale().device
        total_of = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        for parts in sums:
            for name, part in parts.items():
                total_of[name] += part
        for mixer in self.mixers:
            means = mixer.metrics.means()
            if "balance_loss" in means:
                total_of[BALANCE_LOSS] += means["balance_loss"]
                total_of[LAYERS] += 1
        if not math.isfinite(grad_norm):
            total_of[NOT_FINITE_RANKS] += 1
        totals = torch.stack(list(total_of.values()))
        # Not over the tensor group, whose ranks all have the same sums.
        sums_over = (self.groups.pp, self.groups.dp_cp)
        for group in sums_over:
            dist.all_reduce(totals, group=group)
        total = dict(zip(names, totals.tolist(), strict=True))
        not_finite = int(total[NOT_FINITE_RANKS])
        losses = self.objective.means(total, total[TOKENS])
        if total[LAYERS]:
            losses[BALANCE_LOSS] = total[BALANCE_LOSS] / total[LAYERS]
        if 0 < not_finite < math.prod(group.size() for group in sums_over):
            return losses, REPLICAS_DIFFER
        if not total[TOKENS]:
            return losses, ALL_MASKED
        return losses, NOT_FINITE if not_finite or not math.isfinite(losses["loss"]) else None


def one_ahead(micro_batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield each micro-batch when the next one is made: its copy to the GPU then overlaps with the one in work.

    Only these two are held, not all of the step's.
    """
    current = next(micro_batches, None)
    while current is not None:
        following = next(micro_batches, None)
        yield current
        current = following


def wrap_model(config: RunConfig, chunks: list[Any], groups: ProcessGroupCollection) -> list[DistributedDataParallel]:
    """Wrap model chunks in Megatron-Core's DDP, which sums gradients over the data-parallel group in fp32."""
    on_gpu = next(chunks[0].parameters()).is_cuda
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=uses_distributed_optimizer(config),
        overlap_grad_reduce=overlaps_gradients(config, on_gpu),
        overlap_param_gather=overlaps_parameters(config, on_gpu),
    )
    return [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=stage > 0, pg_collection=groups)
        for stage, chunk in enumerate(chunks)
    ]
