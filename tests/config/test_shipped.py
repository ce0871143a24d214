"""Shipped YAML files load, and reference.yaml documents the complete schema."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_sse.config import RunConfig, ignored_settings, load_config
from megatron_sse.config.load import schema_keys

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def read_reference() -> dict[str, tuple[str, str]]:
    """Return value text and comment of every line of reference.yaml, by dotted key."""
    found, parents = {}, []
    for line in (CONFIGS / "reference.yaml").read_text().splitlines():
        match = re.fullmatch(r"( *)(\w+):([^#]*)(?:# (.*))?", line)
        if match is None:
            continue
        depth = len(match[1]) // 2
        parents = [*parents[:depth], match[2]]
        found[".".join(parents)] = (match[3].strip(), match[4] or "")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_loads_without_ignored_settings(path: Path) -> None:
    config = load_config(path)
    assert ignored_settings(config) == []
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_reference_has_every_key_of_the_schema() -> None:
    assert sorted(read_reference()) == sorted(schema_keys())


def test_reference_says_every_default() -> None:
    wrong = []
    for key, (_, comment) in read_reference().items():
        section = RunConfig
        *parents, name = key.split(".")
        for parent in parents:
            section = section.model_fields[parent].annotation
        field = section.model_fields[name]
        if hasattr(field.annotation, "model_fields"):
            continue
        stated = re.search(r"; (?:required|default (\S+))$", comment)
        if stated is None:
            wrong.append(f"{key}: no default stated")
        elif field.is_required():
            wrong += [f"{key}: is required"] if stated[1] else []
        else:
            default = field.get_default(call_default_factory=True)
            value = yaml.safe_load(stated[1] or "missing")
            value = float(value) if isinstance(default, float) else value
            wrong += [f"{key}: says {value!r}, is {default!r}"] if value != default else []
    assert wrong == []
