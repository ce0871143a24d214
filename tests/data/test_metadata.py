"""The description of a token file: types and ranges of all values."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.data.metadata import read_metadata
from megatron_sse.errors import UserError

RIGHT: dict[str, Any] = {
    "tokenizer": "bytes",
    "vocab_size": 257,
    "documents": 2,
    "tokens": 9,
    "bytes": 7,
    "unigram_bits_per_byte": 4.5,
    "loss_mask": True,
    "label_tokens": 3,
    "label_bytes": 3,
    "end": 256,
}
WRONG: dict[str, list[Any]] = {
    "tokenizer": [None, 1, [], {}],
    "vocab_size": [None, "257", 257.5, True, 0, -1, 10**30],
    "documents": [None, "2", -1, [2]],
    "tokens": [None, "9", -1, 2**63],
    "bytes": [None, "7", -7, {}],
    "unigram_bits_per_byte": [None, "4.5", -1.0, float("nan"), float("inf"), []],
    "loss_mask": [None, "yes", 1, []],
    "label_tokens": ["3", -1, 3.5],
    "label_bytes": ["3", -1, []],
    "end": ["256", -1, True, {}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RIGHT | {key: value}))
    with pytest.raises(
        UserError, match=f"^{re.escape(str(tmp_path))}/a.json: not readable .*({key}|NaN|Infinity|JSON)"
    ):
        read_metadata(str(tmp_path / "a"))


def test_older_and_other_keys(tmp_path: Path) -> None:
    older = {key: RIGHT[key] for key in list(RIGHT)[:6]}
    (tmp_path / "a.json").write_text(json.dumps(older | {"made_by": "another tool"}))
    metadata = read_metadata(str(tmp_path / "a"))
    assert metadata is not None and (metadata.tokens, metadata.loss_mask, metadata.end) == (9, False, None)
    assert read_metadata(str(tmp_path / "b")) is None


def test_a_file_without_text_has_no_bits_per_byte(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RIGHT | {"bytes": 0, "label_bytes": 0}))
    metadata = read_metadata(str(tmp_path / "a"))
    assert metadata is not None and metadata.bits_per_byte(1.0) != metadata.bits_per_byte(1.0)
