"""The report of `megatron-sse plan`, as lines of text."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

from megatron_sse.config import RunConfig
from megatron_sse.config.derive import count_parameters, describe_run
from megatron_sse.config.pattern import LAYER_KINDS
from megatron_sse.costs.flops import forward_flops_per_token, mixer_flops, mlp_flops, train_flops_per_token
from megatron_sse.costs.gpus import Gpu
from megatron_sse.planning.ceilings import GIB, StepTime
from megatron_sse.planning.hand_off import ALGORITHMS, layer_seconds
from megatron_sse.planning.memory import rank_memory
from megatron_sse.planning.search import HEADROOM, LONGEST, Layout, with_settings
from megatron_sse.planning.traffic import AXES
from megatron_sse.visible import count_of

# Rows of the table of memory, by the moment at which it is held.
ALL_THE_TIME, IN_A_LAYER, IN_THE_LOSS = "held all the time", "while a layer is computed", "while the loss is computed"
# Only with rl, and only weights, gradients and optimizer are held then.
IN_GENERATION = "while answers are generated"
MOMENTS = {
    ALL_THE_TIME: ["weights", "gradients", "optimizer", "activations", "states", "tables"],
    IN_A_LAYER: ["recomputed", "hand_off", "metrics", "working"],
    IN_THE_LOSS: ["logits"],
    IN_GENERATION: ["generation"],
}
_MORE_RANKS = "more parallel.context, or parallel.tensor with parallel.sequence"
SMALLER_WITH = {
    "weights": "more parallel.tensor or parallel.pipeline",
    "gradients": "more parallel.tensor or parallel.pipeline",
    "optimizer": "parallel.distributed_optimizer: true and more GPUs",
    "activations": f"training.recompute: full, a smaller training.micro_batch_size, or {_MORE_RANKS}",
    "states": "training.recompute: mixer or full, or fewer model.sse.num_partitions",
    "tables": "more parallel.context",
    "recomputed": f"a smaller training.micro_batch_size, or {_MORE_RANKS}",
    "hand_off": "parallel.hand_off: p2p, or fewer model.sse.num_partitions",
    "metrics": _MORE_RANKS,
    "working": _MORE_RANKS,
    "logits": "a smaller training.loss_chunk, or more parallel.tensor",
    "generation": "a smaller rl.answers_at_once",
}
MAX_STAGES = 8
MAX_LAYOUTS = 15


def describe_layout(layout: Layout, gpu: Gpu, longest: int) -> list[str]:
    """Return all tables about a layout, with blank lines between them."""
    config, sizes = layout.sizes.config, layout.sizes
    num_gpus = sizes.data_size * config.parallel.replica_size
    tables = [
        [line for line in describe_run(config, num_gpus) if not line.startswith("parameters")]
        + [f"documents         {sizes.documents:,} in a sequence"],
        _parameters(config),
        _memory(layout, gpu, longest),
        _operations(config),
        _sent(layout),
        _hand_off(layout, gpu),
        _time(layout, gpu),
    ]
    tables = [table for table in tables if table]
    return [line for number, table in enumerate(tables) for line in ([""] if number else []) + table]


def _parameters(config: RunConfig) -> list[str]:
    counts = count_parameters(config.model)
    total = sum(counts.values())
    lines = [f"  {name:<26}{count:>18,}  {count / total:>6.1%}" for name, count in counts.items() if count]
    return ["parameters", *lines, f"  {'total':<26}{total:>18,}"]


def _memory(layout: Layout, gpu: Gpu, longest: int) -> list[str]:
    stages = _shown_stages(len(layout.memory))
    columns = [f"stage {stage}" for stage in stages]
    lines = [f"{'memory of a GPU, GiB':<28}" + "".join(f"{name:>12}" for name in columns)]
    for group, names in MOMENTS.items():
        if group == IN_GENERATION and layout.sizes.config.rl is None:
            continue
        lines.append(f"  {group}")
        for name in names:
            values = [getattr(layout.memory[stage], name) for stage in stages]
            lines.append(_row(f"  {name.replace('_', ' ')}", values))
    lines.append(_row("total", [layout.memory[stage].total for stage in stages]))
    other = "none" if layout.sizes.config.training.recompute == "full" else "full"
    lines.append(_row(f"with recompute: {other}", [_total_with(layout, stage, other) for stage in stages]))
    room = (1 - HEADROOM) * gpu.memory
    verdict = "fits" if layout.fits(gpu) else "does NOT fit"
    lines.append(f"  {verdict}: {layout.peak / GIB:,.1f} GiB of {room / GIB:,.1f} ({gpu.name}, 10 % left free)")
    if not layout.fits(gpu):
        lines.append(f"  {_advice(layout)}")
    more = " or more" if longest >= LONGEST // 2 else ""
    lines.append(f"  longest sequence that fits: {longest:,} tokens{more}" if longest else "  no sequence fits")
    return lines


def _advice(layout: Layout) -> str:
    """Return which part of the memory is the largest on the fullest stage, and what makes it smaller."""
    memory = max(layout.memory, key=lambda memory: memory.total)
    # What is not held at the fullest moment limits nothing.
    in_layer, in_loss = MOMENTS[IN_A_LAYER], MOMENTS[IN_THE_LOSS]
    layer, loss = (sum(getattr(memory, name) for name in names) for names in (in_layer, in_loss))
    names = [*MOMENTS[ALL_THE_TIME], *(in_layer if layer >= loss else in_loss)]
    if memory.is_fullest_in_generation:
        names = ["weights", "gradients", "optimizer", *MOMENTS[IN_GENERATION]]
    largest = max(names, key=lambda name: getattr(memory, name))
    share = getattr(memory, largest) / memory.total
    return f"largest: {largest.replace('_', ' ')}, {share:.0%}; smaller with {SMALLER_WITH[largest]}"


def _shown_stages(number: int) -> list[int]:
    return list(range(number)) if number <= MAX_STAGES else [*range(MAX_STAGES - 1), number - 1]


def _total_with(layout: Layout, stage: int, recompute: str) -> int:
    """Return a stage's total memory with this setting of training.recompute."""
    config = with_settings(layout.sizes.config, training={"recompute": recompute})
    return rank_memory(replace(layout.sizes, config=config), stage).total


