"""The settings that a checkpoint was saved with, beside those of a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_sse.config import RunConfig
from megatron_sse.config.problem import show
from megatron_sse.errors import UserError
from megatron_sse.reading import read_yaml
from megatron_sse.run_folder import CONFIG


def changed_settings(path: Path, config: RunConfig, keys: Iterable[str]) -> list[str]:
    """Return a line for each of these settings that has another value in the checkpoint's YAML than in this run."""
    try:
        saved = flatten(read_yaml(path / CONFIG, dict[str, Any]))
    except UserError:
        return []
    now = flatten(config.model_dump(mode="json"))
    return [
        f"{key}: {show(saved[key])} in the checkpoint, {show(now[key])} in this run"
        for key in keys
        if key in saved and key in now and saved[key] != now[key]
    ]


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their keys, such as model.sse.head_dim."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
