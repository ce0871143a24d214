"""`megatron-sse data build`: build a token file from text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sse.data.builder import chat, encode
from megatron_sse.data.builder.inputs import Inputs, find_inputs
from megatron_sse.data.builder.job import Job
from megatron_sse.data.builder.join import count_parts, join_parts
from megatron_sse.data.builder.parts import Counts
from megatron_sse.data.builder.request import BYTES, REFUSE, Request
from megatron_sse.data.builder.summary import describe_build
from megatron_sse.data.builder.tally import EMPTY, WRONG
from megatron_sse.data.builder.workers import build_parts, describe
from megatron_sse.data.builder.workspace import Workspace, make_joined
from megatron_sse.data.histogram import draw_lengths
from megatron_sse.data.metadata import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_SETTINGS, read_metadata
from megatron_sse.data.writer import publish
from megatron_sse.errors import UserError
from megatron_sse.installed import require

logger = logging.getLogger(__name__)

PICTURE = ".lengths.png"
# Version of the parts' format: a build is only resumed from parts of the same version.
_VERSION = 1


def run(request: Request) -> int:
    """Build a token file, or resume building it, and print what it holds; return the exit status. Raises UserError."""
    request.check()
    require("tqdm", "data build", "data")
    prefix = Path(os.path.abspath(request.output))
    job, files, name = _make_job(request)
    inputs = find_inputs(request.inputs, request.format, job.columns, prefix, request.unit_bytes)
    plan = {"version": _VERSION, "inputs": inputs.files, "unit_bytes": request.unit_bytes}
    # The tokenizer's content counts, not its path; and `refused` does not change parts that have no wrong input.
    plan |= replace(job, tokenizer=None, refused=()).to_json() | {"tokenizer": name}
    started = time.perf_counter()
    with Workspace(prefix, plan) as space:
        counts = space.finished()
        if counts is None:
            counts = _build_parts(request, space, inputs, job)
            _check_counts(counts, request, job, space)
            try:
                _join(space, inputs, job, files, counts, name)
            except OSError as error:
                raise UserError(describe(error)) from None
            space.finish(counts)
        space.remove()
    metadata = read_metadata(str(prefix))
    assert metadata is not None
    for line in describe_build(request.output, counts, metadata):
        print(line)
    if not draw_lengths(Path(f"{prefix}{PICTURE}"), request.output, counts.lengths, counts.length_tokens):
        print(f'{request.output}{PICTURE} not drawn: needs matplotlib (pip install "megatron-sse[data]")')
    logger.info("built %s in %.1f s", request.output, time.perf_counter() - started)
    return 0


def _make_job(request: Request) -> tuple[Job, encode.TokenizerFiles | None, str]:
    """Return the job, the tokenizer's files, and its name with the hash of its content. Raises UserError."""
    refused = (*(WRONG if request.wrong == REFUSE else ()), *((EMPTY,) if request.empty == REFUSE else ()))
    template: str | None = chat.DEFAULT_TEMPLATE
    files, end, name, special, token = None, None, BYTES, {}, ""
    if request.tokenizer != BYTES:
        files = encode.find_tokenizer(request.tokenizer)
        token, end = files.end(request.end)
        digest = hashlib.sha256(files.path.read_bytes()).hexdigest()
        name = f"{files.path.absolute().parent.name} sha256:{digest[:16]}"
        special = {key: value for key in chat.SPECIAL_TOKENS if (value := files.special(key)) is not None}
        special["eos_token"] = token
        template = files.template
    if request.chat_template is not None:
        template = _read_template(request.chat_template)
    if files is not None:
        files = replace(files, settings=_settings(files, token, template))
    job = Job(
        format=request.format,
        field=request.field,
        refused=refused,
        tokenizer=None if files is None else str(files.path.absolute()),
        end=end,
        template=template if request.format == "chat" else None,
        template_name=request.chat_template or request.tokenizer,
        special=special,
    )
    # Report a wrong template before anything is written.
    job.chat_template()
    return job, files, name


def _settings(files: encode.TokenizerFiles, end: str, template: str | None) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json that describes the tokenizer as it was used."""
    settings = {key: value for key, value in files.settings.items() if key != "auto_map"}
    chats = {} if template is None else {"chat_template": template}
    return settings | chats | {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--chat-template: {path} cannot be read ({error})") from None


def _build_parts(request: Request, space: Workspace, inputs: Inputs, job: Job) -> Counts:
    todo = [(number, unit) for number, unit in enumerate(inputs.units) if not space.is_done(number)]
    done = inputs.size - sum(unit.size for _, unit in todo)
    if done or not todo:
        logger.info("resuming: %d of %d parts are done", len(inputs.units) - len(todo), len(inputs.units))
    workers = min(request.workers or len(os.sched_getaffinity(0)), max(len(todo), 1))
    try:
        with _Progress(inputs.size, "reading", done) as report:
            for _ in build_parts(space.folder, job, todo, workers, report):
                pass
    except KeyboardInterrupt:
        logger.info("stopped; run the same command to resume")
        raise
    inputs.check_unchanged(space.folder)
    counts = count_parts(space.folder, len(inputs.units))
    counts.left_out.update(inputs.left_out)
    return counts


def _check_counts(counts: Counts, request: Request, job: Job, space: Workspace) -> None:
    found = ", ".join(f"{count} x {kind}" for kind, count in counts.left_out.items() if count)
    if set(counts.left_out) & set(job.refused):
        raise UserError(
            f"--wrong, --empty: got refuse, but this build started with skip and has skipped {found}; give skip, or "
            f"delete {space.folder} to start over"
        )
    if counts.documents == 0:
        raise UserError(f"INPUT: no documents in {', '.join(request.inputs)}; skipped: {found or 'nothing'}")


class _Progress:
    """A progress bar with rate and time left, as a context manager that gives a function to call with bytes done."""

    def __init__(self, total: int, name: str, done: int = 0):
        from tqdm import tqdm

        # Where stderr is not a terminal, only a line now and then.
        interval = 0.1 if sys.stderr.isatty() else 30
        self.bar = tqdm(
            total=total, initial=done, desc=name, unit="B", unit_scale=True, mininterval=interval, dynamic_ncols=True
        )

    def __enter__(self) -> Callable[[int], None]:
        return lambda count: None if self.bar.update(count) else None

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _join(
    space: Workspace, inputs: Inputs, job: Job, files: encode.TokenizerFiles | None, counts: Counts, name: str
) -> None:
    joined = make_joined(space.folder)
    encoder = job.encoder()
    width = encode.token_type(encoder.vocab_size).itemsize + job.has_mask
    with _Progress(counts.tokens * width, "joining") as report:
        join_parts(space.folder, len(inputs.units), joined, counts, name, encoder.end, job.has_mask, report)
    if files is not None:
        shutil.copyfile(files.path, joined / f".{TOKENIZER}")
        (joined / f".{TOKENIZER_SETTINGS}").write_text(json.dumps(files.settings, indent=2, ensure_ascii=False) + "\n")
    elif job.template is not None:
        # Bytes have no settings that could hold it.
        (joined / f".{CHAT_TEMPLATE}").write_text(job.template, encoding="utf-8")
    publish(joined, space.prefix)
