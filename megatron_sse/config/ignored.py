"""Settings that are given but have no effect."""

from collections.abc import Callable, Iterator

from megatron_sse.config.context import USE_NODES, attention_kind
from megatron_sse.config.derive import uses_distributed_optimizer
from megatron_sse.config.run import RunConfig
from megatron_sse.config.schema import Section, SoftmaxConfig, SSEConfig
from megatron_sse.recurrence import RECURRENCES, Recurrence

_WEIGHTS = ["weight_writes", "weight_reads"]
_ROUTER = ["num_writers", "num_readers", "own_read_router", *_WEIGHTS, "weight_scale", "balance_loss"]
_PARTITION_SETTINGS = [*_ROUTER, "form"]
_SPARSE_SETTINGS = ["recurrence", "num_partitions", "shared_bank", *_PARTITION_SETTINGS]
_DECAY_GATE_SETTINGS = ["decay_low_rank", "decay_normalizer"]
# Settings that only some recurrences have.
_RECURRENCE_SETTINGS: dict[str, Callable[[Recurrence], bool]] = {
    "gate": lambda row: row.delta_rule,
    "negative_eigenvalues": lambda row: row.delta_rule,
    "decay_low_rank": lambda row: row.channel_decay,
    "decay_normalizer": lambda row: not row.delta_rule,
}
_VALIDATION_SETTINGS = ["validation_interval", "validation_batches"]


def ignored_settings(config: RunConfig) -> list[str]:
    """Return one line for each setting that differs from its default but has no effect with the other settings."""
    return list(_find(config))


def _find(config: RunConfig) -> Iterator[str]:
    model, training, optimizer = config.model, config.training, config.optimizer
    kinds, used, sse = set(model.layer_kinds()), model.recurrences(), model.sse
    if not used:
        if sse != SSEConfig():
            yield "model.sse is ignored: model.layers is all softmax"
    elif "sse" not in kinds:
        yield from _changed(sse, "model.sse", _SPARSE_SETTINGS, "model.layers has no sse layer")
    elif sse.num_partitions == 0:
        yield from _changed(sse, "model.sse", _PARTITION_SETTINGS, "model.sse.num_partitions is 0")
    elif not any(getattr(sse, name) for name in _WEIGHTS):
        yield from _changed(sse, "model.sse", ["weight_scale"], "model.sse.weight_writes and weight_reads are false")
    if used:
        yield from _recurrence_settings(sse, used)
    if "softmax" not in kinds and model.softmax != SoftmaxConfig():
        yield "model.softmax is ignored: model.layers has no softmax layer"
    for name in ("attention_dropout", "softmax_scale"):
        if "softmax" not in kinds and model.transformer.get(name):
            yield f"model.transformer.{name} is ignored: model.layers has no softmax layer"
    if config.parallel.context == 1:
        names = ["layout", "hand_off", "hand_off_wire", "context_per_node"]
        yield from _changed(config.parallel, "parallel", names, "parallel.context is 1")
    elif config.parallel.hand_off not in USE_NODES:
        reason = f"parallel.hand_off is {config.parallel.hand_off}"
        yield from _changed(config.parallel, "parallel", ["context_per_node"], reason)
    if model.transformer.get("cp_comm_type") is not None and attention_kind(config) is None:
        yield "model.transformer.cp_comm_type is ignored: only bf16 softmax layers with parallel.context above 1 use it"
    if config.checkpoint.interval == 0:
        yield from _changed(config.checkpoint, "checkpoint", ["asynchronous"], "checkpoint.interval is 0")
    if config.monitor.profile_steps is None and config.monitor.memory_steps is None:
        reason = "monitor.profile_steps and monitor.memory_steps are null"
        yield from _changed(config.monitor, "monitor", ["profile_ranks"], reason)
    if config.rl is not None:
        yield from _ignored_with_rl(config)
    elif config.data.validation is None and not config.data.validation_share:
        yield from _changed(training, "training", _VALIDATION_SETTINGS, "there is no validation data")
    yield from _overlap(config)
    if optimizer.warmup_steps > training.steps:
        yield f"optimizer.schedule is ignored: the warm-up has {optimizer.warmup_steps} steps, the run {training.steps}"
    if optimizer.schedule == "constant":
        yield from _changed(optimizer, "optimizer", ["min_learning_rate"], "optimizer.schedule is constant")
    if optimizer.schedule != "wsd" and optimizer.decay_steps:
        yield f"optimizer.decay_steps is ignored: optimizer.schedule is {optimizer.schedule}, not wsd"


def _ignored_with_rl(config: RunConfig) -> Iterator[str]:
    rl = config.rl
    assert rl is not None
    yield from _changed(config.data, "data", ["packing", "long_documents"], "rl packs complete answers by best fit")
    if rl.updates_per_batch == 1:
        yield from _changed(rl, "rl", ["clip", "clip_high"], "rl.updates_per_batch is 1, where all ratios are 1")
    if not (config.model.sse.num_partitions and "sse" in config.model.layer_kinds()):
        yield from _changed(rl, "rl", ["replay_routing"], "no layer has partitions")
    names = ["validation_batches"] if rl.validation_prompts else _VALIDATION_SETTINGS
    reason = "all of rl.validation_prompts are tried" if rl.validation_prompts else "rl.validation_prompts is null"
    yield from _changed(config.training, "training", names, reason)


def _overlap(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if not uses_distributed_optimizer(config):
        yield from _changed(parallel, "parallel", ["overlap_parameters"], "parallel.distributed_optimizer is false")
    elif parallel.overlap_gradients is False:
        yield from _changed(parallel, "parallel", ["overlap_parameters"], "parallel.overlap_gradients is false")


def _recurrence_settings(sse: SSEConfig, used: set[Recurrence]) -> Iterator[str]:
    """Yield the settings that none of the recurrences in use has."""
    for name, has_it in _RECURRENCE_SETTINGS.items():
        if name in _DECAY_GATE_SETTINGS and sse.decay != "gate":
            yield from _changed(sse, "model.sse", [name], f"model.sse.decay is {sse.decay}")
        elif not any(map(has_it, used)):
            names = " or ".join(row.name for row in RECURRENCES.values() if has_it(row))
            yield from _changed(sse, "model.sse", [name], f"no layer has the {names} recurrence")


def _changed(section: Section, prefix: str, names: list[str], reason: str) -> Iterator[str]:
    fields = type(section).model_fields
    for name in names:
        if getattr(section, name) != fields[name].get_default(call_default_factory=True):
            yield f"{prefix}.{name} is ignored: {reason}"
