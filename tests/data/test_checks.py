"""Each wrong token file is refused in one line that says what to change."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from megatron_sse.config import Source
from megatron_sse.data import checks
from megatron_sse.data.index_format import DTYPES
from megatron_sse.data.sources import check_data
from megatron_sse.errors import UserError
from tests.data.files import random_documents, run_config, write_tokens


def edit(path, change):
    data = bytearray(Path(path).read_bytes())
    change(data)
    Path(path).write_bytes(data)


def put(path, offset, kind, value):
    edit(path, lambda data: struct.pack_into(kind, data, offset, value))


def write_metadata(prefix, **changes):
    values = {"tokenizer": "bytes", "vocab_size": 64, "documents": 60, "tokens": 300, "bytes": 240}
    Path(prefix + ".json").write_text(json.dumps({**values, "unigram_bits_per_byte": 4.5, **changes}))


# Name: (a change to the files of a prefix, settings, the error)
BAD_FILES = {
    "index without header": (lambda p: edit(p + ".idx", lambda d: d.__delitem__(slice(20, None))), {}, "20 bytes"),
    "version": (lambda p: put(p + ".idx", 9, "<Q", 2), {}, r"train\.idx: index version 2"),
    "float tokens": (lambda p: put(p + ".idx", 17, "<B", 7), {}, r"train\.idx: token dtype code 7"),
    "sequence pointer": (lambda p: put(p + ".idx", 34 + 4 * 60 + 8, "<q", 1), {}, r"train\.idx: sequences do not"),
    "document bounds": (lambda p: put(p + ".idx", 34 + 12 * 60, "<q", 3), {}, r"train\.idx: document bounds"),
    "tokens of another": (lambda p: edit(p + ".bin", lambda d: d.extend(b"ab")), {}, r"train\.bin: .*its index says"),
    "too short": (lambda p: None, {"data": {"sequence_length": 4096}}, r"data\.train: .* 0 samples .* 4096"),
    "metadata broken": (lambda p: Path(p + ".json").write_text("{"), {}, r"train\.json: not readable"),
    "metadata incomplete": (lambda p: Path(p + ".json").write_text("{}"), {}, r"train\.json: not readable"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, tmp_path):
    spoil, sections, message = BAD_FILES[name]
    prefix = str(tmp_path / "train")
    write_tokens(prefix, random_documents(60, longest=11))
    if "corpus" in name:
        sections = {**sections, "model": {"vocab_size": 300}}
    config = run_config(prefix, **{section: dict(values) for section, values in sections.items()})
    if "data" in sections:
        config.data.train = [Source(prefix=prefix)]
    spoil(prefix)
    with pytest.raises(UserError, match=message) as caught:
        check_data(config)
    assert "\n" not in str(caught.value)


def test_good_files_pass(tmp_path):
    prefix = str(tmp_path / "train")
    write_tokens(prefix, random_documents(60, longest=11))
    write_metadata(prefix)
    check_data(run_config(prefix))


def test_a_negative_token_is_found(tmp_path):
    prefix = str(tmp_path / "train")
    write_tokens(prefix, [[1, 2, -3] + [4] * 40], dtype=np.int32)
    with pytest.raises(UserError, match="token id -3 at token 2"):
        check_data(run_config(prefix))


def test_prefix_with_suffix_is_named(tmp_path):
    prefix = str(tmp_path / "train")
    write_tokens(prefix, random_documents(60, longest=11))
    with pytest.raises(UserError, match=r"give it without \.bin"):
        check_data(run_config(prefix + ".bin"))


def test_validation_needs_all_its_batches(tmp_path):
    prefix = str(tmp_path / "train")
    write_tokens(prefix, random_documents(60, longest=11))
    config = run_config(prefix, data={"validation": prefix}, training={"validation_batches": 3})
    with pytest.raises(UserError, match=r"data\.validation: .*24 are needed, lower training\.validation_batches"):
        check_data(config)


def test_large_files_are_read_at_both_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checks, "CHECKED_BYTES", 40)
    for place, found in [(3, True), (100, False), (-2, True)]:
        tokens = [1] * 200
        tokens[place] = 64
        prefix = str(tmp_path / f"train{place}")
        write_tokens(prefix, [tokens])
        caplog.set_level("INFO")
        if found:
            with pytest.raises(UserError, match="token id 64"):
                check_data(run_config(prefix))
        else:
            check_data(run_config(prefix))
            assert "checked in the first and last 10 of 200 tokens" in caplog.text


def test_a_corpus_that_is_not_built_yet_is_not_missing(tmp_path):
    prefix = str(tmp_path / "train")
    check_data(run_config(prefix, data={"corpus": "python_stdlib"}, model={"vocab_size": 257}))


def test_dtypes_are_those_of_megatron() -> None:
    kinds = {kind.value: np.dtype(DType.dtype_from_code(kind.value)) for kind in DType}
    assert DTYPES == {code: dtype for code, dtype in kinds.items() if np.issubdtype(dtype, np.integer)}
