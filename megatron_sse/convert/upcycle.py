"""Softmax models into SSE hybrids: which layers become SSE layers, and where the weights of those come from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sse.config import RunConfig
from megatron_sse.config.load import COMMAND_LINE, apply_override, make_config
from megatron_sse.config.weights import Weight, model_weights
from megatron_sse.errors import UserError
from megatron_sse.hf.dense_settings import FAMILIES
from megatron_sse.hf.links import Link, Part
from megatron_sse.hf.name_map import DENSE_NAMES, model_links
from megatron_sse.model.initialize import draw_full
from megatron_sse.pretrained.open import Model

# These follow from the source.
_FIXED = ("num_heads", "head_dim", "value_head_dim", "num_value_heads")
# Up-projections of the low-rank part of the sparse banks' queries and keys: with zeros all banks start equal.
_ZERO = (".query_lora.up.weight", ".key_lora.up.weight")


@dataclass(frozen=True)
class Recipe:
    """Where one tensor of the upcycled model comes from.

    link: the tensor and its parts, which have the source's names where it has them. sources: per part, in words.
    """

    link: Link
    sources: tuple[str, ...]


def upcycle_config(source: Model, pattern: str, overrides: Iterable[str]) -> RunConfig:
    """Return the settings of the source with other layers. overrides: model.sse.key=value. Raises UserError."""
    if source.kind not in FAMILIES:
        raise UserError(f"--pattern: got a {source.kind} folder as SRC, allowed {', '.join(FAMILIES)}")
    values = source.config.model_dump()
    softmax = source.config.model.softmax
    values["model"]["layers"] = pattern
    values["model"]["sse"] = {"num_heads": softmax.num_heads, "head_dim": softmax.head_dim}
    places = {"": COMMAND_LINE}
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith("model.sse.") or key.rpartition(".")[2] in _FIXED:
            raise UserError(f"{COMMAND_LINE}: got {key}, allowed keys of model.sse except {', '.join(_FIXED)}")
        apply_override(values, places, override)
    return make_config(values, places)


def upcycle_recipes(source: Model, config: RunConfig) -> list[Recipe]:
    """Return a recipe for every tensor of the upcycled model."""
    links = model_links(config.model, DENSE_NAMES)
    return [Recipe(link, tuple(_describe(source, link, part) for part in link.theirs)) for link in links]


def unused_names(source: Model, recipes: list[Recipe]) -> list[str]:
    """Return the tensors of the source that the upcycled model does not use."""
    used = {part.name for recipe in recipes for part in recipe.link.theirs}
    return [part.name for link in source.links for part in link.theirs if part.name not in used]


def upcycle_tensors(source: Model, config: RunConfig, recipes: list[Recipe]) -> Iterator[tuple[str, Tensor]]:
    """Yield the upcycled model's tensors, one after the other."""
    dtype = source.weights.dtype(DENSE_NAMES.embedding)
    names = set(source.weights.keys())
    weights = {weight.name: weight for weight in model_weights(config.model)}
    for recipe in recipes:
        link, weight = recipe.link, weights[recipe.link.ours]
        drawn: list[Tensor | None] = [None] * len(link.theirs)
        if any(part.name not in names for part in link.theirs):
            drawn = list(link.split(_draw(weight, config, torch.float32 if weight.fp32 else dtype)))
        taken = [read_part(source, part) if part.name in names else drawn[i] for i, part in enumerate(link.theirs)]
        yield link.ours, link.join(*taken)


def read_part(source: Model, part: Part) -> Tensor:
    """Return a tensor of the source; key and value heads that query heads share are repeated for each of these."""
    tensor = source.weights.get(part.name)
    repeats = part.shape[0] // tensor.shape[0]
    if repeats == 1:
        return tensor
    # Two key heads for four query heads: rows of heads a b become a a b b, the order of the query heads.
    heads = tensor.unflatten(0, (-1, source.config.model.softmax.head_dim))
    return heads.repeat_interleave(repeats, dim=0).flatten(0, 1)


def _draw(weight: Weight, config: RunConfig, dtype: torch.dtype) -> Tensor:
    if weight.name.endswith(_ZERO):
        return torch.zeros(weight.shape, dtype=dtype)
    return draw_full(weight, config.model, config.training.seed).to(dtype)


def _describe(source: Model, link: Link, part: Part) -> str:
    if part.name in source.weights.keys():
        repeats = part.shape[0] // source.weights.shape(part.name)[0]
        return part.name if repeats == 1 else f"{part.name} (each head {repeats} times)"
    return "zeros" if link.ours.endswith(_ZERO) else f"drawn ({part.name.rpartition('self_attn.')[2]})"
