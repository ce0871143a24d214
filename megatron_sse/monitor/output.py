"""Writing what only watches a run: a failure is reported and tried again, and never ends the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sse.errors import describe_error

logger = logging.getLogger(__name__)


class Output:
    """Something that the monitor writes.

    name: what it is, for the log. errors: what keeps it from being written; torch turns some OSErrors into
    RuntimeErrors.
    """

    def __init__(self, name: str, errors: tuple[type[Exception], ...] = (OSError, RuntimeError)) -> None:
        self.name, self.errors = name, errors
        self.is_failing = False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the block; where it cannot write, log a warning, unless the attempt before failed as well."""
        try:
            yield
        except self.errors as error:
            self.fail(describe_error(error))
            return
        if self.is_failing:
            logger.warning("%s: written again", self.name)
            self.is_failing = False

    def fail(self, reason: str) -> None:
        """Log why something was not written, unless the attempt before failed as well."""
        if not self.is_failing:
            logger.warning("%s not written: %s", self.name, reason)
        self.is_failing = True
