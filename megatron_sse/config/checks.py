"""Settings that are each allowed but do not fit together."""

from __future__ import annotations

from megatron_sse.config.context import USE_NODES, context_problems, straddles_slots
from megatron_sse.config.pattern import expand_pattern
from megatron_sse.config.problem import Found, Problem, show
from megatron_sse.config.rl_checks import rl_problems
from megatron_sse.config.schema import Settings
from megatron_sse.recurrence import RECURRENCES

BYTE_VOCABULARY = 257


def find_problem(config: Settings) -> Problem | None:
    """Return the first contradiction in the settings, or None."""
    layers = _layers, _linear_layers, _recurrences, _softmax_layers
    for check in (*layers, context_problems, _sizes, _tasks, _pipeline, _run, rl_problems):
        for key, given, allowed in check(config):
            return Problem(key, f"got {show(given)}, allowed {allowed}")
    return None


def _layers(config: Settings) -> Found:
    model = config.model
    period = len(expand_pattern(model.layers))
    if model.num_layers % period:
        yield "model.num_layers", model.num_layers, f"a multiple of {period}, the number of layers in model.layers"


def _linear_layers(config: Settings) -> Found:
    sse = config.model.sse
    kinds = sorted(set(config.model.layer_kinds()) - {"softmax"})
    if not kinds:
        return
    for name in ("num_heads", "head_dim"):
        if getattr(sse, name) is None:
            yield f"model.sse.{name}", None, f"a number, since model.layers has {kinds[0]} layers"
    if sse.num_value_heads % sse.num_heads:
        yield "model.sse.num_value_heads", sse.num_value_heads, f"a multiple of model.sse.num_heads {sse.num_heads}"
    if sse.num_heads % config.parallel.tensor:
        yield "model.sse.num_heads", sse.num_heads, f"a multiple of parallel.tensor {config.parallel.tensor}"
    if "sse" in kinds and sse.num_partitions:
        for name in ("num_writers", "num_readers"):
            if getattr(sse, name) > sse.num_partitions:
                yield f"model.sse.{name}", getattr(sse, name), f"at most model.sse.num_partitions {sse.num_partitions}"
        if sse.gate == "beta" and RECURRENCES[sse.recurrence].delta_rule and sse.num_writers > 1:
            yield "model.sse.num_writers", sse.num_writers, "1 with model.sse.gate beta"
    if "sse" in kinds and not sse.shared_bank:
        if not sse.num_partitions:
            yield "model.sse.shared_bank", False, "true while model.sse.num_partitions is 0"
        if sse.short_convolution:
            allowed = "0 while model.sse.shared_bank is false: it is on queries and keys of the shared bank"
            yield "model.sse.short_convolution", sse.short_convolution, allowed


def _recurrences(config: Settings) -> Found:
    sse, delta_rules = config.model.sse, _delta_rules(config)
    if sse.key_map == "topk_softmax":
        if sse.key_topk is None:
            yield "model.sse.key_topk", None, "a number of rows, since model.sse.key_map is topk_softmax"
        elif sse.key_topk > sse.head_dim:
            yield "model.sse.key_topk", sse.key_topk, f"at most model.sse.head_dim {sse.head_dim}"
    elif sse.key_topk is not None:
        yield "model.sse.key_topk", sse.key_topk, "null unless model.sse.key_map is topk_softmax"
    if delta_rules and sse.key_map in ("topk_softmax", "one_minus_decay"):
        yield "model.sse.key_map", sse.key_map, f"null, softmax, silu with the {delta_rules[0]} recurrence"
    if delta_rules and sse.decay != "gate":
        yield "model.sse.decay", sse.decay, f"gate with the {delta_rules[0]} recurrence"
    if sse.key_map == "one_minus_decay" and sse.decay != "gate":
        yield "model.sse.decay", sse.decay, "gate, since model.sse.key_map is one_minus_decay"


def _delta_rules(config: Settings) -> list[str]:
    """Return the names of the recurrences in use that follow the delta rule."""
    return sorted(row.name for row in config.model.recurrences() if row.delta_rule)


