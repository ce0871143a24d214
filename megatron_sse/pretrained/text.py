"""From text to tokens and back: the tokenizer in a model's folder, or the byte tokens of training."""

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_sse.data.metadata import TOKENIZER, TOKENIZER_SETTINGS, read_metadata
from megatron_sse.data.tokenizer import END_OF_DOCUMENT, VOCAB_SIZE
from megatron_sse.errors import UserError, foreign_errors
from megatron_sse.hf.dense_settings import FAMILIES
from megatron_sse.installed import require
from megatron_sse.pretrained.open import Model

# Tokenizers decode characters that are not complete yet to this one.
_BROKEN = "\ufffd"


class Tokenizer(Protocol):
    """end: the token that ends a document; None where there is none."""

    end: int | None

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Return the tokens of a text. continues: it continues another text, so that no start is marked."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones and without a character that is not complete at the end."""
        ...

    def stream(self) -> Callable[[int], str]:
        """Return a function that takes one token after the other and returns the text that each completes."""
        ...

    def is_special(self, token: int) -> bool:
        """Check whether a token stands for no text, such as the end of a turn."""
        ...


class ByteTokenizer:
    """A token per byte of UTF-8."""

    end: int | None = END_OF_DOCUMENT

    def encode(self, text: str, continues: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        # An incremental one keeps what is not complete to itself.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(bytes(token for token in tokens if token < END_OF_DOCUMENT))

    def stream(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(bytes([token])) if token < END_OF_DOCUMENT else ""

    def is_special(self, token: int) -> bool:
        return token >= END_OF_DOCUMENT


class FolderTokenizer:
    """One of transformers' tokenizers."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id

    def encode(self, text: str, continues: bool = False) -> list[int]:
        with foreign_errors("the tokenizer cannot encode a text"):
            return self.tokenizer.encode(text, add_special_tokens=not continues)

    def is_special(self, token: int) -> bool:
        added = self.tokenizer.added_tokens_decoder.get(token)
        return added is not None and added.special

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).rstrip(_BROKEN)

    def stream(self) -> Callable[[int], str]:
        tokens: list[int] = []
        # Text of tokens[start:shown] is out; it is decoded with what follows, as spaces depend on the token before.
        start, shown = 0, 0

        def add(token: int) -> str:
            nonlocal start, shown
            tokens.append(token)
            before = self.tokenizer.decode(tokens[start:shown], skip_special_tokens=True)
            text = self.tokenizer.decode(tokens[start:], skip_special_tokens=True)
            if len(text) <= len(before) or text.endswith(_BROKEN):
                return ""
            start, shown = shown, len(tokens)
            return text[len(before) :]

        return add


def open_tokenizer(model: Model, instead: str = "") -> Tokenizer:
    """Return the tokenizer of a model's folder; byte tokens where the model was trained on them.

    instead: what else a user can do, for the message. Raises UserError.
    """
    there = [name for name in (TOKENIZER_SETTINGS, TOKENIZER) if (model.folder / name).is_file()]
    if there:
        return _read_tokenizer(model, there[0])
    # Runs on prompts have no training files.
    first = next(iter(model.config.data.train), None)
    metadata = read_metadata(first.prefix) if first is not None and first.prefix else None
    of_bytes = metadata is not None and metadata.tokenizer == "bytes"
    if of_bytes or (first is not None and first.needle is not None) or model.config.model.vocab_size == VOCAB_SIZE:
        return ByteTokenizer()
    raise UserError(
        f"{model.folder}: no tokenizer ({TOKENIZER}), and {model.config.model.vocab_size} tokens are not the "
        f"{VOCAB_SIZE} byte tokens; put the tokenizer's files there{instead}"
    )


def _read_tokenizer(model: Model, file: str) -> Tokenizer:
    require("transformers", f"the tokenizer of {model.folder}")
    import transformers

    with foreign_errors(f"{model.folder / file}: the tokenizer cannot be read"):
        if file == TOKENIZER:
            tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model.folder / file))
        else:
            # Without a configuration, transformers reads config.json, and warns of model types that are not its own. It
            # does not need it, since tokenizer_config.json names the class.
            config = None if model.kind in FAMILIES else transformers.PretrainedConfig()
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                model.folder, config=config, local_files_only=True, trust_remote_code=False
            )
        return FolderTokenizer(tokenizer)
