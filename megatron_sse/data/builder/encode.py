"""Encoding text as tokens: bytes, or those of a tokenizer of the tokenizers library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_sse.data.metadata import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_SETTINGS
from megatron_sse.data.tokenizer import END_OF_DOCUMENT, VOCAB_SIZE, encode_document
from megatron_sse.errors import UserError, foreign_errors
from megatron_sse.installed import require
from megatron_sse.reading import NotFoundError, read_json, read_text

# Largest vocabulary of 16-bit tokens.
_UINT16_TOKENS = 1 << 16
# Characters that are encoded at once; characters on each side of a cut that are compared; cuts that are tried.
_PIECE, _WINDOW, _TRIES = 1 << 20, 256, 8
# Texts of which any tokenizer has one.
_SAMPLES = ("a", "A", "0", " ", "\n")
# Bytes of a chat template, far above any.
_TEMPLATE_BYTES = 1 << 20
_LINE_START = re.compile(r"\n(?=\S)")


class Encoder(Protocol):
    """A function from text to tokens. vocab_size: largest token + 1. end: the token that ends a document."""

    vocab_size: int
    end: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the tokens of a document made of `texts`, its end included."""
        ...

    def encode_parts(self, prompt: str, completion: str) -> tuple[np.ndarray, int]:
        """Return the tokens of a document whose two parts are encoded separately, its end included.

        Also return how many of them are the prompt's.
        """
        ...

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a text alone, without an end, and for each the span of its last character (-1: none).

        spans: first character and one past the last, ascending.
        """
        ...


def token_type(vocab_size: int) -> np.dtype:
    """Return the smaller of the two token types that training reads."""
    return np.dtype(np.uint16 if vocab_size <= _UINT16_TOKENS else np.int32)


class ByteEncoder:
    """An encoder with a token per byte of UTF-8."""

    vocab_size, end = VOCAB_SIZE, END_OF_DOCUMENT

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return encode_document("".join(texts).encode())

    def encode_parts(self, prompt: str, completion: str) -> tuple[np.ndarray, int]:
        return self.encode([prompt, completion]), len(prompt.encode())

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens_T = encode_document(text.encode())[:-1]
        span_T = np.full(len(tokens_T), -1)
        for number, (begin, end) in enumerate(spans):
            first = len(text[:begin].encode())
            span_T[first : first + len(text[begin:end].encode())] = number
        return tokens_T, span_T


class FileEncoder:
    """An encoder that uses a tokenizer.json. What that adds before and after any text is added to each document."""

    def __init__(self, path: Path, end: int):
        self.tokenizer = read_tokenizer(path)
        self.end = end
        self.path = path
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
        self.dtype = token_type(self.vocab_size)
        self.before, behind = self._find_added()
        self.behind = behind if behind[-1:] == [end] else [*behind, end]

    def _find_added(self) -> tuple[list[int], list[int]]:
        """Return the tokens that are added before and after any text. Raises UserError.

        They are found by encoding one text both ways: <s> a </s> against a.
        """
        with foreign_errors(f"{self.path}: cannot encode a text"):
            for text in _SAMPLES:
                bare = self.tokenizer.encode(text, add_special_tokens=False).ids
                full = self.tokenizer.encode(text).ids
                for first in range(len(full) if bare else 0):
                    if full[first : first + len(bare)] == bare:
                        return full[:first], full[first + len(bare) :]
        raise UserError(f"{self.path}: it encodes none of {', '.join(map(repr, _SAMPLES))} as tokens")

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        pieces = (piece for text in texts for piece in self._pieces(text))
        return self._join(self.before, *(self._array(self._ids(piece)) for piece in pieces), self.behind)

    def encode_parts(self, prompt: str, completion: str) -> tuple[np.ndarray, int]:
        parts = [self._ids(prompt), self._ids(completion)]
        return self._join(self.before, *parts, self.behind), len(self.before) + len(parts[0])

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        with foreign_errors(f"{self.path}: cannot encode a text"):
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
        last_T = np.array([max(begin, end - 1) for begin, end in encoded.offsets], dtype=np.int64)
        span_T = np.full(len(last_T), -1)
        for number, (begin, end) in enumerate(spans):
            span_T[(last_T >= begin) & (last_T < end)] = number
        return self._array(encoded.ids), span_T

    def _ids(self, text: str) -> list[int]:
        with foreign_errors(f"{self.path}: cannot encode a text"):
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _array(self, ids: list[int]) -> np.ndarray:
        return np.array(ids, dtype=self.dtype)

    def _join(self, *parts: list[int] | np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(part, dtype=self.dtype) for part in parts])

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield pieces of a text that together have the same tokens as the text.

        Encoding piece by piece saves memory: the library needs some 430 bytes per token.
        """
        begin = 0
        while len(text) - begin > _PIECE and (cut := self._find_cut(text, begin + _PIECE)):
            yield text[begin:cut]
            begin = cut
        yield text[begin:]

    def _find_cut(self, text: str, begin: int) -> int | None:
        """Return the start of a line after `begin` where cutting does not change the tokens, or None.

        That is tested with a window of characters on each side.
        """
        for found in islice(_LINE_START.finditer(text, begin), _TRIES):
            cut = found.end()
            left, right = text[cut - _WINDOW : cut], text[cut : cut + _WINDOW]
            if self._ids(left + right) == self._ids(left) + self._ids(right):
                return cut
        return None