def _softmax_layers(config: Settings) -> Found:
    model, tensor = config.model, config.parallel.tensor
    softmax = model.softmax
    if "softmax" not in model.layer_kinds():
        return
    if softmax.num_heads is None:
        yield "model.softmax.num_heads", None, "a number, since model.layers has softmax layers"
    if softmax.head_dim is None:
        allowed = f"a divisor of model.hidden_size {model.hidden_size} while model.softmax.head_dim is null"
        yield "model.softmax.num_heads", softmax.num_heads, allowed
    if softmax.num_heads % softmax.num_kv_heads:
        yield (
            "model.softmax.num_kv_heads",
            softmax.num_kv_heads,
            f"a divisor of model.softmax.num_heads {softmax.num_heads}",
        )
    if softmax.num_heads % tensor:
        yield "model.softmax.num_heads", softmax.num_heads, f"a multiple of parallel.tensor {tensor}"
    # In Megatron each tensor rank has complete key heads, or several ranks share one.
    if softmax.num_kv_heads % tensor and tensor % softmax.num_kv_heads:
        yield "model.softmax.num_kv_heads", softmax.num_kv_heads, f"a multiple or divisor of parallel.tensor {tensor}"
    if softmax.rotary_base and softmax.head_dim % 2:
        yield "model.softmax.head_dim", softmax.head_dim, "an even number, or model.softmax.rotary_base 0"
    scaling = softmax.rotary_scaling
    if scaling is not None and scaling.low_turns >= scaling.high_turns:
        allowed = f"less than model.softmax.rotary_scaling.high_turns {scaling.high_turns}"
        yield "model.softmax.rotary_scaling.low_turns", scaling.low_turns, allowed


def _sizes(config: Settings) -> Found:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    if model.ffn_hidden_size % parallel.tensor:
        yield "model.ffn_hidden_size", model.ffn_hidden_size, f"a multiple of parallel.tensor {parallel.tensor}"
    if model.padded_vocab_size % parallel.tensor:
        allowed = f"a value that pads the vocabulary to a multiple of parallel.tensor {parallel.tensor}"
        yield "model.vocab_multiple", model.vocab_multiple, allowed
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence", True, "false, or null for the default, while parallel.tensor is 1"
    split = parallel.tensor if parallel.sequence else 1
    if length % (parallel.context * split):
        factors = [f"parallel.context {parallel.context}"] if parallel.context > 1 else []
        factors += [f"parallel.tensor {parallel.tensor} (parallel.sequence)"] if split > 1 else []
        allowed = f"a multiple of {parallel.context * split}: {' x '.join(factors)}"
        if split > 1 and not length % parallel.context:
            allowed += ", or parallel.sequence false"
        yield "data.sequence_length", length, allowed
    # Two slots a rank, and under sequence parallelism each slot divides among the tensor ranks.
    if parallel.layout == "zigzag" and length % (2 * parallel.context * split):
        allowed = f"a multiple of {2 * parallel.context * split} with parallel.layout zigzag"
        if split > 1 and not length % (2 * parallel.context):
            allowed += ", or parallel.sequence false"
        yield "data.sequence_length", length, allowed
    if parallel.layout == "zigzag" and straddles_slots(config):
        allowed = "auto, contiguous with model.input_convolution, parallel.sequence and an odd parallel.tensor"
        yield "parallel.layout", "zigzag", allowed
    uses_nodes = parallel.context > 1 and parallel.hand_off in USE_NODES
    if uses_nodes and parallel.context % (parallel.context_per_node or 1):
        yield (
            "parallel.context_per_node",
            parallel.context_per_node,
            f"a divisor of parallel.context {parallel.context}",
        )
    data = config.data
    if data.validation_share and data.validation is not None:
        yield "data.validation_share", data.validation_share, "0.0 where data.validation is given"
    if data.corpus is not None:
        for key, blend in (("data.train", data.train), ("data.validation", data.validation)):
            files = [source for source in blend or [] if source.prefix]
            if len(files) > 1:
                yield key, f"{len(files)} token files", "one with data.corpus"
    if config.data.corpus is not None and model.vocab_size != BYTE_VOCABULARY:
        allowed = f"{BYTE_VOCABULARY} (256 byte values and the end of a document) with data.corpus"
        yield "model.vocab_size", model.vocab_size, allowed


