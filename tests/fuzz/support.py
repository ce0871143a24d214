"""Values of any kind, changes at any place of a nested value, and a command run in this process."""

import contextlib
import copy
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from megatron_sse.cli import main
from megatron_sse.errors import UserError

HUGE = st.sampled_from([0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 10**17, 10**30, -(2**63), 10**400])
FLOATS = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1e-45, 1e38, 1e39, 1e308, 5e-324]))
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\x00", "~", "1:30", "!!int ''", "x" * 5000, "/", "..", "/dev/null", "auto", "sse", "*a"]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), HUGE, st.integers(-5, 40), FLOATS, TEXTS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))

Path = tuple[Any, ...]

# CPU time of an example: one that takes longer is as good as a hang for its user; all take a small part of it.
SECONDS = 60


class Contents(dict[str, bytes]):
    """Contents of files by name; hypothesis does not print them."""

    __repr__ = object.__repr__


def places(value: Any, path: Path = ()) -> list[Path]:
    """Return the path of every value inside of a nested one."""
    found = [path] if path else []
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return found + [place for key, child in children for place in places(child, (*path, key))]


def put(value: Any, path: Path, new: Any) -> Any:
    """Return a copy of a nested value with something else at a path."""
    changed = copy.deepcopy(value)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return changed


def drop(value: Any, path: Path) -> Any:
    """Return a copy of a nested value without what is at a path."""
    changed = copy.deepcopy(value)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return changed


def changed(value: Any, new: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    """Return nested values that differ from `value` in one place, or are another value altogether."""
    anywhere = st.sampled_from(places(value))
    replaced = st.builds(lambda path, other: put(value, path, other), anywhere, new)
    dropped = st.builds(lambda path: drop(value, path), anywhere)
    return st.one_of(replaced, replaced, replaced, dropped, new)


def broken_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Return contents of a file that differ from `content`: cut, with other bytes in them, or others altogether."""
    at = st.integers(0, max(len(content) - 1, 0))
    cut = at.map(lambda end: content[:end])
    written = st.builds(
        lambda start, other: content[:start] + other + content[start + len(other) :], at, st.binary(max_size=9)
    )
    grown = st.builds(lambda start, other: content[:start] + other + content[start:], at, st.binary(max_size=9))
    return st.one_of(cut, written, grown, st.binary(max_size=200))


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return its exit status, output and errors."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = main([str(argument) for argument in arguments])
        # argparse ends so.
        except SystemExit as end:
            status = int(end.code or 0)
    return status, output.getvalue(), errors.getvalue()


@contextlib.contextmanager
def within_bound() -> Iterator[None]:
    """Check that a block takes no more than SECONDS of CPU time."""
    start = time.process_time()
    try:
        yield
    finally:
        seconds = time.process_time() - start
        assert seconds <= SECONDS, f"took {seconds:.0f} s of CPU time"


def answers(*arguments: object) -> None:
    """Check that a command ends with 0, with 1, or with 2 and a reason."""
    logging.disable()
    try:
        with within_bound():
            status, output, errors = run(*arguments)
    finally:
        logging.disable(logging.NOTSET)
    assert status in (0, 1, 2), (status, errors)
    assert "Traceback" not in output + errors, errors
    assert status != 2 or errors.strip(), "exit status 2 without a reason"


def refused_in_a_line(function: Callable[..., object], *arguments: Any) -> None:
    """Check that a function returns, or raises a UserError of one line."""
    try:
        with within_bound():
            function(*arguments)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), error
