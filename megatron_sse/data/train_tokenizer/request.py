"""The arguments of `megatron-sse data train-tokenizer`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_sse.data.builder.request import REFUSE, SKIP, check_choice
from megatron_sse.errors import UserError
from megatron_sse.options import Command, option, positional

FORMATS = ("auto", "jsonl", "text", "parquet", "folder")
# The values of a byte, from which any text can be made.
NUM_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """Make a byte-level BPE tokenizer of JSONL, Parquet, text files and folders of source files, in a new folder that
    `data build --tokenizer` takes. docs/data.md explains the options."""

    command, help = "data train-tokenizer", "make a tokenizer of text"

    inputs: tuple[str, ...] = positional("INPUT", ".jsonl, .jsonl.gz, .parquet, text file or folder")
    output: str = option("FOLDER", "folder to make, for tokenizer.json and tokenizer_config.json")
    vocab_size: int = option("N", "tokens of the tokenizer, special ones included", default=32000)
    end: str = option("NAME", "token that ends a document", default="<|endoftext|>")
    special: tuple[str, ...] = option("NAME", "another special token, as of chats; may be repeated", default=())
    format: str = option("NAME", ", ".join(FORMATS), default="auto")
    field: str = option("NAME", "field of JSONL or column of Parquet that holds the text", default="text")
    wrong: str = option("HOW", f"{REFUSE} or {SKIP} wrong input", default=REFUSE)

    def check(self) -> None:
        check_choice("--format", self.format, FORMATS)
        check_choice("--wrong", self.wrong, (REFUSE, SKIP))
        special = (self.end, *self.special)
        if "" in special or len(set(special)) < len(special):
            raise UserError(f"--end, --special: got {', '.join(map(repr, special))}, allowed different names")
        least = NUM_BYTES + len(special)
        if not least <= self.vocab_size <= 1 << 24:
            raise UserError(
                f"--vocab-size: got {self.vocab_size}, allowed {least} ({NUM_BYTES} bytes and the special tokens) to "
                "2^24"
            )
        if os.path.lexists(self.output):
            raise UserError(f"--output: {self.output} exists and is not overwritten; name another folder")