def _tasks(config: Settings) -> Found:
    data, vocab_size = config.data, config.model.vocab_size
    blends = {"data.train": data.train, "data.validation": data.validation or []}
    named = [(f"{key}.{number}", source) for key, blend in blends.items() for number, source in enumerate(blend)]
    for key, source in named:
        mqar = source.mqar
        if source.needle is not None and vocab_size < BYTE_VOCABULARY:
            yield "model.vocab_size", vocab_size, f"{BYTE_VOCABULARY} or more: {key}.needle is text of byte tokens"
        if mqar is None:
            continue
        if mqar.pairs > min(mqar.keys, data.sequence_length // 3):
            allowed = f"at most its {mqar.keys} keys, and {data.sequence_length // 3}, a third of data.sequence_length"
            yield f"{key}.mqar.pairs", mqar.pairs, allowed
        if vocab_size < (needed := mqar.keys + mqar.values + 1):
            yield "model.vocab_size", vocab_size, f"{needed} or more: {key}.mqar has keys, values and a token for gaps"


def _pipeline(config: Settings) -> Found:
    parallel, num_layers = config.parallel, config.model.num_layers
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield "parallel.virtual_pipeline", parallel.virtual_pipeline, "1 while parallel.pipeline is 1"
    if num_layers % parallel.pipeline:
        yield "parallel.pipeline", parallel.pipeline, f"a divisor of model.num_layers {num_layers}"
    if num_layers % (parallel.pipeline * parallel.virtual_pipeline):
        allowed = f"a divisor of the {num_layers // parallel.pipeline} layers of a pipeline stage"
        yield "parallel.virtual_pipeline", parallel.virtual_pipeline, allowed


def _run(config: Settings) -> Found:
    training, optimizer = config.training, config.optimizer
    yield from batch_problems(config, config.parallel.data or 1)
    yield from _distill(config)
    stay = max(0, training.steps - optimizer.warmup_steps)
    if optimizer.schedule == "wsd" and optimizer.decay_steps > stay:
        yield "optimizer.decay_steps", optimizer.decay_steps, f"at most the {stay} steps after the warm-up"
    if optimizer.min_learning_rate > optimizer.learning_rate:
        allowed = f"at most optimizer.learning_rate {optimizer.learning_rate}"
        yield "optimizer.min_learning_rate", optimizer.min_learning_rate, allowed
    for name in ("profile_steps", "memory_steps"):
        window = getattr(config.monitor, name)
        if window is not None and window[1] > training.steps:
            yield f"monitor.{name}", window, f"steps up to training.steps {training.steps}"


def _distill(config: Settings) -> Found:
    distill, pipeline = config.training.distill, config.parallel.pipeline
    if distill is None:
        return
    if config.rl is not None:
        yield "training.distill", "a teacher", "null with rl, whose loss has no teacher"
    if pipeline > 1:
        yield "parallel.pipeline", pipeline, "1 with training.distill: the teacher has no pipeline stages"
    if not distill.logits and not distill.hidden:
        yield "training.distill.logits", distill.logits, "more than 0 while training.distill.hidden is 0, too"


def batch_problems(config: Settings, data_size: int) -> Found:
    """Yield batch sizes, of the run and of its stages, that do not divide among `data_size` data-parallel ranks.

    With rl any size divides: what is generated fills as many sequences as it needs, and empty ones.
    """
    if config.rl is not None:
        return
    training, pipeline = config.training, config.parallel.pipeline
    batches = {"training": (training.global_batch_size, training.micro_batch_size)}
    for number, stage in enumerate(config.stages or []):
        sizes = stage.global_batch_size or batches["training"][0], stage.micro_batch_size or batches["training"][1]
        batches[f"stages.{number}"] = sizes
    for section, (batch, micro_batch) in batches.items():
        per_pass, key = micro_batch * data_size, f"{section}.global_batch_size"
        if batch % per_pass:
            yield key, batch, f"a multiple of {per_pass} (micro-batch {micro_batch} x {data_size} data-parallel)"
        elif config.parallel.virtual_pipeline > 1 and (batch // per_pass) % pipeline:
            allowed = f"a multiple of {per_pass * pipeline}"
            yield key, batch, f"{allowed} (micro-batches in multiples of parallel.pipeline with virtual stages)"
