"""One training step and the validation loop, over Megatron-Core's forward-backward schedules.

The loss is the mean over the counted tokens of the global batch, so a rank with more of them weighs more.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, tee
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import RunConfig, overlaps_gradients, overlaps_parameters, uses_distributed_optimizer
from megatron_sse.data.batch import Batch
from megatron_sse.model import SSEMixer
from megatron_sse.model.attention import SoftmaxAttention
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.vocabulary import likeliest_tokens


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

    chunks: the model chunks in DDP. num_micro_batches: per data-parallel rank and step.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroupCollection,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        self.groups, self.chunks, self.optimizer = groups, chunks, optimizer
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
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for mixer in self.mixers:
            mixer.metrics.reset()
        loss_sums = self._run_schedule(self._scale(islice(batches, self.num_micro_batches)), forward_only=False)

        self.optimizer.prepare_grads()
        grad_norm = self.optimizer.get_grad_norm()
        losses, skip = self._reduce(loss_sums, grad_norm)
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
        loss_sums: list[Tensor] = []
        for first in batches:
            micro_batches = chain([first], islice(batches, self.num_micro_batches - 1))
            loss_sums += self._run_schedule(micro_batches, forward_only=True)
        means, _ = self._reduce(loss_sums)
        return {name: means[name] for name in ("loss", "accuracy") if name in means}

    def _scale(self, micro_batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield micro-batches with the scale of the layers' own losses set."""
        loss_scale = self.optimizer.get_loss_scale().squeeze()
        for batch in micro_batches:
            # Megatron-Core divides all gradients by the number of counted tokens: weighted by its tokens, a layer's own
            # loss becomes a mean over tokens as well.
            batch.layout.layer_loss_scale = loss_scale * batch.loss_tokens
            yield batch

    def _run_schedule(self, micro_batches: Iterator[Batch], forward_only: bool) -> list[Tensor]:
        score_step = partial(forward_and_score, vocab_size=self.config.model.vocab_size)
        virtual_size = self.config.parallel.virtual_pipeline
        run = get_forward_backward_func(self.groups.pp.size(), virtual_size if virtual_size > 1 else None)
        return run(
            forward_step_func=score_step if forward_only else forward_step,
            # Each virtual stage iterates over all micro-batches itself.
            data_iterator=list(tee(one_ahead(micro_batches), len(self.chunks))),
            model=self.chunks,
            num_microbatches=self.num_micro_batches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
            p2p_communicator=self.communicator,
            pg_collection=self.groups,
        )

    def _reduce(self, loss_sums: list[Tensor], grad_norm: float = 0.0) -> tuple[dict[str, float], Skip | None]:
        """Return means over all ranks, and why the step has to be skipped, the same on every rank.

        loss_sums: for each micro-batch [2] (sum of losses, tokens) or [4] (also right answers, answers); filled on the
        last pipeline stage, empty on the others. grad_norm: this rank's. Replicas have the same, unless a bit flipped
        on one of them.
        """
        totals_7 = torch.zeros(7, dtype=torch.float64, device=self.optimizer.get_loss_scale().device)
        for loss_sum in loss_sums:
            totals_7[: len(loss_sum)] += loss_sum
        for mixer in self.mixers:
            means = mixer.metrics.means()
            if "balance_loss" in means:
                totals_7[4] += means["balance_loss"]
                totals_7[5] += 1
        if not math.isfinite(grad_norm):
            totals_7[6] += 1
        # Not over the tensor group, whose ranks all have the same sums.
        sums_over = (self.groups.pp, self.groups.dp_cp)
        for group in sums_over:
            dist.all_reduce(totals_7, group=group)
        loss, tokens, right, answers, balance_loss, num_layers, number = totals_7.tolist()
        not_finite = int(number)
        losses = {"loss": loss / tokens if tokens else math.nan}
        if answers:
            losses["accuracy"] = right / answers
        if num_layers:
            losses["balance_loss"] = balance_loss / num_layers
        if 0 < not_finite < math.prod(group.size() for group in sums_over):
            return losses, REPLICAS_DIFFER
        if not tokens:
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


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Return this stage's output for the next micro-batch, and the function that turns the last stage's into a loss."""
    batch = next(batches)
    output = model(batch.tokens_BL, None, None, labels=batch.labels_BL, packed_seq_params=batch.layout)
    return output, partial(sum_losses, batch.loss_mask_BL)


def forward_and_score(batches: Iterator[Batch], model: Any, vocab_size: int) -> tuple[Tensor, Any]:
    """Run forward_step; where there are answers of tasks, the last stage also counts the right ones."""
    batch = next(batches)
    if batch.answers_BL is None:
        return forward_step(iter([batch]), model)
    output = model(batch.tokens_BL, None, None, packed_seq_params=batch.layout)
    return output, partial(score, model.module, batch, vocab_size)


def score(network: LanguageModel, batch: Batch, vocab_size: int, logits_BLv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what sum_losses does, with the numbers of right answers and of answers appended to what is reported.

    logits_BLv: for this tensor rank's part of the vocabulary.
    """
    answers_BL = batch.answers_BL
    assert answers_BL is not None
    token_w = likeliest_tokens(logits_BLv[answers_BL], vocab_size, network.pg_collection.tp)
    right = (token_w == batch.labels_BL[answers_BL]).sum()
    # Last, since it overwrites the logits. It expects labels [B, L] with logits [L, B, v]: B and L are swapped here in
    # both, and in the loss that it returns.
    loss_LB = network.compute_language_model_loss(batch.labels_BL.T, logits_BLv)
    loss, tokens, sums_2 = sum_losses(batch.loss_mask_BL, loss_LB.T)
    return loss, tokens, torch.cat([sums_2, torch.stack([right, answers_BL.sum()])])


def sum_losses(loss_mask_BL: Tensor, loss_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, its number of tokens, and both as a tensor to report.

    Megatron-Core later divides the gradient by the tokens of all ranks.
    """
    loss = (loss_BL.float() * loss_mask_BL).sum()
    tokens = loss_mask_BL.sum()
    return loss, tokens.int(), torch.stack([loss.detach(), tokens])
