"""The description of a token file, <prefix>.json beside <prefix>.bin and <prefix>.idx: tokenizer, sizes, loss mask."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_sse.errors import UserError
from megatron_sse.reading import NotFoundError, read_json

# Numbers of tokens, documents and bytes that a token file can have.
Number = Annotated[int, Field(ge=0, lt=1 << 63)]

# The files of a tokenizer. Beside a token file their names come after its prefix and a dot.
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
# A chat template in a file of its own; older folders have it in the settings.
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass
class Metadata:
    """The description of a token file.

    Attributes:
        documents, tokens, bytes: counts of the file; bytes are those of its text.
        unigram_bits_per_byte: what a model of single-token frequencies reaches on this file. The frequencies are those
            of the training file for data.corpus, and the file's own for `data build`.
        loss_mask: whether <prefix>.mask says which tokens count as labels (uint8 [tokens], 1 counts).
        label_tokens, label_bytes: those that count, where there is a mask.
        end: the token that ends a document; None where the file does not name it.
    """

    tokenizer: str
    vocab_size: Annotated[int, Field(ge=1, le=1 << 31)]
    documents: Number
    tokens: Number
    bytes: Number
    unigram_bits_per_byte: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    loss_mask: bool = False
    label_tokens: Number | None = None
    label_bytes: Number | None = None
    end: Number | None = None

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text of a token, of those that count as labels."""
        return (self.label_bytes or self.bytes) / max(1, self.label_tokens or self.tokens)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss in nats per counted token to bits per counted byte of text."""
        return BytesOfTokens.of_blend([(self, 1.0)]).bits_per_byte(loss)

    def write(self, path: Path) -> None:
        """Write the description as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class BytesOfTokens:
    """How a loss per token becomes one per byte of text.

    bytes_per_token: of those that count as labels. unigram_bits_per_byte: what frequencies of single tokens reach.
    """

    bytes_per_token: float
    unigram_bits_per_byte: float

    @classmethod
    def of_blend(cls, files: Sequence[tuple[Metadata, float]]) -> BytesOfTokens:
        """Return those of a blend of files, each with its weight: its share of the samples."""
        total = sum(weight for _, weight in files)
        num_bytes = sum(weight / total * file.bytes_per_token for file, weight in files)
        bits = sum(weight / total * file.bytes_per_token * file.unigram_bits_per_byte for file, weight in files)
        return cls(num_bytes, bits / num_bytes if num_bytes else math.nan)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss in nats per token to bits per byte."""
        return loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else math.nan


def read_metadata(prefix: str) -> Metadata | None:
    """Return the description of a token file; None where it has none (as with files of Megatron's own tools).

    Raises UserError where it cannot be read.
    """
    path = Path(prefix + ".json")
    try:
        return read_json(path, Metadata)
    except NotFoundError:
        return None
    except UserError as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise UserError(
            f"{path}: not readable as the description of a token file ({problem}); build the file again or delete it"
        ) from None
