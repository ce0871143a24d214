"""A run of reinforcement learning: in every step answers are generated, scored and trained on."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.checkpoint.folders import find_all_damage, find_checkpoints, find_weights
from megatron_sse.checkpoint.names import TOKENIZER_FILES
from megatron_sse.checkpoint.reference import describe_reference
from megatron_sse.checkpoint.verify import first_intact
from megatron_sse.config import RunConfig, StageRun, choose_layout
from megatron_sse.data.batch import Batch
from megatron_sse.data.iterators import ValidationFactory
from megatron_sse.durable import write_durably
from megatron_sse.errors import SharedUserError, UserError, found_by_all, found_by_machine
from megatron_sse.inference.sampling import KeyedSampler, make_key
from megatron_sse.lease import Lease
from megatron_sse.monitor.output import Output
from megatron_sse.parallel.collectives import gather_weights
from megatron_sse.parallel.device import Device
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.rl.advantages import Group, has_spread, weigh
from megatron_sse.rl.objective import PolicyObjective
from megatron_sse.rl.packing import make_batches, pack
from megatron_sse.rl.prompts import Prompt, Texts, choose, open_texts, read_run_prompts
from megatron_sse.rl.reference import Reference, find_reference
from megatron_sse.rl.rewards import SOLVED, Scorer
from megatron_sse.rl.rollouts import Rollout, generate, share_weights
from megatron_sse.rl.routing import Replay, find_routers, make_filler, picks_shape
from megatron_sse.rl.share import Scored, gather, own_numbers
from megatron_sse.run_folder import SAMPLES
from megatron_sse.training.loop import Run, UselessRunError, train
from megatron_sse.training.step import NOT_FINITE, StepResult

logger = logging.getLogger(__name__)

# How far log-probabilities of generation and training may be apart, as a factor (PolicyObjective's "error").
WARN_ABOVE, STOP_ABOVE = 1.02, 1.05


@dataclass(frozen=True)
class Problems:
    """Prompts, rewards and tokenizer of a run, read and checked before any process group exists.

    tokenizer: the content of the tokenizer's files by their names in a checkpoint.
    """

    texts: Texts
    prompts: list[Prompt]
    held_out: list[Prompt]
    scorer: Scorer
    tokenizer: dict[str, bytes]


def train_policy(config: RunConfig, lease: Lease | None = None) -> int:
    """Run the reinforcement learning that `config` describes; as training.loop.train. Raises UserError."""
    with found_by_machine():
        problems = open_problems(config)
    return train(config, lease, partial(PolicyRun, problems))  # type: ignore[arg-type]


def open_problems(config: RunConfig) -> Problems:
    """Read the prompts and find the rewards of a run, and check that its reference is there. Raises UserError."""
    assert config.rl is not None
    # A damaged one is passed over when the run resumes, too.
    intact = (path for path in find_checkpoints(config) if not find_all_damage(path, hashes=False))
    resume = next(intact, None)
    find_reference(config, resume)
    checkpoint = resume or find_weights(config)
    files = [] if checkpoint is None else [checkpoint / name for name in TOKENIZER_FILES.values()]
    tokenizer = {file.name: file.read_bytes() for file in files if file.is_file()}
    texts = open_texts(config, checkpoint)
    return Problems(texts, *read_run_prompts(config, texts), Scorer(config.rl.reward), tokenizer)


@dataclass
class RolledOut:
    """The answers of a step.

    drawn: those to the step's prompts. groups: those to train on, with others in the places of some that had equal
    rewards. tokens: of all answers that were generated.
    """

    drawn: list[Group]
    groups: list[Group]
    tokens: int


class PolicyRun(Run):
    """A run whose batches are answers of its own model."""

    def __init__(
        self,
        problems: Problems,
        config: RunConfig,
        groups: ProcessGroupCollection,
        device: Device,
        resume: Path | None,
        weights: Path | None = None,
        lease: Lease | None = None,
    ) -> None:
        super().__init__(config, groups, device, resume, weights, lease)
        assert config.rl is not None
        self.rl, self.problems = config.rl, problems
        self.net = self.trainer.chunks[0].module
        self.generator = share_weights(config, self.groups, self.device, self.net)
        routers = find_routers(self.net)
        self.replay = Replay(self.net) if self.rl.replay_routing and routers else None
        self.trainer.objective = PolicyObjective(self.rl, self.groups.cp, self.replay)
        in_model = config.model.sse.balance_loss
        self.trainer.layer_loss_factor = self.rl.balance_loss / in_model if in_model else 0.0
        self.saver.tokenizer = problems.tokenizer
        # Advantages of a group sum to 0, and so does most of the loss.
        self.monitor.watches_loss = False
        self.reference_path = self._find_reference(weights)
        self.reference = None
        if self.reference_path is not None:
            self.reference = Reference(self.reference_path, self.net, self.groups)
        self.shard = ContextShard(self.groups.cp.rank(), self.groups.cp.size(), choose_layout(config)[0])
        self.samples_output = Output(SAMPLES)
        self.num_rows = 0

    def _find_reference(self, weights: Path | None) -> Path | None:
        """Return the reference's checkpoint, the same on all ranks. weights: those that a new run starts from.

        Raises SharedUserError.
        """
        if not self.rl.kl or self.resume is None:
            return weights if self.rl.kl else None
        with found_by_all():
            reference = find_reference(self.config, self.resume)
        assert reference is not None
        return first_intact([reference], self.config.checkpoint.verify == "hashes", "checkpoint.load_weights")

    def _enter(self, stage: StageRun) -> tuple[Iterator[Batch], ValidationFactory | None]:
        self.stage = stage
        self.trainer.start_stage(stage.config)
        self.monitor.start_stage(stage.config)
        self.saver.start_stage(stage, self._describe_data(stage))
        if self.problems.held_out and self.first_step == 1:
            self._validate(0, lambda: iter(()))
        return iter(()), (lambda: iter(())) if self.problems.held_out else None

    def _describe_data(self, stage: StageRun) -> dict[str, Any]:
        data = super()._describe_data(stage)
        if self.reference_path is not None:
            data["reference"] = asdict(describe_reference(self.reference_path))
        return data

    def _take_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        started = time.perf_counter()
        found = self._roll_out(step)
        generated = time.perf_counter()
        answers = weigh(found.groups, self.rl)
        length, training = self.config.data.sequence_length, self.config.training
        rows = pack(answers, length, self.rl.share_prefixes)
        filler = None if self.replay is None else make_filler(self.replay.routers)
        place = self.groups.dp.rank(), self.groups.dp.size(), self.shard, self.device.type
        made = make_batches(
            rows, length, training.micro_batch_size, *place, filler_MP=filler, shares=self.rl.share_prefixes
        )
        self.num_rows = len(made) * training.micro_batch_size * self.groups.dp.size()
        results = self._update(step, made) if made else [self._take_no_step(found.groups)]
        seconds = generated - started, time.perf_counter() - generated
        self._report_step(step, found, results, sum(len(each.rollout.tokens) for each in answers), seconds)
        skipped = next((result for result in results if result.skip is not None), None)
        return skipped or results[0]

    def _take_no_step(self, groups: list[Group]) -> StepResult:
        """Return the result of a step in which there is nothing to learn; not finite where the model is not."""
        for mixer in self.trainer.mixers:
            mixer.metrics.reset()
        if all(np.isfinite(rollout.logp_T).all() for group in groups for rollout in group.rollouts):
            return StepResult({"loss": 0.0}, 0.0, None)
        return StepResult({"loss": math.nan}, math.nan, NOT_FINITE)

    def _update(self, step: int, batches: list[Any]) -> list[StepResult]:
        """Take the optimizer steps of a batch; return their results. Raises UselessRunError."""
        if self.reference is not None:
            if self.replay is not None:
                # The reference picks its own.
                self.replay.picks_BLMP = None
            self.reference.score(batches, self.rl.temperature)
        self.trainer.num_micro_batches = len(batches)
        results = [self.trainer.train_step(iter(batches)) for _ in range(self.rl.updates_per_batch)]
        error = results[0].losses["error"]
        if error > STOP_ABOVE:
            raise UselessRunError(
                f"step {step}: generation and training give tokens probabilities that differ by a factor of {error:.4f}"
                f", allowed {STOP_ABOVE}: stopped without saving; training.precision: fp32 shows whether it is rounding"
            )
        if error > WARN_ABOVE and dist.get_rank() == 0:
            logger.warning(
                "step %d: generation and training give tokens probabilities that differ by a factor of %.4f",
                step,
                error,
            )
        return results

    def _num_tokens(self) -> int:
        return self.num_rows * self.config.data.sequence_length * self.rl.updates_per_batch

    def _roll_out(self, step: int) -> RolledOut:
        """Generate and score the answers of a step, each data and context rank its share; return them on all ranks.

        Groups with equal rewards are replaced by those of other prompts, which depend on seed, step and round alone, as
        far as rl.resample_rounds allows.
        """
        first, rl, seed = self.consumed_samples // self.rl.group_size, self.rl, self.config.training.seed
        prompts = [self.problems.prompts[at] for at in self._choose(first)]
        sampler = KeyedSampler(self.config.model.vocab_size, rl.temperature, rl.top_p)
        drawn = self._share(prompts, self._keys(step, first, range(len(prompts))), sampler)
        found = RolledOut(drawn, list(drawn), sum(map(_count_tokens, drawn)))
        for number in range(1, rl.resample_rounds + 1):
            flat = [place for place, group in enumerate(found.groups) if not has_spread(group, rl)]
            if not flat:
                break
            others = np.random.default_rng([seed, step, number]).integers(len(self.problems.prompts), size=len(flat))
            others_keys = self._keys(step, first, flat, number)
            for place, group in zip(
                flat, self._share([self.problems.prompts[at] for at in others], others_keys, sampler), strict=True
            ):
                found.tokens += _count_tokens(group)
                if has_spread(group, rl):
                    found.groups[place] = group
        return found

    def _choose(self, first: int) -> list[int]:
        """Return the numbers of the step's prompts, from the place `first` of the run on."""
        return choose(len(self.problems.prompts), first, self.rl.prompts_per_step, self.config.training.seed)

    def _keys(self, step: int, first: int, places: Sequence[int], *round_number: int) -> list[list[int]]:
        """Return what the random numbers of the answers at places of a step depend on, for each group."""
        samples, seed = range(self.rl.group_size), self.config.training.seed
        return [[make_key(seed, step, first + place, sample, *round_number) for sample in samples] for place in places]

    def _share(
        self, prompts: list[Prompt], keys: list[list[int]], sampler: KeyedSampler, replays: bool = True
    ) -> list[Group]:
        """Answer prompts, each data and context rank some of them. Raises SharedUserError.

        replays: whether training may follow, which picks the same partitions.
        """
        mine = own_numbers(len(prompts), self.groups.dp_cp)
        gather_weights(self.trainer.chunks)
        of_mine = [prompts[number] for number in mine], [keys[number] for number in mine]
        replay = self.replay if replays else None
        rollouts = generate(
            self.generator,
            *of_mine,
            self.rl.max_new_tokens,
            sampler,
            self.rl.answers_at_once,
            records=replay is not None,
        )
        scored: list[Scored] | None = None
        failed: str | None = None
        try:
            scored = [
                (group, self._score(prompts[number], group)) for number, group in zip(mine, rollouts, strict=True)
            ]
        except UserError as error:
            failed = str(error)
        shape = None if replay is None else picks_shape(replay.routers)
        found = gather(scored, len(prompts), self.groups, self.device.type, shape)
        if not found:
            every: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(every, failed)
            raise SharedUserError(next(text for text in every if text is not None))
        return [Group(prompt, *each) for prompt, each in zip(prompts, found, strict=True)]

    def _score(self, prompt: Prompt, rollouts: list[Rollout]) -> list[float]:
        """Return the rewards of answers. Raises UserError."""
        if self.groups.tp.rank():
            # Those of the first tensor rank count: a reward may draw random numbers.
            return [0.0] * len(rollouts)
        texts = (self.problems.texts.decode(prompt, rollout.tokens) for rollout in rollouts)
        return [self.problems.scorer(prompt.problem, text) for text in texts]

    def _report_step(
        self, step: int, found: RolledOut, results: list[StepResult], trained: int, seconds: tuple[float, float]
    ) -> None:
        # Those that took others' places are no sample of what the model does.
        groups = found.drawn
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        tokens = sum(map(_count_tokens, groups))
        rewards = np.array([group.rewards for group in groups])
        logp = sum(float(rollout.logp_T.sum(dtype=np.float64)) for rollout in rollouts)
        flat = sum(not has_spread(group, self.rl) for group in groups) / len(groups)
        scalars = {
            "rl/reward": float(rewards.mean()),
            "rl/length": tokens / len(rollouts),
            # Of the tokens that were drawn, the mean of what they say is an estimate of the entropy.
            "rl/entropy": -logp / tokens,
            "rl/cut_off": sum(rollout.is_cut for rollout in rollouts) / len(rollouts),
            "rl/flat_groups": flat,
            "speed/generated_tokens_per_second": found.tokens / seconds[0],
            "speed/trained_tokens_per_second": trained * self.rl.updates_per_batch / seconds[1],
        }
        if self.rl.resample_rounds:
            replaced = sum(ours is not theirs for ours, theirs in zip(found.groups, groups, strict=True))
            scalars["rl/resampled"] = replaced / len(groups)
        line = f"reward {scalars['rl/reward']:.3f} | {scalars['rl/length']:.1f} tokens"
        if trained:
            scalars["rl/logprob_error"] = results[0].losses["error"]
            scalars["rl/clipped"] = results[-1].losses["clipped"]
            if self.rl.kl:
                scalars["rl/kl"] = results[-1].losses["kl"]
            line += f" | error {scalars['rl/logprob_error']:.5f}"
        else:
            line += " | NO UPDATE: no group has rewards that differ"
        cut = f" | {100 * scalars['rl/cut_off']:.0f} % cut at rl.max_new_tokens" if scalars["rl/cut_off"] else ""
        line += f" | {100 * flat:.0f} % of groups without a spread{cut}"
        line += f" | {scalars['speed/generated_tokens_per_second']:,.0f} tokens/s generated"
        is_due = step % self.config.monitor.log_interval == 0 or step == self.config.training.steps
        self.monitor.report(step, scalars, line if is_due or not trained else None)
        if is_due and dist.get_rank() == 0:
            self._write_samples(step, groups[0])

    def _write_samples(self, step: int, group: Group) -> None:
        folder = Path(self.config.monitor.folder) / SAMPLES
        problem = group.prompt.problem
        texts = [self.problems.texts.decode(group.prompt, rollout.tokens) for rollout in group.rollouts]
        lines = [
            json.dumps({"prompt": problem.prompt, "completion": text, "answer": problem.answer, "reward": reward})
            for text, reward in zip(texts, group.rewards, strict=True)
        ]
        with self.samples_output.attempt():
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / f"step_{step:07d}.jsonl", ("\n".join(lines) + "\n").encode())

    def _validate(self, step: int, make_validation: ValidationFactory) -> None:
        """Answer the held-out prompts, each with the likeliest tokens."""
        held_out = self.problems.held_out
        sampler = KeyedSampler(self.config.model.vocab_size, temperature=0.0)
        groups = self._share(held_out, [[0]] * len(held_out), sampler, replays=False)
        scalars = describe_held_out(groups)
        line = f"held out: reward {scalars['validation/reward']:.3f} | pass@1 {scalars['validation/pass_at_1']:.3f}"
        self.monitor.report(step, scalars, f"{line} | {scalars['validation/length']:.1f} tokens")


def _count_tokens(group: Group) -> int:
    return sum(len(rollout.tokens) for rollout in group.rollouts)


def describe_held_out(groups: Sequence[Group]) -> dict[str, float]:
    """Return mean reward, share of answers with the full reward of 1, and mean length."""
    rewards = np.array([reward for group in groups for reward in group.rewards])
    lengths = [len(rollout.tokens) for group in groups for rollout in group.rollouts]
    return {
        "validation/reward": float(rewards.mean()),
        "validation/pass_at_1": float((rewards >= SOLVED).mean()),
        "validation/length": float(np.mean(lengths)),
    }
