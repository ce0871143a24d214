"""Files made with a tokenizer hold the tokens that the tokenizers library gives."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from megatron_sse.data.builder import encode
from megatron_sse.data.builder.encode import token_type
from megatron_sse.data.metadata import read_metadata
from tests.data.builder.support import TEXTS, documents, files, make_tokenizer, records, run, write_lines


@pytest.mark.parametrize("begin", [False, True])
def test_tokens_are_those_of_the_library(tmp_path: Path, begin: bool) -> None:
    tokenizer = make_tokenizer(tmp_path / "tiny", begin)
    path = write_lines(tmp_path / "a.jsonl", records([*TEXTS, "text with <end> in it"]))
    run(tmp_path / "out", path, tokenizer=str(tmp_path / "tiny"))
    end = tokenizer.token_to_id("<end>")
    expected = [[*tokenizer.encode(text).ids, end] for text in [*TEXTS, "text with <end> in it"]]
    assert [document.tolist() for document in documents(tmp_path / "out")] == expected
    assert all((tokens[0] == tokenizer.token_to_id("<begin>")) == begin for tokens in expected)
    metadata = read_metadata(str(tmp_path / "out"))
    assert metadata is not None and metadata.vocab_size == tokenizer.get_vocab_size() and metadata.end == end
    assert metadata.tokenizer.startswith("tiny sha256:")
    # Built with several processes, and with the tokenizer's file in place of its folder.
    run(tmp_path / "two", path, tokenizer=str(tmp_path / "tiny/tokenizer.json"), workers=2)
    assert files(tmp_path / "two") == files(tmp_path / "out")


def long_text() -> str:
    """Return lines with all kinds of ends, which begin with spaces, line ends and words."""
    generator = np.random.default_rng(0)
    words = ["def", "f(x):", " ", "\n", "\n\n", "\n    ", ".\n", "🐈\n", "12\n", "\t", "ü", "word", "\r\n", "words"]
    return "".join(words[number] for number in generator.integers(0, len(words), 20_000))


@pytest.mark.parametrize("depends", [False, True])
def test_a_long_text_is_cut_where_that_changes_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depends: bool
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tiny", begin=True)
    if depends:
        # This tokenizer puts a space before the first word that it encodes, so that texts must not be cut.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.save(str(tmp_path / "tiny/tokenizer.json"))
    monkeypatch.setattr(encode, "_PIECE", 1_000)
    encoder = encode.FileEncoder(tmp_path / "tiny/tokenizer.json", end=1)
    text = long_text()
    pieces = list(encoder._pieces(text))
    assert "".join(pieces) == text and (len(pieces) == 1 if depends else max(map(len, pieces)) < 2_000)
    assert encoder.encode([text]).tolist() == [*tokenizer.encode(text).ids, 1]


def test_what_the_file_says_about_cutting_and_padding_is_not_done(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tiny")
    expected = len(tokenizer.encode(TEXTS[3]).ids) + 1
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tiny/tokenizer.json"))
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records(["a", TEXTS[3]])), tokenizer=str(tmp_path / "tiny"))
    assert [len(document) for document in documents(tmp_path / "out")] == [2, expected]


def test_an_end_that_the_tokenizer_sets_is_not_set_twice_and_another_can_be_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tiny", begin=True)
    processor = json.loads(tokenizer.to_str())["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "<end>", "type_id": 0}})
    processor["special_tokens"]["<end>"] = {"id": "<end>", "ids": [1], "tokens": ["<end>"]}
    whole = json.loads(tokenizer.to_str()) | {"post_processor": processor}
    (tmp_path / "tiny/tokenizer.json").write_text(json.dumps(whole))
    path = write_lines(tmp_path / "a.jsonl", records(["a b"]))
    run(tmp_path / "out", path, tokenizer=str(tmp_path / "tiny"))
    tokens = documents(tmp_path / "out")[0].tolist()
    assert tokens == Tokenizer.from_file(str(tmp_path / "tiny/tokenizer.json")).encode("a b").ids
    run(tmp_path / "other", path, tokenizer=str(tmp_path / "tiny"), end="<|user|>")
    assert documents(tmp_path / "other")[0].tolist() == [*tokens, tokenizer.token_to_id("<|user|>")]
    assert json.loads((tmp_path / "other.tokenizer_config.json").read_text())["eos_token"] == "<|user|>"


def test_the_tokenizer_is_saved_beside_the_file(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tiny", auto_map={"AutoTokenizer": "code.py"}, chat_template="{{ messages }}")
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records()), tokenizer=str(tmp_path / "tiny"))
    assert (tmp_path / "out.tokenizer.json").read_bytes() == (tmp_path / "tiny/tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out.tokenizer_config.json").read_text()) == {
        "eos_token": "<end>",
        "chat_template": "{{ messages }}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_the_smallest_type_that_holds_the_vocabulary() -> None:
    assert [token_type(size) for size in (257, 65536, 65537)] == [np.uint16, np.uint16, np.int32]


def test_a_large_vocabulary_is_written_in_32_bits(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "large")
    tokenizer.add_tokens([f"<{number}>" for number in range(65536)])
    tokenizer.save(str(tmp_path / "large/tokenizer.json"))
    text = "a <65535> b"
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records([text])), tokenizer=str(tmp_path / "large"))
    document = documents(tmp_path / "out")[0]
    assert document.dtype == np.int32 and document.max() > 65535
    assert document[:-1].tolist() == tokenizer.encode(text).ids
