"""The description of a token file, <prefix>.json beside <prefix>.bin and <prefix>.idx: tokenizer, sizes, loss mask."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from megatron_sse.errors import UserError

# The files of a tokenizer. Beside a token file their names come after its prefix and a dot.
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"


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
    vocab_size: int
    documents: int
    tokens: int
    bytes: int
    unigram_bits_per_byte: float
    loss_mask: bool = False
    label_tokens: int | None = None
    label_bytes: int | None = None
    end: int | None = None

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss in nats per counted token to bits per counted byte of text."""
        return loss / math.log(2) * (self.label_tokens or self.tokens) / (self.label_bytes or self.bytes)

    def write(self, path: Path) -> None:
        """Write the description as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_metadata(prefix: str) -> Metadata | None:
    """Return the description of a token file; None where it has none (as with files of Megatron's own tools).

    Raises UserError where it cannot be read.
    """
    path = Path(prefix + ".json")
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        # Older files lack the newer keys.
        given = [field.name for field in fields(Metadata) if field.name in values or field.default is MISSING]
        return Metadata(**{name: values[name] for name in given})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not readable as the description of a token file ({error!r}); build the file again or delete it"
        ) from None
