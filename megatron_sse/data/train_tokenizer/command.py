"""`megatron-sse data train-tokenizer`: make a tokenizer of text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_sse.data.builder.inputs import Inputs, find_inputs
from megatron_sse.data.builder.job import texts_of
from megatron_sse.data.builder.read import read_unit
from megatron_sse.data.builder.request import REFUSE
from megatron_sse.data.builder.tally import WRONG, Tally
from megatron_sse.data.metadata import TOKENIZER, TOKENIZER_SETTINGS
from megatron_sse.data.train_tokenizer.request import NUM_BYTES, Request
from megatron_sse.errors import UserError
from megatron_sse.installed import require

# What is read at once.
_UNIT_BYTES = 1 << 24


def run(request: Request) -> int:
    """Make a tokenizer and print what it is; return the exit status. Raises UserError."""
    require("tokenizers", "data train-tokenizer", "data")
    # Packages of an extra.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = Path(request.output)
    inputs = find_inputs(request.inputs, request.format, (request.field,), Path(os.path.abspath(folder)), _UNIT_BYTES)
    tally = Tally(WRONG if request.wrong == REFUSE else ())
    special = [request.end, *request.special]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=request.vocab_size,
        special_tokens=special,
        # So that any text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_read_texts(inputs, request.field, tally), trainer)
    if tokenizer.get_vocab_size() == NUM_BYTES + len(special):
        raise UserError(f"INPUT: no text to learn from in {', '.join(request.inputs)}")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"--output: {folder} exists and is not overwritten; name another folder") from None
    tokenizer.save(str(folder / TOKENIZER))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": request.end}
    (folder / TOKENIZER_SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    size = tokenizer.get_vocab_size()
    print(f"{folder}: {size:,} tokens; model.vocab_size needs as many")
    if size < request.vocab_size:
        print(f"the texts have no more than these, fewer than --vocab-size {request.vocab_size:,}")
    for kind, count in tally.counts.items():
        print(f"skipped: {count} x {kind}")
    return 0


def _read_texts(inputs: Inputs, field: str, tally: Tally) -> Iterator[str]:
    """Yield all texts, one file or record after the other. Raises UserError."""
    for unit in inputs.units:
        for place, record in read_unit(unit, (field,), tally, lambda count: None):
            yield from (texts_of(place, record, field, tally) or ()) if isinstance(record, dict) else record
