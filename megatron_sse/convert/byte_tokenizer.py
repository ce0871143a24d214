"""A tokenizer of transformers for models of bytes: token b is byte b, token 256 the end of a document."""

from pathlib import Path
from typing import Any

from megatron_sse.data.metadata import TOKENIZER, TOKENIZER_SETTINGS
from megatron_sse.data.tokenizer import END_OF_DOCUMENT
from megatron_sse.hf.folder import write_json

_END = "<|endoftext|>"


def write_byte_tokenizer(folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json; return the settings for config.json. Raises OSError."""
    end = {"id": END_OF_DOCUMENT, "content": _END, "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {symbol: byte for byte, symbol in enumerate(_symbols())}, "merges": []},
    }
    write_json(folder / TOKENIZER, tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "pad_token": _END}
    write_json(folder / TOKENIZER_SETTINGS, settings | {"clean_up_tokenization_spaces": False})
    return {"eos_token_id": END_OF_DOCUMENT, "pad_token_id": END_OF_DOCUMENT}


def _symbols() -> list[str]:
    """Return the characters that stand for the 256 bytes in such a tokenizer: printable ones stand for themselves, the
    others are those from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
