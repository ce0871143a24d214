"""Errors that a user can correct, and exit statuses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sse.visible import make_line

USER_ERROR_EXIT = 2
# Too many steps were not finite; a restart would repeat them.
NOT_FINITE_EXIT = 3
INTERRUPT_EXIT = 130
# The reader of the output has ended.
CLOSED_PIPE_EXIT = 141


class UserError(Exception):
    """A setting, file or machine that does not fit. One line: key or path, what is wrong, what to change.

    The text may hold names from files of unknown origin: what would steer the terminal is made visible.
    table: lines that follow, where one is not enough.
    """

    def __init__(self, text: str, *table: str) -> None:
        super().__init__("\n".join(map(make_line, (text, *table))))


def describe_error(error: Exception) -> str:
    """Return one line for an error; for one of the file system with the file."""
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    place = "" if error.filename is None else f"{str(error.filename)[:200]}: "
    return make_line(f"{place}{error.strerror or error}")


def not_writable(key: str, folder: Path, error: OSError) -> UserError:
    """Return the error for a folder that a setting or argument names and that cannot be written to."""
    return UserError(f"{key}: got {folder}, allowed a folder that can be written to ({error.strerror or error})")


@contextmanager
def foreign_errors(place: str) -> Iterator[None]:
    """Turn whatever a library raises about a file of unknown origin, a panic of Rust code included, into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # tokenizers' panics are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{place} ({reason})") from None


class SharedUserError(UserError):
    """A UserError that every process of a run finds at the same time; only the first reports it."""


@contextmanager
def found_by_all() -> Iterator[None]:
    """Turn UserErrors of a block, or decorated function, into SharedUserErrors: all processes find them alike."""
    try:
        yield
    except UserError as error:
        raise SharedUserError(*str(error).split("\n")) from None


@contextmanager
def found_by_machine() -> Iterator[None]:
    """Turn UserErrors of a block into SharedUserErrors, except on the first process of each machine, which reports
    them: a file or package may be missing on one machine only."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" and not isinstance(error, SharedUserError):
            raise
        raise SharedUserError(*str(error).split("\n")) from None
