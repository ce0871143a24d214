"""The settings that decide how a record becomes a document of tokens, and the code that makes it one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sse.data.builder import chat
from megatron_sse.data.builder.encode import ByteEncoder, Encoder, FileEncoder
from megatron_sse.data.builder.read import Record, decode
from megatron_sse.data.builder.tally import CHAT, EMPTY, INVALID, MISSING, Place, Tally


@dataclass(frozen=True)
class Job:
    """The settings of a build that all workers share.

    Attributes:
        tokenizer: path of a tokenizer.json; None for bytes. end: the token that ends a document.
        template: the chat template, called template_name in errors; special: the special tokens that it may name.
        refused: kinds of wrong input that end the build.
    """

    format: str
    field: str
    refused: tuple[str, ...]
    tokenizer: str | None
    end: int | None
    template: str | None
    template_name: str
    special: dict[str, str]

    @property
    def has_mask(self) -> bool:
        """Whether the token file has a loss mask."""
        return self.format == "chat"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a record, or columns of a table, that are read."""
        return chat.COLUMNS if self.has_mask else (self.field,)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, "refused": tuple(values["refused"])})

    def encoder(self) -> Encoder:
        if self.tokenizer is None:
            return ByteEncoder()
        assert self.end is not None
        return FileEncoder(Path(self.tokenizer), self.end)

    def chat_template(self) -> chat.Template | None:
        return None if self.template is None else chat.Template(self.template, self.special, self.template_name)


@dataclass(frozen=True)
class Document:
    """A document: tokens, bytes of text and, with a mask, which tokens count (uint8) and their bytes of text."""

    tokens_T: np.ndarray
    num_bytes: int
    mask_T: np.ndarray | None = None
    label_bytes: int = 0


class DocumentMaker:
    """A function from records to documents, with its encoder and its chat template."""

    def __init__(self, job: Job):
        self.job, self.encoder, self.template = job, job.encoder(), job.chat_template()

    def make(self, place: Place, record: Record, tally: Tally) -> Document | None:
        """Return the document of a record; None, counted in `tally`, where the record cannot be used."""
        try:
            if self.job.has_mask:
                assert isinstance(record, dict)
                return self._make_chat(place, record, tally)
            texts = texts_of(place, record, self.job.field, tally) if isinstance(record, dict) else record
            if texts is None:
                return None
            num_bytes = sum(len(text.encode()) for text in texts)
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            # JSON can escape half of a surrogate pair, which has no UTF-8.
            tally.add(INVALID, place, f"invalid UTF-8 ({error.reason})")
            return None
        if not num_bytes:
            tally.add(EMPTY, place, "empty document")
            return None
        return Document(self.encoder.encode(texts), num_bytes)

    def _make_chat(self, place: Place, record: Mapping[str, Any], tally: Tally) -> Document | None:
        if not any(record.get(name) is not None for name in chat.LISTS) and not {"prompt", "completion"} & set(record):
            found = ", ".join(record) or "none"
            tally.add(
                MISSING,
                place,
                f"field messages missing, no conversations, and no prompt and completion (found: {found})",
            )
            return None
        try:
            made = chat.encode_record(record, self.template, self.encoder)
        except chat.ChatError as error:
            tally.add(CHAT, place, str(error))
            return None
        if not made.label_bytes:
            tally.add(EMPTY, place, "empty answer")
            return None
        return Document(made.tokens_T, made.num_bytes, made.mask_T, made.label_bytes)


def texts_of(place: Place, record: Mapping[str, Any], field: str, tally: Tally) -> list[str] | None:
    """Return the text of a record, as a list of one; None, counted in `tally`, where it cannot be used."""
    value = record.get(field)
    if isinstance(value, bytes):
        text = decode(value, place, tally)
        return None if text is None else [text]
    if isinstance(value, str):
        return [value]
    if value is not None:
        reason = f"field {field} is {type(value).__name__}, must be text"
    else:
        reason = f"field {field} missing (found: {', '.join(record) or 'none'}; choose another with --field)"
        if field not in record and {*chat.LISTS, "prompt"} & set(record):
            reason += "; chats are read with --format chat"
    tally.add(MISSING, place, reason)
    return None
