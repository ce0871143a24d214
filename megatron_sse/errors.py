"""The one kind of error that is a user's to mend."""


class UserError(Exception):
    """A setting, file or machine that does not fit. One line: the key or path, what was given, what is allowed."""


class SharedUserError(UserError):
    """One that every process of a run finds at the same time: the first alone says it."""