def _row(name: str, values: list[int]) -> str:
    return f"  {name:<26}" + "".join(f"{value / GIB:>12,.3f}" for value in values)


def _operations(config: RunConfig) -> list[str]:
    model, length = config.model, config.data.sequence_length
    used = Counter(model.layer_kinds())
    lines = [f"operations per token at {length:,} tokens, millions"]
    for kind in LAYER_KINDS:
        settings = model.softmax if kind == "softmax" else model.sse
        if settings.num_heads is None or settings.head_dim is None:
            continue
        count = mixer_flops(model, kind, length)
        lines.append(f"  {f'{kind} layer, forward':<26}{count / 1e6:>18,.1f}  {used[kind]} in the model")
    lines.append(f"  {'MLP, forward':<26}{mlp_flops(model) / 1e6:>18,.1f}")
    lines.append(f"  {'model, forward':<26}{forward_flops_per_token(model, length) / 1e6:>18,.1f}")
    lines.append(f"  {'model, training':<26}{train_flops_per_token(model, length) / 1e6:>18,.1f}")
    return lines


def _sent(layout: Layout) -> list[str]:
    lines = ["bytes sent by a GPU in a step, the largest of all stages"]
    for axis in AXES:
        lines.append(f"  {axis:<26}{max(sent[axis] for sent in layout.sent):>18,}")
    return lines


def _hand_off(layout: Layout, gpu: Gpu) -> list[str]:
    """Return what a layer's hand-off takes by algorithm; nothing without SSE layers or context ranks."""
    sizes = layout.sizes
    kinds = set(sizes.config.model.layer_kinds()) - {"softmax"}
    if sizes.config.parallel.context == 1 or not kinds:
        return []
    chosen, per_node = sizes.hand_off
    ranks = count_of(per_node, "context rank")
    lines = [f"milliseconds of a layer's hand-off, forward and backward ({ranks} on a machine)"]
    for algorithm in ALGORITHMS:
        seconds = max(sum(layer_seconds(sizes, kind, gpu, algorithm)) for kind in kinds)
        mark = "  chosen" if algorithm == chosen else ""
        lines.append(f"  {algorithm:<26}{1000 * seconds:>18.3f}{mark}")
    return lines


def _time(layout: Layout, gpu: Gpu) -> list[str]:
    time, config = layout.time, layout.sizes.config
    tokens = config.training.global_batch_size * config.data.sequence_length
    num_gpus = layout.sizes.data_size * config.parallel.replica_size
    names = {"products": "matrix products", "memory": "or memory, if longer", "idle": "waiting for stages"}
    lines = [f"seconds of a step at the ceilings of {num_gpus} x {gpu.name}: no run is faster"]
    for field in fields(StepTime):
        name = names.get(field.name, f"sending, {field.name}")
        lines.append(f"  {name:<26}{getattr(time, field.name):>18.4g}")
    lines.append(f"  {'total':<26}{time.total:>18.4g}")
    lines.append(f"  {'tokens per second and GPU':<26}{tokens / time.total / num_gpus:>18,.0f}")
    return lines


def describe_search(layouts: list[Layout], num_gpus: int, gpu: Gpu) -> list[str]:
    """Return a line for each of the fastest layouts; where none fits, the nearest one and what it lacks.

    layouts: what search_layouts returns.
    """
    if not layouts:
        return [f"no layout divides heads, layers, sequence and batch over {count_of(num_gpus, 'GPU')}"]
    if layouts[0].fits(gpu):
        first = f"layouts of {count_of(num_gpus, 'GPU')} that fit, the fastest first ({len(layouts)} found)"
        return [first, *_table(layouts[:MAX_LAYOUTS])]
    room = (1 - HEADROOM) * gpu.memory
    lacks = f"it lacks {(layouts[0].peak - room) / GIB:,.1f} GiB of memory per GPU ({room / GIB:,.1f} there)"
    advice = f"more GPUs, a smaller micro-batch or a shorter sequence would help; {_advice(layouts[0])}"
    return [f"no layout of {count_of(num_gpus, 'GPU')} fits; the nearest:", *_table(layouts), f"{lacks}; {advice}"]


def _table(layouts: list[Layout]) -> list[str]:
    lines = [
        f"{'tensor':>8}{'pipeline':>10}{'virtual':>9}{'context':>9}{'data':>6}  {'recompute':<10}{'GiB':>8}{'s':>10}"
    ]
    for layout in layouts:
        parallel, data = layout.sizes.config.parallel, layout.sizes.data_size
        recompute = layout.sizes.config.training.recompute
        name = "+".join(recompute) if isinstance(recompute, list) else recompute
        lines.append(
            f"{parallel.tensor:>8}{parallel.pipeline:>10}{parallel.virtual_pipeline:>9}{parallel.context:>9}{data:>6}  "
            f"{name:<10}{layout.peak / GIB:>8.1f}{layout.time.total:>10.4g}"
        )
    return lines
