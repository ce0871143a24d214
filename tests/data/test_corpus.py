import logging
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sse.data import corpus
from megatron_sse.data.corpus import prepare_corpus
from megatron_sse.data.metadata import read_metadata
from megatron_sse.data.sources import check_data
from megatron_sse.data.tokenizer import END_OF_DOCUMENT, decode, encode_document
from megatron_sse.errors import UserError
from tests.data.files import run_config

BYTES = {"vocab_size": 257}


def corpus_config(folder, validation=True):
    data = {"corpus": "python_stdlib", "validation": str(folder / "validation") if validation else None}
    return run_config(str(folder / "train"), data=data, model=BYTES)


def test_tokens_are_bytes_and_decode_back():
    text = "def café(): pass\n"
    tokens = encode_document(text.encode())
    assert tokens.dtype == np.uint16 and tokens[-1] == END_OF_DOCUMENT and tokens[:3].tolist() == [100, 101, 102]
    assert decode(tokens) == text
    assert encode_document(b"").tolist() == [END_OF_DOCUMENT]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    prepare_corpus(corpus_config(folder))
    return folder


def test_the_standard_library_becomes_two_files_that_pass_the_checks(built):
    check_data(corpus_config(built))
    train, validation = (read_metadata(str(built / part)) for part in ("train", "validation"))
    assert train.tokens == train.bytes + train.documents
    assert 0.05 < validation.bytes / (train.bytes + validation.bytes) < 0.1
    assert validation.documents >= 5
    # A plausible range for English and code: less than 8 bits, and more than the 3 of unigram models.
    assert 3 < train.unigram_bits_per_byte < 6 and 3 < validation.unigram_bits_per_byte < 6
    assert sorted(path.name for path in built.iterdir()) == [
        f"{part}.{suffix}" for part in ("train", "validation") for suffix in ("bin", "idx", "json")
    ]


def test_documents_are_complete_and_in_one_part_only(built):
    parts = {name: IndexedDataset(str(built / name)) for name in ("train", "validation")}
    texts = {name: [decode(file[i]) for i in range(len(file))] for name, file in parts.items()}
    assert not set(texts["train"]) & set(texts["validation"])
    whole = "".join(path.read_text() for path in sorted(Path(logging.__file__).parent.glob("*.py")))
    assert whole in texts["train"] + texts["validation"]
    for file in parts.values():
        assert all((file[i] == END_OF_DOCUMENT).sum() == 1 and file[i][-1] == END_OF_DOCUMENT for i in range(len(file)))


def test_a_part_that_exists_is_kept_and_a_missing_one_is_built_the_same(built, tmp_path):
    prepare_corpus(corpus_config(tmp_path, validation=False))
    assert not (tmp_path / "validation.idx").exists()
    before = (tmp_path / "train.bin").stat()
    prepare_corpus(corpus_config(tmp_path))
    assert (tmp_path / "train.bin").stat().st_mtime_ns == before.st_mtime_ns
    assert (tmp_path / "validation.bin").read_bytes() == (built / "validation.bin").read_bytes()


def test_a_build_that_is_killed_is_not_taken_as_complete(tmp_path, monkeypatch):
    replaced = []

    def die_at_the_index(source, target):
        if target.endswith(".idx"):
            raise KeyboardInterrupt
        replaced.append(target)
        Path(source).rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(corpus.os, "replace", die_at_the_index)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(corpus_config(tmp_path))
    assert replaced and not (tmp_path / "train.idx").exists()
    prepare_corpus(corpus_config(tmp_path))
    check_data(corpus_config(tmp_path))


def test_unigram_bits_are_the_cross_entropy_by_hand(tmp_path):
    bits = corpus.byte_bits({"a": b"aab"})
    # Counts plus one: a has 3, b 2, the end 2, the other 254 tokens 1 each; 261 in all.
    expected = np.log2(261 / np.array([3, 2, 2, 1]))
    assert np.allclose(bits[[97, 98, END_OF_DOCUMENT, 99]], expected)
    metadata = corpus.write_token_file(str(tmp_path / "file"), {"b": b"ac"}, bits)
    assert np.isclose(metadata.unigram_bits_per_byte, (expected[0] + expected[3] + expected[2]) / 2)
    # ln 2 nats are one bit per token, and three tokens stand for two bytes.
    assert np.isclose(metadata.bits_per_byte(np.log(2)), 1.5)


def test_tests_and_build_scripts_are_left_out(tmp_path):
    filler = b"#" * corpus.MIN_BYTES
    for name in ("a/z.py", "a/b/c.py", "a/test/t.py", "config-3.11/x.py", "site-packages/p.py", "m.py", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "big.py").write_bytes(filler)
    assert corpus.read_documents(tmp_path) == {"a": b"a/b/c.pya/z.py", "m": b"m.py", "big": filler}


def test_a_python_without_sources_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.corpus: python_stdlib found 0 bytes"):
        corpus.read_documents(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"data\.train: .*file/train cannot be written"):
        prepare_corpus(corpus_config(tmp_path / "file"))
