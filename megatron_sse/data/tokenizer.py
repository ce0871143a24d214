"""Byte-level tokens: 0 to 255 are byte values, 256 ends a document."""

from __future__ import annotations

import numpy as np

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257


def encode_document(document: bytes) -> np.ndarray:
    """Return the tokens (uint16) of one document: its byte values, then the end of the document."""
    tokens = np.empty(len(document) + 1, dtype=np.uint16)
    tokens[:-1] = np.frombuffer(document, dtype=np.uint8)
    tokens[-1] = END_OF_DOCUMENT
    return tokens


def decode(tokens: np.ndarray) -> str:
    """Return the text of byte tokens, without ends of documents; invalid UTF-8 is replaced."""
    return tokens[tokens < END_OF_DOCUMENT].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
