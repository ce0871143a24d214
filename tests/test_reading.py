"""Reading JSON and YAML: bounds, types, and what is not a regular file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_sse import reading
from megatron_sse.errors import UserError
from megatron_sse.reading import NotFoundError, read_bytes, read_json, read_yaml


@dataclass(frozen=True)
class Entry:
    size: int
    names: list[str]


def test_json_becomes_a_value_of_its_type(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"size": 3, "names": ["x"], "newer": 1}')
    assert read_json(path, Entry) == Entry(3, ["x"])
    assert read_json(path, dict[str, Any])["newer"] == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    {
        b'{"size": "3", "names": []}': "size: Input should be a valid integer",
        b'{"size": true, "names": []}': "size: Input should be a valid integer",
        b'{"size": 3, "names": [1]}': "names.0: Input should be a valid string",
        b'{"size": 3}': "names: Field required",
        b"[]": "Input should be an object",
        b"": "Invalid JSON: EOF .*",
        b"\xff": "Invalid JSON: .*",
        b'"\\ud800"': "Invalid JSON: .*",
        b"[" * 500_000: "Invalid JSON: recursion limit exceeded .*",
        b"9" * 500_000: "Invalid JSON: number out of range .*",
    }.items(),
    ids=lambda value: str(value)[:20],
)
def test_wrong_json_is_one_line(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.json: cannot be read as JSON \({problem}\)$"):
        read_json(tmp_path / "a.json", Entry)


def aliases(levels: int, each: int) -> str:
    """Return lists of `each` aliases of the list before: each ** levels values when they are expanded."""
    lines = [f"a0: &a0 [{', '.join('1' * each)}]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * each)}]" for level in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    {
        "a: !!bool maybe": "1: not valid YAML: got the tag 'tag:yaml.org,2002:bool', allowed values without tags",
        "a: !!int ''": "1: not valid YAML: got the tag .*",
        "a:\n  !!timestamp x": "2: not valid YAML: got the tag .*",
        "!!python/object/apply:os.system [x]": "1: not valid YAML: got the tag .*",
        'a: "\\0"': "1: not valid YAML: got a character that no text has",
        'a: "\\ud800"': "1: not valid YAML: got a character that no text has",
        "a: \0": " not valid YAML: unacceptable character .*",
        "a: &a [*a]": "1: not valid YAML: an alias inside of what it stands for",
        aliases(30, 10): "5: not valid YAML: more than 100,000 values",
        aliases(1000, 1): "32: not valid YAML: nested too deeply",
        "a: " + "[" * 100_000: "1: not valid YAML: nested too deeply",
        "- " * 100_000: "1: not valid YAML: nested too deeply",
        "b: 1\na: " + "9" * 5000: "2: not valid YAML: got a number of too many digits",
        "[1]": " Input should be a valid dictionary",
        "a: [}": "1: not valid YAML: expected the node content, but found '}'",
    }.items(),
    ids=lambda value: value[:20].replace("\0", "NUL"),
)
def test_wrong_yaml_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=f"a.yaml:{problem}$"):
        read_yaml(tmp_path / "a.yaml", dict[str, Any])


def test_yaml_values(tmp_path: Path) -> None:
    """Numbers and words are what they look like; merge keys and a few aliases work."""
    text = "{a: 1e-3, b: .5, c: 1:30, d: 010, e: 0, f: -7, g: 2024-01-01, h: ~, i: yes, j: 1_000, k: .inf, l: 0x1F}"
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml", dict[str, Any]) == {
        **{"a": 0.001, "b": 0.5, "c": "1:30", "d": "010", "e": 0, "f": -7, "g": "2024-01-01", "h": None, "i": True},
        **{"j": 1000, "k": float("inf"), "l": 31},
    }
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3")
    assert read_yaml(tmp_path / "a.yaml", dict[str, Any])["b"] == {"x": 1, "y": 3}


def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path}: (not a regular file|cannot be read .Is a directory.)$"):
            read_bytes(path, 10)
    with pytest.raises(NotFoundError, match="none: not found$"):
        read_bytes(tmp_path / "none", 10)
    with pytest.raises(UserError, match="cannot be read .not a path."):
        read_bytes(Path("a\0b"), 10)
    with pytest.raises(UserError, match="cannot be read .File name too long."):
        read_bytes(tmp_path / ("a" * 300), 10)
    (tmp_path / "eleven").write_bytes(b"x" * 11)
    (tmp_path / "link").symlink_to(tmp_path / "eleven")
    assert read_bytes(tmp_path / "link", 11) == b"x" * 11
    with pytest.raises(UserError, match="eleven: cannot be read .more than 10 bytes."):
        read_bytes(tmp_path / "eleven", 10)
    monkeypatch.setattr(reading, "YAML_BYTES", 10)
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_yaml(tmp_path / "eleven", dict[str, Any])
