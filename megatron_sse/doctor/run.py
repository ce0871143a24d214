"""The run: layout, token files, checkpoints, memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_sse.checkpoint.data import changed_data, moved
from megatron_sse.checkpoint.folders import describe_finished, find_all_damage, find_checkpoints, find_weights
from megatron_sse.checkpoint.manifest import read_manifest
from megatron_sse.checkpoint.settings import changed_settings
from megatron_sse.config import DataConfig, RunConfig, Source, count_processes, load_config, plan_stages
from megatron_sse.config.weights import model_weights
from megatron_sse.data.checks import check_token_file
from megatron_sse.data.metadata import read_metadata
from megatron_sse.data.sources import name_sources, open_training, open_validation
from megatron_sse.doctor.finding import BAD, GOOD, OPEN, Finding
from megatron_sse.errors import UserError
from megatron_sse.launch.nodes import find_nodes
from megatron_sse.planning.ceilings import GIB
from megatron_sse.planning.documents import count_documents
from megatron_sse.planning.memory import rank_memory
from megatron_sse.planning.search import HEADROOM
from megatron_sse.planning.sizes import Sizes
from megatron_sse.run_folder import CONFIG
from megatron_sse.visible import count_of


def check_layout(config: RunConfig) -> Iterator[Finding]:
    """Check whether this machine's processes, the layout and the batch divide."""
    try:
        nodes = find_nodes(os.environ)
        count = count_processes(config, nodes.count, torch.cuda.device_count())
    except UserError as error:
        yield Finding(BAD, "processes", str(error))
        return
    yield Finding(GOOD, "processes", f"{count} on this machine, {count_of(nodes.count, 'machine')}")


def check_token_files(config: RunConfig) -> Iterator[Finding]:
    """Check index, size, token ids and vocabulary of the token files."""
    vocab_size = config.model.vocab_size
    for stage in plan_stages(config):
        data = stage.config.data
        yield from _check_blend(stage.train_key, data.train, data, vocab_size, partial(open_training, stage))
        if stage.number == 0 and data.validation is not None:
            open_samples = partial(open_validation, config)
            yield from _check_blend("data.validation", data.validation, data, vocab_size, open_samples)
    if config.data.validation is None and not config.data.validation_share:
        yield Finding(OPEN, "data.validation", "not set: no validation")


def _check_blend(
    key: str, blend: list[Source], data: DataConfig, vocab_size: int, open_samples: Callable[[], object]
) -> Iterator[Finding]:
    """Check every file of a blend, then whether samples can be made of them."""
    prefixes = [source.prefix for source in blend if source.prefix]
    if data.corpus is not None and prefixes and not Path(prefixes[0] + ".idx").exists():
        yield Finding(OPEN, key, f"{prefixes[0]} will be built from data.corpus {data.corpus}")
        return
    findings = [finding for name in name_sources(key, blend) for finding in _check_source(*name, vocab_size)]
    yield from findings
    try:
        if BAD not in {finding.mark for finding in findings}:
            open_samples()
    except UserError as error:
        yield Finding(BAD, key, str(error).removeprefix(f"{key}: "))


def _check_source(key: str, source: Source, vocab_size: int) -> Iterator[Finding]:
    if source.prefix is None:
        yield Finding(GOOD, key, f"{source}: samples are made when they are needed")
        return
    try:
        index = check_token_file(key, source.prefix, vocab_size).index
        metadata = read_metadata(source.prefix)
    except UserError as error:
        yield Finding(BAD, key, str(error).removeprefix(f"{key}: "))
        return
    documents = count_of(len(index.offsets_D1) - 1, "document")
    text = f"{source.prefix}: {count_of(index.num_tokens, 'token')}, {documents}, ids in range"
    yield Finding(GOOD, key, text)
    if metadata is None:
        yield Finding(OPEN, "tokenizer", f"{source.prefix}.json not found: the tokenizer is not known")
    else:
        vocabulary = f"{metadata.vocab_size:,} tokens, model.vocab_size {vocab_size:,}"
        yield Finding(GOOD, "tokenizer", f"{source.prefix}: {metadata.tokenizer}, {vocabulary}")


def check_checkpoints(config: RunConfig) -> Iterator[Finding]:
    """Check whether the checkpoint that the run would resume or start from is intact and of the same model."""
    try:
        found = find_checkpoints(config)
        weights = find_weights(config)
    except UserError as error:
        yield Finding(BAD, "checkpoint", str(error))
        return
    if not found and weights is None:
        yield Finding(OPEN, "checkpoint", "none: the run starts from the beginning")
    if found:
        yield _check_checkpoint(config, "resume", found[0])
    elif weights is not None:
        yield _check_checkpoint(config, "load_weights", weights)


