"""Settings that are given and have no effect."""

from collections.abc import Iterator

from megatron_sse.config.schema import RunConfig, Section, SoftmaxConfig, SSEConfig

_PARTITION_SETTINGS = ("num_writers", "num_readers", "form", "weight_writes", "weight_reads")


def ignored_settings(config: RunConfig) -> list[str]:
    """One line for every setting that differs from its default and has no effect beside the others."""
    return list(_find(config))


def _find(config: RunConfig) -> Iterator[str]:
    model, training, optimizer = config.model, config.training, config.optimizer
    kinds, used = set(model.layer_kinds()), model.recurrences()
    if not used:
        if model.sse != SSEConfig():
            yield "model.sse is ignored: model.layers is all softmax"
    elif "sse" not in kinds:
        names = ("recurrence", "num_partitions", *_PARTITION_SETTINGS, "balance_loss")
        yield from _changed(model.sse, "model.sse", names, "model.layers has no sse layer")
    elif model.sse.num_partitions == 0:
        yield from _changed(model.sse, "model.sse", _PARTITION_SETTINGS, "model.sse.num_partitions is 0")
    if used == {"gla"}:
        names = ("gate", "negative_eigenvalues")
        yield from _changed(model.sse, "model.sse", names, "no layer has the gdn recurrence")
    if used == {"gdn"}:
        names = ("decay_low_rank", "decay_normalizer")
        yield from _changed(model.sse, "model.sse", names, "no layer has the gla recurrence")
    if "softmax" not in kinds and model.softmax != SoftmaxConfig():
        yield "model.softmax is ignored: model.layers has no softmax layer"
    if config.data.validation is None:
        names = ("validation_interval", "validation_batches")
        yield from _changed(training, "training", names, "data.validation is null")
    if optimizer.schedule == "constant":
        yield from _changed(optimizer, "optimizer", ("min_learning_rate",), "optimizer.schedule is constant")
    if optimizer.schedule != "wsd" and optimizer.decay_steps:
        yield f"optimizer.decay_steps is ignored: optimizer.schedule is {optimizer.schedule}, not wsd"


def _changed(section: Section, prefix: str, names: tuple[str, ...], reason: str) -> Iterator[str]:
    fields = type(section).model_fields
    for name in names:
        if getattr(section, name) != fields[name].default:
            yield f"{prefix}.{name} is ignored: {reason}"
