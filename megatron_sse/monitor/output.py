"""Writing what only watches a run: a failure is reported and tried again, and never ends the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sse.errors import describe_error

logger = logging.getLogger(__name__)


class Output:
    """Something that the monitor writes. name: what it is, for the log."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_failing = False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the block; where it cannot write, log a warning, unless the attempt before failed as well."""
        try:
            yield
        # torch turns some OSErrors into RuntimeErrors.
        except (OSError, RuntimeError) as error:
            if not self.is_failing:
                logger.warning("%s not written: %s", self.name, describe_error(error))
            self.is_failing = True
            return
        if self.is_failing:
            logger.warning("%s: written again", self.name)
            self.is_failing = False
