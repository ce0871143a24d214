"""Worker processes that build parts. They load neither torch nor Megatron-Core, and end when their parent ends."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_sse.data.builder.inputs import Unit
from megatron_sse.data.builder.job import DocumentMaker, Job
from megatron_sse.data.builder.parts import build_part
from megatron_sse.errors import UserError, describe_error

_BLOCK = 1 << 16
Todo = Iterable[tuple[int, Unit]]


def build_parts(building: Path, job: Job, todo: Todo, workers: int, report: Callable[[int], None]) -> Iterator[int]:
    """Build the parts of numbered units, and yield the number of each finished part.

    `workers` processes do the work; with 1, it is done in this process. report: is called with the bytes read. Raises
    UserError.
    """
    if workers > 1:
        yield from _build_with(building, job, todo, workers, report)
        return
    maker = DocumentMaker(job)
    for number, unit in todo:
        try:
            build_part(building, number, unit, maker, report)
        except OSError as error:
            raise UserError(describe(error)) from None
        yield number


def _build_with(building: Path, job: Job, todo: Todo, count: int, report: Callable[[int], None]) -> Iterator[int]:
    remaining = iter(todo)
    workers = [_Worker(building, job) for _ in range(count)]
    try:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                worker.start_next(remaining)
            while any(worker.is_busy for worker in workers):
                for key, _ in selector.select():
                    worker = key.data
                    for reply in worker.read_replies():
                        if "bytes" in reply:
                            report(reply["bytes"])
                        else:
                            yield reply["done"]
                            worker.start_next(remaining)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that reads a job and then units, a line of JSON each, and replies with lines of JSON."""

    def __init__(self, building: Path, job: Job):
        # A worker uses one core; the tokenizers library would otherwise use all of them.
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "megatron_sse.data.builder.workers"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.orders: IO[bytes] = self.process.stdin
        self.replies: IO[bytes] = self.process.stdout
        self.is_busy = False
        self.rest = b""
        self._send({"building": str(building), "job": job.to_json()})

    def start_next(self, remaining: Iterator[tuple[int, Unit]]) -> None:
        """Send the next unit, if there is one left."""
        order = next(remaining, None)
        self.is_busy = order is not None
        if order is not None:
            self._send({"number": order[0], "unit": order[1].to_json()})

    def _send(self, order: dict[str, Any]) -> None:
        try:
            self.orders.write(json.dumps(order).encode() + b"\n")
            self.orders.flush()
        except BrokenPipeError:
            pass  # The worker has ended; read_replies reports it.

    def read_replies(self) -> list[dict[str, Any]]:
        """Return the replies since the last call. Raises UserError where the input is wrong or the worker has ended."""
        # Read from the descriptor: select does not see what a buffered reader has read ahead.
        content = os.read(self.replies.fileno(), _BLOCK)
        if not content:
            code = self.process.wait()
            raise UserError(
                f"a worker ended with status {code}{' (killed: perhaps memory ran out)' if code == -9 else ''}; run "
                "the same command to resume, with fewer --workers if memory is short"
            )
        *lines, self.rest = (self.rest + content).split(b"\n")
        replies = [json.loads(line) for line in lines]
        for reply in replies:
            if "wrong" in reply:
                raise UserError(reply["wrong"])
            if "failed" in reply:
                raise RuntimeError(f"in a worker:\n{reply['failed']}")
        return replies

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        self.replies.close()
        try:
            self.orders.close()
        except BrokenPipeError:
            pass


def describe(error: OSError) -> str:
    """Return a message of one line for an error of the file system, with what to do."""
    place = "" if error.filename else "the token file: "
    return f"{place}{describe_error(error)}; fix this and run the same command to resume"


def serve(orders: IO[bytes], replies: IO[bytes]) -> None:
    """Build parts until no orders are left or the parent has gone."""

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content).encode() + b"\n")
        replies.flush()

    try:
        first = json.loads(orders.readline())
        building = Path(first["building"])
        maker = DocumentMaker(Job.from_json(first["job"]))
        for line in orders:
            order = json.loads(line)
            number, unit = order["number"], Unit.from_json(order["unit"])
            build_part(building, number, unit, maker, lambda count: reply(bytes=count))
            reply(done=number)
    except BrokenPipeError:
        return
    except UserError as error:
        reply(wrong=str(error))
    except OSError as error:
        reply(wrong=describe(error))
    except Exception:
        reply(failed=traceback.format_exc())


if __name__ == "__main__":
    # A terminal sends Ctrl-C to workers too; the parent handles it and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)
