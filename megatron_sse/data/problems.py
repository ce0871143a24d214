"""Problems with answers that can be checked, read from JSONL or Parquet: {"prompt": "2+2=", "answer": "4"}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sse.errors import UserError, foreign_errors
from megatron_sse.installed import require

_COLUMNS = ("prompt", "messages", "answer")


@dataclass(frozen=True)
class Problem:
    """A prompt, as a text or as messages (role and content; None where it is a text), and its answer.

    place: file and line.
    """

    prompt: str
    messages: list[dict[str, Any]] | None
    answer: str
    place: str


def read_problems(key: str, file: str) -> list[Problem]:
    """Return the problems of a file, which the setting or argument `key` names: Parquet where its name ends with
    .parquet, else JSONL. Raises UserError."""
    try:
        # Opened first, so that a file that is not there is the same error for both.
        with Path(file).open(encoding="utf-8") as lines:
            records = _read_rows(key, file) if file.endswith(".parquet") else _read_lines(lines, file)
            problems = [_check(record, place) for place, record in records]
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} cannot be read as text in UTF-8 ({error.reason})") from None
    if not problems:
        raise UserError(f"{key}: {file} is empty, allowed a line of JSON or a row for each prompt")
    return problems


def _read_lines(lines: Iterable[str], file: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: broken JSON ({error})") from None


def _read_rows(key: str, file: str) -> Iterator[tuple[str, Any]]:
    require("pyarrow", f"{key}: {file}", "data")
    import pyarrow.parquet as parquet

    with foreign_errors(f"{key}: {file} cannot be read as Parquet"):
        columns = [name for name in parquet.read_schema(file).names if name in _COLUMNS]
        rows = parquet.read_table(file, columns=columns).to_pylist()
    for number, row in enumerate(rows, 1):
        yield f"{file}:{number}", row


def _check(record: Any, place: str) -> Problem:
    """Return the problem of a line or row. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: got a JSON {type(record).__name__}, allowed an object with prompt and answer")
    answer = record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(
            f"{place}: answer: got {_kind(answer)}, allowed a text or a number that the reward compares with"
        )
    prompt, messages = record.get("prompt"), record.get("messages")
    if (prompt is None) == (messages is None):
        found = "neither" if prompt is None else "both"
        raise UserError(f"{place}: got {found}, allowed either prompt or messages")
    if messages is not None:
        return Problem(_last_text(messages, place), messages, answer, place)
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{place}: prompt: got {_kind(prompt)}, allowed a text")
    return Problem(prompt, None, answer, place)


def _last_text(messages: Any, place: str) -> str:
    """Return what the last message says, once all are known to be messages. Raises UserError."""
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise UserError(f"{place}: messages: allowed a list of at least one {{role, content}}, both texts")
    return messages[-1]["content"]


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "an empty text"
    return "nothing" if value is None else type(value).__name__


def hash_problems(file: str) -> str:
    """Return a hash of the file's content."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
