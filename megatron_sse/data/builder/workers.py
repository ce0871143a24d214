"""Processes that build parts. They load neither torch nor Megatron-Core, and end with the process that started them."""

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
from megatron_sse.errors import UserError

_BLOCK = 1 << 16
Todo = Iterable[tuple[int, Unit]]


def build_parts(building: Path, job: Job, todo: Todo, workers: int, report: Callable[[int], None]) -> Iterator[int]:
    """Build the parts of numbered units, by `workers` processes or, for 1, in this one; yields numbers of done parts.

    report: takes bytes read. Raises UserError.
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
    """A process that takes a job and then units, a line of JSON each, and answers with lines of JSON."""

    def __init__(self, building: Path, job: Job):
        # Its share is one core: the tokenizers library would take all of them.
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
        order = next(remaining, None)
        self.is_busy = order is not None
        if order is not None:
            self._send({"number": order[0], "unit": order[1].to_json()})

    def _send(self, order: dict[str, Any]) -> None:
        try:
            self.orders.write(json.dumps(order).encode() + b"\n")
            self.orders.flush()
        except BrokenPipeError:
            pass  # found by the next read

    def read_replies(self) -> list[dict[str, Any]]:
        """What has come since the last call. Raises UserError where the input is wrong or the process has ended."""
        # Not through the buffer, which select does not see.
        content = os.read(self.replies.fileno(), _BLOCK)
        if not content:
            code = self.process.wait()
            raise UserError(
                f"a worker ended with status {code}{' (killed: perhaps memory ran out)' if code == -9 else ''}; the "
                "same command goes on from here, with fewer --workers in less memory"
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
        self.process.kill()
        self.process.wait()
        self.replies.close()
        try:
            self.orders.close()
        except BrokenPipeError:
            pass


def describe(error: OSError) -> str:
    """An error of the file system in one line."""
    return (
        f"{error.filename or 'the token file'}: {error.strerror or error}; mend it, the same command goes on from here"
    )


def serve(orders: IO[bytes], replies: IO[bytes]) -> None:
    """Build parts until no orders are left, or nobody listens."""

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
    # Ctrl-C is for the process that started this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)
