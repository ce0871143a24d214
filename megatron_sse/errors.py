"""The one kind of error that is a user's to mend, and exit statuses."""

USER_ERROR_EXIT = 2
# Too many steps were not finite: the same steps would be again.
NOT_FINITE_EXIT = 3
INTERRUPT_EXIT = 130


class UserError(Exception):
    """A setting, file or machine that does not fit. One line: the key or path, what was given, what is allowed."""


class SharedUserError(UserError):
    """One that every process of a run finds at the same time: the first alone says it."""
