"""The command `megatron-sse`: gathers the rooms' commands, runs one, and turns errors into exit statuses."""

import io
import logging
import os
import select
import sys
from collections.abc import Callable
from importlib import import_module

from megatron_sse import __version__
from megatron_sse.check_parallel.request import Request as CheckParallel
from megatron_sse.checkpoint.request import Request as Inspect
from megatron_sse.convert.request import Request as Convert
from megatron_sse.data.builder.request import Request as DataBuild
from megatron_sse.data.request import Request as DataInspect
from megatron_sse.data.train_tokenizer.request import Request as TrainTokenizer
from megatron_sse.doctor.request import Request as Doctor
from megatron_sse.entry.request import Request as Train
from megatron_sse.errors import (
    CLOSED_PIPE_EXIT,
    INTERRUPT_EXIT,
    USER_ERROR_EXIT,
    SharedUserError,
    UserError,
    describe_error,
)
from megatron_sse.evaluation.request import Request as Evaluate
from megatron_sse.inference.request import Request as Generate
from megatron_sse.init.request import Request as Init
from megatron_sse.inspection.request import Request as InspectStates
from megatron_sse.interrupts import end_with_launcher
from megatron_sse.logs import set_up_logging
from megatron_sse.options import Command, find_wrong_text, parse
from megatron_sse.planning.request import Request as Plan
from megatron_sse.plot.request import Request as Plot
from megatron_sse.score.request import Request as Score

logger = logging.getLogger(__name__)

# In the order of --help. Beside each module `request` there is a module `command`, whose run() takes the request. It is
# imported when it is needed, so that --help and wrong arguments are answered before torch is loaded.
COMMANDS: tuple[type[Command], ...] = (
    Init,
    Train,
    CheckParallel,
    Plan,
    Doctor,
    Convert,
    Score,
    Generate,
    Evaluate,
    DataBuild,
    DataInspect,
    TrainTokenizer,
    Inspect,
    InspectStates,
    Plot,
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status.

    Common ones: 2 after a UserError (one line on stderr), 130 after an interrupt, 141 where the reader of the output
    has ended.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    problem = find_wrong_text(arguments)
    if problem is not None:
        print(problem, file=sys.stderr)
        return USER_ERROR_EXIT
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace")
    request = parse(COMMANDS, arguments, "megatron-sse", "Train language models with SSE layers.", __version__)
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(rank, sys.stderr if request.prints_result else sys.stdout)
    try:
        request.check()
        status = _run(request, arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        logger.debug("%s", error)
        if not (rank and isinstance(error, SharedUserError)):
            print(f"{f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        return INTERRUPT_EXIT
    except BrokenPipeError:
        if _stdout_has_reader():
            raise
        # Otherwise the interpreter would try to write the rest when it exits, and report an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE_EXIT
    except OSError as error:
        # Of a run that has started, the traceback counts, and it is started again.
        if isinstance(request, Train):
            raise
        # Such as a path that is too long, or a folder in the place of a file.
        logger.debug("%s", error, exc_info=True)
        print(describe_error(error), file=sys.stderr)
        return USER_ERROR_EXIT


def _run(request: Command, arguments: list[str]) -> int:
    """Run the command in this process, or start the processes that it asks for where no launcher did."""
    if "RANK" not in os.environ and request.num_processes > 1:
        # Imported late: torch.
        from megatron_sse.launch.start import start_command

        return start_command(request.num_processes, request.layout, ["-m", "megatron_sse", *arguments])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    return find_run(type(request))(request)


def find_run(request: type[Command]) -> Callable[[Command], int]:
    """Return the function that runs a kind of request."""
    return import_module(f"{request.__module__.rpartition('.')[0]}.command").run


def _stdout_has_reader() -> bool:
    """Check whether a process still reads the standard output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))
