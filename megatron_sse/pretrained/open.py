"""A model in a folder, a checkpoint of ours or a Hugging Face folder: its settings and its weights."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sse.checkpoint.folders import named_checkpoint
from megatron_sse.checkpoint.full_weights import CheckpointWeights, read_weights
from megatron_sse.config import RunConfig, load_config
from megatron_sse.config.load import make_config
from megatron_sse.config.pattern import shorten_pattern
from megatron_sse.config.weights import model_weights
from megatron_sse.errors import UserError
from megatron_sse.hf.dense_settings import FAMILIES, model_from_dense
from megatron_sse.hf.exported.settings_megatron_sse import complete_settings
from megatron_sse.hf.folder import CONFIG, HFWeights, read_json
from megatron_sse.hf.links import Link, check_shapes, to_ours
from megatron_sse.hf.name_map import DENSE_NAMES, OUTPUT, SSE_NAMES, model_links
from megatron_sse.hf.schema import FolderSchema, OwnSchema
from megatron_sse.hf.sse_settings import MODEL_TYPE as SSE
from megatron_sse.hf.sse_settings import model_from_sse
from megatron_sse.reading import check
from megatron_sse.run_folder import CONFIG as RUN_CONFIG

# Kinds of folders: a checkpoint of ours, one with our modeling file, the SSE authors' layout, families of transformers.
OURS, HF = "ours", "hf"
KINDS = (OURS, HF, SSE, *FAMILIES)
HF_MODEL_TYPE = "megatron_sse"

_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Model:
    """A model in a folder.

    kind: one of KINDS. config: with default settings for all that is not the model, unless the folder is of OURS.
    weights: the tensors in the folder. links: how they become ours; empty for OURS, whose tensors have their own names.
    """

    kind: str
    folder: Path
    config: RunConfig
    weights: CheckpointWeights | HFWeights
    links: list[Link]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the complete tensors of our model with their names, one after the other."""
        if self.kind == OURS:
            return ((name, self.weights.get(name)) for name in self.weights.keys())
        return to_ours(self.links, self.weights)


def find_model(key: str, path: str | Path) -> Path:
    """Return the folder of a model: a Hugging Face folder itself, or the best checkpoint of a run or folder.

    key: the argument that gives the path. Raises UserError.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{key}: folder {path} not found")
    return folder if (folder / CONFIG).is_file() else named_checkpoint(key, str(path))


def open_model(key: str, path: str | Path, hashes: bool = True) -> Model:
    """Open the model in a folder.

    key: the argument that gives the path. hashes: of the files of a checkpoint are checked, else their sizes. Names and
    shapes of tensors are checked: those of Hugging Face folders here, those of checkpoints when the model is built.
    Raises UserError.
    """
    folder = find_model(key, path)
    return _open_hf(folder) if (folder / CONFIG).is_file() else _open_ours(folder, hashes)


def _open_ours(folder: Path, hashes: bool) -> Model:
    weights, config = read_weights(folder, hashes), load_config(folder / RUN_CONFIG)
    check_shapes({weight.name: weight.shape for weight in model_weights(config.model)}, weights, str(folder))
    return Model(OURS, folder, config, weights, links=[])


def _open_hf(folder: Path) -> Model:
    where = str(folder / CONFIG)
    values = read_json(folder / CONFIG)
    model_type = check(folder / CONFIG, values, FolderSchema).model_type
    if model_type == HF_MODEL_TYPE:
        check(folder / CONFIG, values, OwnSchema)
        try:
            kind, section = HF, complete_settings(values)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        section = section | {"layers": shorten_pattern(section["layers"])}
    elif model_type == SSE:
        kind, section = SSE, model_from_sse(values, where)
    elif model_type in FAMILIES:
        kind, section = model_type, model_from_dense(values, where)
    else:
        allowed = ", ".join((HF_MODEL_TYPE, SSE, *FAMILIES))
        raise UserError(f"{where}: model_type: got {model_type!r}, allowed {allowed}")
    weights = HFWeights(folder)
    config = make_run_config(section, values.get("max_position_embeddings"), precision_of(weights), where)
    links = model_links(config.model, DENSE_NAMES if kind in FAMILIES else SSE_NAMES)
    expected = {part.name: part.shape for link in links for part in link.theirs}

    def unused(name: str) -> bool:
        # A tied output, and tables that older versions saved.
        return (name == OUTPUT and config.model.tie_embeddings) or name.endswith(".inv_freq")

    check_shapes(expected, weights, str(folder), unused)
    return Model(kind, folder, config, weights, links)


def make_run_config(model: dict[str, Any], length: int | None, precision: str, where: str) -> RunConfig:
    """Return settings of a run of a model, with only what is required in all other sections. Raises UserError."""
    values = {
        "model": model,
        "data": {"train": "data/train", "sequence_length": length or _DEFAULT_LENGTH},
        "training": {"steps": 1, "global_batch_size": 1, "precision": precision},
        "optimizer": {"learning_rate": 1e-4},
        "monitor": {"folder": "runs/converted"},
    }
    return make_config(values, {"": where})


def precision_of(weights: CheckpointWeights | HFWeights) -> str:
    """Return training.precision by the type that most numbers of a model have."""
    counts: Counter[torch.dtype] = Counter()
    for name in weights.keys():
        counts[weights.dtype(name)] += weights.shape(name).numel()
    return "bf16" if counts.most_common(1)[0][0] == torch.bfloat16 else "fp32"
