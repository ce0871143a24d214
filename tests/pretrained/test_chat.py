"""Conversations are rendered by the template that is kept with a model, and end where that ends an answer."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from megatron_sse.errors import UserError
from megatron_sse.pretrained.chat import assistant_says, open_chat, user_says
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import open_tokenizer
from tests.data.builder.support import make_tokenizer
from tests.inference.support import make_checkpoint, model

# Ends of turns are not the end of the text.
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|user|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of a random model with a tokenizer, whose template is in a file of its own."""
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model", model())
    made = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<begin>", "eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_tokens_are_those_of_transformers(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    opened = open_model("", folder)
    tokenizer = open_tokenizer(opened)
    chat = open_chat(opened, tokenizer)
    said = [user_says("words and words"), assistant_says("a"), user_says("def f(x):")]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert chat.encode(said) == expected
    assert chat.closing == "<|user|>" and chat.end == theirs.convert_tokens_to_ids("<|user|>")
    # Where the template ends an answer with plain text, the end of the text ends it.
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|user|>{% endfor", "\n{% endfor"))
    assert open_chat(opened, tokenizer).end == theirs.eos_token_id != chat.end


def test_a_folder_without_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    opened = open_model("", folder)
    with pytest.raises(UserError, match=r"^--chat: .* has no chat template \(chat_template.jinja, or chat_template of"):
        open_chat(opened, open_tokenizer(opened))
