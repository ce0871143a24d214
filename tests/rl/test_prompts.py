"""Problems as tokens and answers as texts, plain and in conversations."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sse.data.problems import Problem, read_problems
from megatron_sse.errors import UserError
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import ByteTokenizer, open_tokenizer
from megatron_sse.rl.prompts import Texts, choose, open_texts, read_prompts
from tests.inference.support import make_checkpoint, model
from tests.pretrained.test_text import make_tokenizer
from tests.rl.support import policy_config

END = 256


def test_texts_and_conversations(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    messages = '{"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}'
    file.write_text(f'{{"prompt": "2+2=", "answer": 4}}\n{messages}\n')
    plain, chat = read_problems("rl.prompts", str(file))
    assert (plain.answer, chat.prompt) == ("4", "2+2?")
    opened = open_model("checkpoint", make_checkpoint(tmp_path / "model", model()))
    texts = Texts(open_tokenizer(opened), opened)
    prompt = texts.encode(plain)
    assert bytes(prompt.tokens) == b"2+2=" and prompt.end == END
    assert texts.decode(prompt, [*b"4\n4", END]) == "4\n4" and texts.decode(prompt, [*"é".encode()[:1]]) == ""
    prompt = texts.encode(chat)
    assert bytes(prompt.tokens) == b"<|user|>\n2+2?\n<|assistant|>\n"
    # The template writes the last line's end.
    assert texts.decode(prompt, [*b"4\n", END]) == "4"
    with pytest.raises(UserError, match="p.jsonl:2: messages: need checkpoint.load_weights"):
        Texts(ByteTokenizer(), None).encode(chat)
    endless = ByteTokenizer()
    endless.end = None
    file.write_text('{"prompt": "2+2=", "answer": 4}\n')
    with pytest.raises(UserError, match="p.jsonl:1: the tokenizer has no token that ends an answer"):
        read_prompts("rl.prompts", str(file), Texts(endless, None), 257, 9, "")


def test_errors_of_conversations_name_the_line(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model(vocab_size=280))
    make_tokenizer(folder)
    opened = open_model("checkpoint", folder)
    texts = Texts(open_tokenizer(opened), opened)
    turn = {"role": "user", "content": "2+2?"}
    problem = Problem("2+2?", [turn], "4", "p.jsonl:2")
    with pytest.raises(UserError, match="^p.jsonl:2: messages: .* has no chat template .* or give a prompt in place"):
        texts.encode(problem)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') if messages|length > 2 else 'a' }}")
    with pytest.raises(UserError, match="^p.jsonl:2: messages: the conversation is "):
        texts.encode(replace(problem, messages=[turn] * 3))


def test_no_tokenizer(tmp_path: Path) -> None:
    config = policy_config(tmp_path, model=policy_config(tmp_path).model.model_dump() | {"vocab_size": 300})
    with pytest.raises(UserError, match="load_weights: got null, allowed a checkpoint with a tokenizer: 300"):
        open_texts(config, None)


def test_every_prompt_once_in_an_epoch() -> None:
    order = choose(5, 0, 20, seed=3)
    assert all(sorted(order[first : first + 5]) == list(range(5)) for first in range(0, 20, 5))
    assert order[:5] != order[5:10] and choose(5, 7, 4, seed=3) == order[7:11]
