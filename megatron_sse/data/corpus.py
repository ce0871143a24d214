"""A corpus that every machine already has: the sources of Python's own standard library."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from megatron_sse.config import RunConfig
from megatron_sse.data.metadata import Metadata
from megatron_sse.data.tokenizer import END_OF_DOCUMENT, VOCAB_SIZE, encode_document
from megatron_sse.data.writer import publish, write_index
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)

# Tests repeat the library's text, and character tables are not text. (site-packages is no identifier: see below.)
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "__pycache__"}
VALIDATION_SHARE = 0.07
MIN_BYTES = 1_000_000


def prepare_corpus(config: RunConfig) -> None:
    """Build the token files that `data.corpus` asks for and that do not exist yet. One process of a machine calls it.

    Raises UserError where no sources are found or the files cannot be written.
    """
    if config.data.corpus is None:
        return
    blends = {"training": config.data.train, "validation": config.data.validation or []}
    prefixes = {part: source.prefix for part, blend in blends.items() for source in blend if source.prefix}
    missing = {part: prefix for part, prefix in prefixes.items() if not Path(prefix + ".idx").exists()}
    if not missing:
        return
    parts = split_documents(read_documents(Path(sysconfig.get_paths()["stdlib"])))
    bits_v = byte_bits(parts["training"])
    for part, prefix in missing.items():
        try:
            metadata = write_token_file(prefix, parts[part], bits_v)
        except OSError as error:
            key = "data.train" if part == "training" else "data.validation"
            raise UserError(f"{key}: {prefix} cannot be written ({error}); give a path in a writable folder") from error
        logger.info("built %s: %d documents, %d tokens", prefix, metadata.documents, metadata.tokens)


def read_documents(folder: Path) -> dict[str, bytes]:
    """Return a document per top-level module or package of `folder`: its .py files, joined in the order of their paths.

    Raises UserError where there is too little text.
    """
    paths: list[Path] = []
    for parent, folders, files in os.walk(folder):
        # Folders whose names are no identifiers (config-3.11-x86_64-linux-gnu) are no packages but hold build scripts.
        folders[:] = [name for name in folders if name.isidentifier() and name not in SKIPPED_FOLDERS]
        paths += [Path(parent, name) for name in files if name.endswith(".py")]
    documents: dict[str, bytes] = {}
    for path in sorted(paths):
        name = path.relative_to(folder).parts[0].removesuffix(".py")
        documents[name] = documents.get(name, b"") + path.read_bytes()
    size = sum(map(len, documents.values()))
    if size < MIN_BYTES:
        raise UserError(
            f"data.corpus: python_stdlib found {size} bytes of Python sources in {folder}, at least {MIN_BYTES} are "
            "needed; use a Python installed with its sources, or give data.train and no data.corpus"
        )
    return {name: document for name, document in sorted(documents.items()) if document}


def split_documents(documents: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Split documents into training and validation.

    Complete documents are held out, in the order of their names' hashes, up to VALIDATION_SHARE of the bytes.
    """
    limit = VALIDATION_SHARE * sum(map(len, documents.values()))
    held_out: set[str] = set()
    held_bytes = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        # A document of more than a third of the validation part would dominate its loss.
        if held_bytes + len(documents[name]) <= limit and len(documents[name]) <= limit / 3:
            held_out.add(name)
            held_bytes += len(documents[name])
    return {
        "training": {name: document for name, document in documents.items() if name not in held_out},
        "validation": {name: document for name, document in documents.items() if name in held_out},
    }


def byte_bits(documents: dict[str, bytes]) -> np.ndarray:
    """Return each token's code length in bits (float64 [vocab]) by its frequency in `documents`, plus one."""
    counts = np.ones(VOCAB_SIZE)
    for document in documents.values():
        counts += np.bincount(encode_document(document), minlength=VOCAB_SIZE)
    return math.log2(counts.sum()) - np.log2(counts)


def write_token_file(prefix: str, documents: dict[str, bytes], bits_v: np.ndarray) -> Metadata:
    """Write <prefix>.bin, .json and .idx, and return the metadata. They appear complete or not at all."""
    target = Path(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=target.name + ".building-", dir=target.parent) as folder:
        finished = Path(folder)
        lengths, bits = [], 0.0
        with (finished / ".bin").open("wb") as file:
            for document in documents.values():
                tokens_T = encode_document(document)
                lengths.append(len(tokens_T))
                bits += float(bits_v[tokens_T].sum())
                file.write(tokens_T.data)
        size = sum(map(len, documents.values()))
        metadata = Metadata("bytes", VOCAB_SIZE, len(documents), sum(lengths), size, bits / size, end=END_OF_DOCUMENT)
        metadata.write(finished / ".json")
        write_index(finished / ".idx", np.dtype(np.uint16), len(documents), [np.array(lengths, dtype=np.int32)])
        publish(finished, target)
    return metadata
