"""The text of the study of language modelling: the sources of Python's own standard library, as tokens of its own."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from megatron_sse.data.builder import command as build
from megatron_sse.data.builder.request import Request as Build
from megatron_sse.data.corpus import read_documents, split_documents
from megatron_sse.data.metadata import read_metadata
from megatron_sse.data.train_tokenizer import command as train_tokenizer
from megatron_sse.data.train_tokenizer.request import Request as TrainTokenizer
from megatron_sse.errors import UserError

FOLDER = Path("corpora/language_study")
TRAINING, VALIDATION, TEST = (str(FOLDER / part) for part in ("training", "validation", "test"))


def make_corpus(vocab_size: int) -> None:
    """Make the token files of training, validation and test, and their tokenizer, where they are missing.

    Test documents are chosen like the validation's, from what is left. The tokenizer learns from training's alone.
    Raises UserError.
    """
    if all(Path(f"{prefix}.idx").exists() for prefix in (TRAINING, VALIDATION, TEST)):
        metadata = read_metadata(TRAINING)
        if metadata is None or metadata.vocab_size > vocab_size:
            raise UserError(f"model.vocab_size: got {vocab_size}, fewer than the tokens in {FOLDER}; remove the folder")
        return
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        parts = split_documents(read_documents(Path(sysconfig.get_paths()["stdlib"])))
        rest = split_documents(parts["training"])
        texts = {TRAINING: rest["training"], VALIDATION: parts["validation"], TEST: rest["validation"]}
        for prefix, documents in texts.items():
            lines = (json.dumps({"text": text.decode(errors="replace")}) for text in documents.values())
            Path(f"{prefix}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise UserError(f"{FOLDER}: cannot be written ({error}); start in a writable folder") from None
    tokenizer = FOLDER / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer.run(TrainTokenizer(inputs=(f"{TRAINING}.jsonl",), output=str(tokenizer), vocab_size=vocab_size))
    for prefix in texts:
        if not Path(f"{prefix}.idx").exists():
            build.run(Build(inputs=(f"{prefix}.jsonl",), output=prefix, tokenizer=str(tokenizer), workers=1))