def read_tokenizer(path: Path) -> Any:
    """Load a tokenizer.json, with truncation and padding turned off. Raises UserError."""
    require("tokenizers", str(path), "data")
    from tokenizers import Tokenizer

    with foreign_errors(f"{path}: cannot be read as tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(path))
    # The file's settings for these are meant for other uses.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer.

    path: of tokenizer.json. settings: the content of the tokenizer_config.json beside it, {} where there is none.
    template: the chat template; None where there is none.
    """

    path: Path
    settings: dict[str, Any]
    template: str | None

    def special(self, name: str) -> str | None:
        """Return the special token with a given role, such as eos_token; None where the settings name none."""
        value = self.settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def end(self, name: str | None) -> tuple[str, int]:
        """Return the token that ends documents and its number. Raises UserError.

        It is `name`, or the settings' eos_token where `name` is None.
        """
        token = name or self.special("eos_token")
        config = self.path.with_name(TOKENIZER_SETTINGS)
        if token is None:
            raise UserError(
                f"--end: not given, and {config} names no eos_token; give the token that ends a document, such as "
                "--end '<|endoftext|>'"
            )
        tokenizer = read_tokenizer(self.path)
        number = tokenizer.token_to_id(token)
        if number is None:
            special = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
            raise UserError(
                f"--end: {token!r} is not a token of {self.path}; its special tokens: "
                f"{', '.join(special[:20]) or 'none'}"
            )
        return token, number


def read_template(folder: Path) -> str | None:
    """Return the chat template that a folder has in a file of its own; None where there is none. Raises UserError."""
    try:
        return read_text(folder / CHAT_TEMPLATE, _TEMPLATE_BYTES)
    except NotFoundError:
        return None


def find_tokenizer(given: str) -> TokenizerFiles:
    """Find the files of a tokenizer, given its tokenizer.json or its folder. Raises UserError."""
    path = Path(given)
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"--tokenizer: {path} not found; give bytes, a tokenizer.json or a folder with one")
    config, own = path.with_name(TOKENIZER_SETTINGS), read_template(path.parent)
    settings: dict[str, Any] = {}
    with suppress(NotFoundError):
        settings = read_json(config, dict[str, Any])
    template = settings.get("chat_template") if own is None else own
    if isinstance(template, list):
        # Older files hold a list of named templates.
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise UserError(f"{config}: chat_template: got {type(template).__name__}, allowed a text")
    return TokenizerFiles(path, settings, template)
