"""Inputs, tokenizers and builds for tests."""

import gzip
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_sse import durable
from megatron_sse.data.builder import command
from megatron_sse.data.builder.request import Request
from megatron_sse.data.tokenizer import decode

TEXTS = [
    "def f(x):\n    return x\n",
    "zwölf Boxkämpfer 🐈 jagen Viktor",
    "a",
    "words and words " * 40,
    "\n \n",
    "ü" * 9,
]


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Write a JSONL file: bytes unchanged, all else as JSON."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def records(texts: Sequence[str] = TEXTS) -> list[dict[str, Any]]:
    return [{"id": number, "text": text} for number, text in enumerate(texts)]


def run(output: Path, *inputs: Path, picture: bool = False, **options: Any) -> int:
    """Build in this process, in units of 64 bytes, without disk syncs and (unless `picture`) without pictures."""
    given = {"workers": 1, "unit_bytes": 64, **options}
    request = Request(inputs=tuple(str(path) for path in inputs), output=str(output), **given)
    with ExitStack() as stack:
        stack.enter_context(patch.object(durable.os, "fsync"))
        if not picture:
            stack.enter_context(patch.object(command, "draw_lengths"))
        return command.run(request)


def documents(prefix: Path) -> list[np.ndarray]:
    """Return the token documents of a finished file, as Megatron-Core reads them."""
    file = IndexedDataset(str(prefix))
    # Copied, since the memory map ends with the file.
    return [file[number].copy() for number in range(len(file))]


def texts(prefix: Path) -> list[str]:
    """Return the documents of a byte-token file as texts."""
    return [decode(document) for document in documents(prefix)]


def files(prefix: Path) -> dict[str, bytes]:
    """Return the content of all files of a prefix except the picture, which contains matplotlib's version."""
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.glob(f"{prefix.name}.*")
        if path.suffix != ".png"
    }


def make_tokenizer(folder: Path, begin: bool = False, vocab_size: int = 300, **settings: Any) -> Tokenizer:
    """Make a byte-level BPE with <begin>, <end>, <|user|> and <|assistant|>. begin: put <begin> before texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<begin>", "<end>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", **settings}))
    return tokenizer
