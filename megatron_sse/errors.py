"""The one kind of error that is a user's to mend, and exit statuses."""

from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR_EXIT = 2
# Too many steps were not finite: the same steps would be again.
NOT_FINITE_EXIT = 3
INTERRUPT_EXIT = 130


class UserError(Exception):
    """A setting, file or machine that does not fit. One line: the key or path, what was given, what is allowed."""


class SharedUserError(UserError):
    """One that every process of a run finds at the same time: the first alone says it."""


@contextmanager
def found_by_all() -> Iterator[None]:
    """Of what all processes read alike: its UserErrors become SharedUserErrors."""
    try:
        yield
    except UserError as error:
        raise SharedUserError(str(error)) from None
