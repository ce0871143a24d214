"""Tokenizers: bytes, and those in a model's folder."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sse.errors import UserError
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import ByteTokenizer, open_tokenizer
from tests.inference.support import make_checkpoint, model

TEXT = "zwölf Boxkämpfer jagen 🐈 Viktor quer über den großen Sylter Deich"


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    return fast


def test_bytes() -> None:
    tokenizer, text = ByteTokenizer(), ByteTokenizer().stream()
    parts = [text(token) for token in [*tokenizer.encode(TEXT), 256]]
    assert "".join(parts) == TEXT and "" in parts[:-1] and parts[-1] == ""
    assert tokenizer.decode([*tokenizer.encode(TEXT), 256]) == TEXT and tokenizer.decode("é".encode()[:1]) == ""
    assert text(0xFF) == "\ufffd"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_of_the_folder(tmp_path: Path, file: str) -> None:
    folder = make_checkpoint(tmp_path / "model", model(vocab_size=280))
    fast = make_tokenizer(folder)
    if file == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    tokenizer = open_tokenizer(open_model("", folder))
    tokens = tokenizer.encode(TEXT)
    assert tokens == fast.encode(TEXT)
    text = tokenizer.stream()
    parts = [text(token) for token in tokens]
    assert "".join(parts) == TEXT and len([part for part in parts if part]) > 20
    assert tokenizer.decode(tokens) == TEXT and tokenizer.decode(tokenizer.encode("a 🐈")[:-1]) == "a "
    if file == "tokenizer_config.json":
        assert tokenizer.end == fast.eos_token_id is not None


def test_missing_and_damaged(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model(vocab_size=280))
    with pytest.raises(UserError, match="no tokenizer .* put the tokenizer's files there"):
        open_tokenizer(open_model("", folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: the tokenizer cannot be read"):
        open_tokenizer(open_model("", folder))
