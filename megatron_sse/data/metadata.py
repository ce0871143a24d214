"""What a token file does not say about itself: <prefix>.json beside <prefix>.bin and <prefix>.idx."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_sse.errors import UserError


@dataclass
class Metadata:
    """Attributes: counts of the file's documents, tokens and bytes of text, and the bits per byte that a model of
    single-token frequencies (those of the training file) reaches on this file."""

    tokenizer: str
    vocab_size: int
    documents: int
    tokens: int
    bytes: int
    unigram_bits_per_byte: float

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token, as bits per byte of text."""
        return loss / math.log(2) * self.tokens / self.bytes

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_metadata(prefix: str) -> Metadata | None:
    """Metadata of a token file; None where it has none (files of Megatron's own tools). Raises UserError if broken."""
    path = Path(prefix + ".json")
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        return Metadata(**{field.name: values[field.name] for field in fields(Metadata)})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not readable as the description of a token file ({error!r}); build the file again or delete it"
        ) from None
