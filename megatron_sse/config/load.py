"""From YAML and command-line overrides to a checked RunConfig; errors name file and line."""

import difflib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_sse.config.megatron import find_transformer_problem
from megatron_sse.config.problem import show
from megatron_sse.config.run import RunConfig
from megatron_sse.errors import UserError
from megatron_sse.reading import YAML_BYTES, describe_yaml_error, parse_yaml, read_text

COMMAND_LINE = "command line"
_OVERRIDE = re.compile(r"(\w+(?:\.\w+)*)=(.*)", re.DOTALL)
_ALLOWED = {
    "missing": "a value, the key is required",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Load the settings of a YAML file and apply `section.key=value` overrides, the last one winning.

    Raises UserError for the first thing that is wrong: one line that starts with file:line or `command line`.
    """
    values, places = _read_file(Path(path))
    for override in overrides or []:
        apply_override(values, places, override)
    places.setdefault("", f"{path}:1")
    return make_config(values, places)


def make_config(values: dict[str, Any], places: dict[str, str]) -> RunConfig:
    """Return the checked settings of the sections in `values`. Raises UserError.

    places: file and line of each dotted key or section; "" holds that of all others.
    """
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        # A misspelled required key is two errors: the unknown key is the one to show.
        details = sorted(error.errors(), key=lambda d: d["type"] != "extra_forbidden")[0]
        raise UserError(_describe(details, places)) from None
    problem = find_transformer_problem(config)
    if problem is not None:
        raise UserError(f"{_place(problem.key, places)}: {problem.key}: {problem.text}")
    return config


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    values, places = _parse(read_text(path, YAML_BYTES), str(path), "", numbered=True)
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: got {show(values)}, allowed the sections {', '.join(RunConfig.model_fields)}")
    return values, places


def apply_override(values: dict[str, Any], places: dict[str, str], override: str) -> None:
    """Apply `section.key=value` to the sections in `values`. Raises UserError."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise UserError(f"{COMMAND_LINE}: got {show(override)}, allowed section.key=value")
    key, text = match[1], match[2]
    value, value_places = _parse(text, COMMAND_LINE, key, numbered=False)
    *parents, name = key.split(".")
    section = values
    for depth, parent in enumerate(parents):
        places.setdefault(".".join(parents[: depth + 1]), COMMAND_LINE)
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            holder = ".".join(parents[: depth + 1])
            raise UserError(f"{COMMAND_LINE}: {key}: {holder} holds a value ({show(section)}), not a section")
    section[name] = value
    places.update(value_places)
    places[key] = COMMAND_LINE


def _parse(text: str, source: str, key: str, numbered: bool) -> tuple[Any, dict[str, str]]:
    """Return the value that a YAML text holds, and the place of every dotted key in it."""
    places: dict[str, str] = {}
    try:
        value = parse_yaml(text, lambda node: places.update(_keys(node, source, key, numbered)))
    except yaml.YAMLError as error:
        line, problem = describe_yaml_error(error)
        place = f"{source}:{line}" if numbered and line is not None else source
        raise UserError(f"{place}:{f' {key}:' if key else ''} not valid YAML: {problem}") from None
    return value, places


def _keys(node: yaml.Node, source: str, prefix: str, numbered: bool) -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            dotted = f"{prefix}.{number}"
            yield dotted, f"{source}:{entry.start_mark.line + 1}" if numbered else source
            yield from _keys(entry, source, dotted, numbered)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        place = f"{source}:{line}" if numbered else source
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith((":str", ":merge")):
            got = show(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or a section"
            raise UserError(f"{place}: {prefix or 'top level'}: got {got} as a key, allowed a name")
        name = key_node.value
        dotted = f"{prefix}.{name}" if prefix else name
        if name in seen:
            raise UserError(f"{place}: {dotted}: given twice, first in line {seen[name]}")
        seen[name] = line
        yield dotted, place
        yield from _keys(value_node, source, dotted, numbered)


def _describe(details: ErrorDetails, places: dict[str, str]) -> str:
    """Return one line for one of pydantic's errors."""
    key = ".".join(str(part) for part in details["loc"])
    context = details.get("ctx", {})
    if "text" in context:
        key = context.get("key", key)
        text = context["text"]
    elif details["type"] == "extra_forbidden":
        text = _describe_unknown(key)
    else:
        given = "nothing" if details["type"] == "missing" else show(details["input"])
        allowed = _ALLOWED.get(details["type"], details["msg"]).format(**context)
        text = f"got {given}, allowed {allowed}"
    return f"{_place(key, places)}: {key}: {text}"


def _describe_unknown(key: str) -> str:
    # Entries of a list are numbered.
    generic = ".".join(part for part in key.split(".") if not part.isdigit())
    parent, _, name = generic.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in schema_keys(True) if other.rpartition(".")[0] == parent]
    # The key may be correct and only its section wrong.
    nearest = [other for other in schema_keys(True) if other.rpartition(".")[2] == name]
    nearest += [f"{parent}.{match}".lstrip(".") for match in difflib.get_close_matches(name, siblings, n=1)]
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"got an unknown key, allowed {', '.join(siblings)}{hint}"


def schema_keys(entries: bool = False, model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, sections included.

    entries: include the keys of list entries, without numbers.
    """
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation, entries):
            keys += schema_keys(entries, section, f"{prefix}{name}.")
    return keys


def _sections(annotation: Any, entries: bool) -> list[type[BaseModel]]:
    """Return the sections that a field of this type holds."""
    if isinstance(annotation, type) and not typing.get_origin(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    # A list, an optional list, or a list with a validator.
    return [section for part in typing.get_args(annotation) for section in _sections(part, entries)] if entries else []


def _place(key: str, places: dict[str, str]) -> str:
    """Return the place of a key; for a key that is not given, that of its section."""
    while key not in places:
        key = key.rpartition(".")[0]
    return places[key]
