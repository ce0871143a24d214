"""The arguments of `megatron-sse data build`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sse.errors import UserError
from megatron_sse.options import Command, option, positional

# The tokenizer that needs no file.
BYTES = "bytes"
FORMATS = ("auto", "jsonl", "text", "parquet", "folder", "chat")
MAX_WORKERS = 1024
REFUSE, SKIP = "refuse", "skip"


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError for a value of an option that is not among those allowed."""
    if value not in allowed:
        raise UserError(f"{name}: got {value}, allowed {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """Make PREFIX.bin, .idx and .json of JSONL, Parquet, text files and folders of source files. In a folder that is
    read as source files each sub-folder, with all files below it, is one document, and so is each file beside them. If
    the build is killed, the same command resumes it. docs/data.md explains the options."""

    command, help = "data build", "make a token file of text"

    inputs: tuple[str, ...] = positional("INPUT", ".jsonl, .jsonl.gz, .parquet, text file or folder")
    output: str = option("PREFIX", "path of the files to write, without their suffixes")
    tokenizer: str = option("WHICH", "bytes, a tokenizer.json or its folder", default=BYTES)
    end: str | None = option("NAME", "token that ends a document", unset="the tokenizer's eos_token")
    format: str = option("NAME", ", ".join(FORMATS), default="auto")
    field: str = option("NAME", "field of JSONL or column of Parquet that holds the text", default="text")
    chat_template: str | None = option("FILE", "Jinja template of chats", unset="the tokenizer's")
    wrong: str = option("HOW", f"{REFUSE} or {SKIP} wrong input", default=REFUSE)
    empty: str = option("HOW", f"{REFUSE} or {SKIP} empty documents", default=SKIP)
    workers: int | None = option("N", "number of processes", unset="one per core")
    # Size of what a worker reads at once; tests have smaller ones.
    unit_bytes: int = 1 << 24

    def check(self) -> None:
        check_choice("--format", self.format, FORMATS)
        check_choice("--wrong", self.wrong, (REFUSE, SKIP))
        check_choice("--empty", self.empty, (REFUSE, SKIP))
        if self.workers is not None and not 1 <= self.workers <= MAX_WORKERS:
            raise UserError(f"--workers: got {self.workers}, allowed 1 to {MAX_WORKERS}")
        if self.tokenizer == BYTES and self.end is not None:
            raise UserError(f"--end: got {self.end}, but --tokenizer bytes has an end of its own; leave it out")
        if self.chat_template is not None and self.format != "chat":
            raise UserError("--chat-template: given, but --format is not chat; give --format chat or leave it out")
        if self.output.endswith(("/", ".bin", ".idx")):
            raise UserError(
                f"--output: got {self.output}, allowed the prefix of the files to write, such as data/train"
            )
