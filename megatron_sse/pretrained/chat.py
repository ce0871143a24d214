"""Conversations as prompts, rendered by the chat template that is kept with a model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sse.data.builder.chat import DEFAULT_TEMPLATE, SPECIAL_TOKENS, ChatError, Template
from megatron_sse.data.builder.encode import find_tokenizer, read_template
from megatron_sse.data.metadata import CHAT_TEMPLATE, TOKENIZER_SETTINGS
from megatron_sse.errors import UserError
from megatron_sse.pretrained.open import Model
from megatron_sse.pretrained.text import ByteTokenizer, Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """The conversations of a model.

    closing: what the template writes behind an answer. end: the token that ends an answer; None where there is none.
    """

    template: Template
    tokenizer: Tokenizer
    closing: str
    end: int | None

    def encode(self, messages: list[Message], key: str = "--chat") -> list[int]:
        """Return the tokens of a conversation up to where the assistant's next answer begins. Raises UserError.

        key: what gave the messages, for the error.
        """
        # The template writes what begins a text.
        return self.tokenizer.encode(_render(self.template, messages, key, answer=True), continues=True)


def user_says(text: str) -> Message:
    """Return a turn of the user."""
    return {"role": "user", "content": text}


def assistant_says(text: str) -> Message:
    """Return a turn of the assistant."""
    return {"role": "assistant", "content": text}


def open_chat(model: Model, tokenizer: Tokenizer, key: str = "--chat", instead: str = "leave --chat out") -> Chat:
    """Return the conversations of a model with the chat template in its folder; for byte tokens without one, with the
    template of `data build`.

    key, instead: what asks for conversations and what a user can do instead, for the errors. Raises UserError where
    there is no template, or it cannot be read.
    """
    if isinstance(tokenizer, ByteTokenizer):
        own = read_template(model.folder)
        name = "the template of byte tokens" if own is None else f"{model.folder / CHAT_TEMPLATE}"
        return _make_chat(Template(DEFAULT_TEMPLATE if own is None else own, {}, name), tokenizer, key)
    files = find_tokenizer(str(model.folder))
    if files.template is None:
        raise UserError(
            f"{key}: {model.folder} has no chat template ({CHAT_TEMPLATE}, or chat_template of {TOKENIZER_SETTINGS}); "
            f"put one there, or {instead}"
        )
    special = {name: token for name in SPECIAL_TOKENS if (token := files.special(name)) is not None}
    template = Template(files.template, special, f"{model.folder}: chat template")
    return _make_chat(template, tokenizer, key)


def _make_chat(template: Template, tokenizer: Tokenizer, key: str) -> Chat:
    """Find how the template ends an answer: by a special token, such as <|im_end|>, or else by the end of the text."""
    answer = "an answer"
    text = _render(template, [user_says("a question"), assistant_says(answer)], key, answer=False)
    closing = text.rpartition(answer)[2] if answer in text else ""
    tokens = tokenizer.encode(closing, continues=True) if closing else []
    is_marked = bool(tokens) and tokenizer.is_special(tokens[0])
    return Chat(template, tokenizer, closing, tokens[0] if is_marked else tokenizer.end)


def _render(template: Template, messages: list[Message], key: str, answer: bool) -> str:
    try:
        return template.render([dict(message) for message in messages], None, answer)
    except ChatError as error:
        raise UserError(f"{key}: the conversation is {error}") from None
