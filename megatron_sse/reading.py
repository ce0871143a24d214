"""Reading small files of any origin: ordinary files of bounded size, and JSON and YAML of bounded depth.

What they hold is checked against a type, so that a damaged or hostile file is a UserError of one line: never a
traceback, a wait or a full memory.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_sse.errors import UserError

Content = TypeVar("Content")

# An index of a large model has some MiB.
JSON_BYTES = 1 << 26
# PyYAML needs about ten seconds for a MiB.
YAML_BYTES = 1 << 20
# Levels of nested lists and sections, and values in all of them with aliases (`*name`) expanded.
YAML_DEPTH, YAML_VALUES = 32, 100_000
# No setting has so many; Python refuses to read more than 4,300.
_TOO_MANY_DIGITS = re.compile(r"[-+]?[0-9_]{100,}")


class NotFoundError(UserError):
    """A UserError for a file that is not there."""


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of an ordinary file (or of a link to one) of at most `limit` bytes. Raises UserError.

    Folders, named pipes and devices are refused without waiting for anything.
    """
    try:
        # A named pipe would otherwise wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: not a regular file")
            content = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{str(path)!r}: cannot be read (not a path)") from None
    if len(content) > limit:
        raise UserError(f"{path}: cannot be read (more than {limit:,} bytes)")
    return content


def read_text(path: Path, limit: int) -> str:
    """Return the text of an ordinary file of at most `limit` bytes in UTF-8. Raises UserError."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as a text file (byte {error.start} is not UTF-8)") from None


def read_json(path: Path, schema: type[Content], limit: int = JSON_BYTES) -> Content:
    """Return the JSON in a file as a value of `schema`: any type that pydantic knows, without conversions.

    Raises UserError.
    """
    content = read_bytes(path, limit)
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: cannot be read as JSON ({_first(error)})") from None


def read_yaml(path: Path, schema: type[Content]) -> Content:
    """Return the YAML in a file as a value of `schema`, as read_json does. Raises UserError."""
    text = read_text(path, YAML_BYTES)
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        line, problem = describe_yaml_error(error)
        raise UserError(f"{path}{f':{line}' if line else ''}: not valid YAML: {problem}") from None
    return check(path, value, schema)


def check(path: Path, value: object, schema: type[Content]) -> Content:
    """Return a value that was read from a file, once it is known to be of type `schema`. Raises UserError."""
    try:
        return TypeAdapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from None


def parse_yaml(text: str, visit: Callable[[yaml.Node], object] | None = None) -> Any:
    """Return the value of a YAML text; None where it is empty.

    Only what JSON can also hold: there are no tags, dates or numbers to the base 60 (1:30), no characters that a
    path cannot have. visit: called with the text's node, before merge keys (`<<`) are resolved. Raises yaml.YAMLError.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if visit is not None:
            visit(node)
        return loader.construct_document(node)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def describe_yaml_error(error: yaml.YAMLError) -> tuple[int | None, str]:
    """Return the line, where it is known, and one line that says what is wrong."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return None, " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    return None if mark is None else mark.line + 1, f"{error.problem or error.context}"


class _Loader(yaml.SafeLoader):
    """SafeLoader with bounds; it also reads 1e-3 as a number, which YAML 1.1 takes for a string."""

    # Filled below.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self._level = 0
        # Depth and number of values of each complete node.
        self._extents: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()

        def refuse(problem: str) -> None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)

        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._extents:
                refuse("an alias inside of what it stands for")
            return node
        if getattr(event, "tag", None) not in (None, "!"):
            refuse(f"got the tag {event.tag!r}, allowed values without tags")
        if isinstance(event, yaml.ScalarEvent) and any(map(_is_no_text, event.value)):
            refuse("got a character that no text has")
        if isinstance(event, yaml.ScalarEvent) and event.style is None and _TOO_MANY_DIGITS.fullmatch(event.value):
            refuse("got a number of too many digits")
        self._level += 1
        if self._level > YAML_DEPTH:
            refuse("nested too deeply")
        node = super().compose_node(parent, index)
        self._level -= 1
        assert node is not None
        self._extents[node] = depth, number = self._measure(node)
        if depth > YAML_DEPTH:
            refuse("nested too deeply")
        if number > YAML_VALUES:
            refuse(f"more than {YAML_VALUES:,} values")
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        extents = [self._extents[child] for child in children]
        return 1 + max((depth for depth, _ in extents), default=0), 1 + sum(number for _, number in extents)


def _is_no_text(character: str) -> bool:
    """Check for NUL, which no path can hold, and for halves of a character, which cannot be written as UTF-8."""
    return character == "\0" or "\ud800" <= character <= "\udfff"


for _tag, _pattern, _first_characters in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)", "-+0123456789"),
    ("float", r"[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _characters = ["" if _character == "\0" else _character for _character in _first_characters]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _characters)


def _first(error: ValidationError) -> str:
    """Return one line for the first thing that is wrong with a value, without the value, which may be anything."""
    details = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:40] for part in details["loc"][:8])
    message = " ".join(details["msg"].split())
    return f"{place}: {message}" if place else message