def _check_checkpoint(config: RunConfig, key: str, path: Path) -> Finding:
    # Imported late: torch's checkpoints take a second.
    from megatron_sse.checkpoint.verify import find_missing

    damaged = find_all_damage(path, hashes=config.checkpoint.verify == "hashes")
    damaged = damaged or find_missing(path, read_manifest(path))
    if damaged:
        return Finding(BAD, f"checkpoint.{key}", f"{'; '.join(damaged)}; restore the files or delete {path}")
    manifest = read_manifest(path)
    try:
        saved = load_config(path / CONFIG)
    except UserError as error:
        return Finding(OPEN, f"checkpoint.{key}", f"{path} is intact; its settings cannot be read ({error})")
    if model_weights(saved.model) != model_weights(config.model):
        keys = [key for key in _model_keys(config) if key != "model.vocab_multiple"]
        changed = "; ".join(changed_settings(path, config, keys))
        advice = "set them back, or set another monitor.folder or checkpoint.resume"
        return Finding(BAD, f"checkpoint.{key}", f"{path} is of another model: {changed}; {advice}")
    if key == "resume" and not manifest.optimizer:
        advice = "give it as checkpoint.load_weights"
        return Finding(BAD, f"checkpoint.{key}", f"{path} has only weights; {advice}")
    if key == "resume" and manifest.step >= config.training.steps:
        return Finding(OPEN, f"checkpoint.{key}", f"{path}: {describe_finished(config.training.steps)}")
    if key == "resume" and (place := moved(path, config, plan_stages(config))):
        return Finding(BAD, f"checkpoint.{key}", place)
    if key == "resume" and config.checkpoint.changed_data == "refuse":
        # check_token_files reports what is wrong with the files.
        with contextlib.suppress(UserError):
            if other := changed_data(path, plan_stages(config)):
                advice = "restore it, or set checkpoint.changed_data: accept"
                return Finding(BAD, f"checkpoint.{key}", f"{path} is of other data: {'; '.join(other)}; {advice}")
    return Finding(GOOD, f"checkpoint.{key}", f"{path}: intact, of this model, step {manifest.step}")


def _model_keys(config: RunConfig) -> list[str]:
    model = config.model.model_dump()
    keys = [f"model.{name}" for name, value in model.items() if not isinstance(value, dict)]
    return keys + [f"model.{part}.{name}" for part in ("sse", "softmax") for name in model[part]]


def check_teacher(config: RunConfig) -> Iterator[Finding]:
    """Check whether the teacher of a distillation is there and fits the run."""
    if config.training.distill is None:
        return
    name = "training.distill.teacher"
    try:
        from megatron_sse.distill.teacher import open_teacher

        # A damaged checkpoint is passed over when the run resumes, too.
        intact = (path for path in find_checkpoints(config) if not find_all_damage(path, hashes=False))
        model = open_teacher(config, next(intact, None)).model
    except (UserError, ImportError) as error:
        yield Finding(BAD, name, str(error).removeprefix(f"{name}: "))
        return
    yield Finding(GOOD, name, f"{model.folder}: {model.kind}, the run's vocabulary")


def check_problems(config: RunConfig) -> Iterator[Finding]:
    """Check the prompts, the rewards and the reference of reinforcement learning."""
    if config.rl is None:
        return
    try:
        # Imported late: Megatron-Core, which other runs' checks do without.
        from megatron_sse.rl.run import open_problems

        problems = open_problems(config)
    except (UserError, ImportError) as error:
        yield Finding(BAD, "rl.prompts", str(error).removeprefix("rl.prompts: "))
        return
    held_out = f", {len(problems.held_out):,} held out" if problems.held_out else ""
    text = f"{config.rl.prompts}: {count_of(len(problems.prompts), 'prompt')}{held_out}; rewards found"
    yield Finding(GOOD, "rl.prompts", text)


def check_memory(config: RunConfig) -> Iterator[Finding]:
    """Compare the planned memory with that of this machine's GPU."""
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        yield Finding(OPEN, "memory", "no GPU here; megatron-sse plan reports what a GPU needs")
        return
    try:
        nodes = find_nodes(os.environ).count
        data_size = nodes * count_processes(config, nodes, num_gpus) // config.parallel.replica_size
        documents = count_documents(config, None)
    except UserError:
        # check_layout and check_token_files report it.
        return
    sizes = Sizes(config, data_size, documents=documents)
    needed = max(rank_memory(sizes, stage).total for stage in range(config.parallel.pipeline))
    there = (1 - HEADROOM) * torch.cuda.get_device_properties(0).total_memory
    text = f"{needed / GIB:,.1f} GiB planned for a GPU, {there / GIB:,.1f} GiB available (10 % left free)"
    if needed > there:
        text += "; megatron-sse plan --search shows layouts that fit"
    yield Finding(GOOD if needed <= there else BAD, "memory", text)
