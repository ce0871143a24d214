"""Conversations as documents of tokens: rendered by a chat template, with the answers as the labels that count."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_sse.data.builder.encode import Encoder
from megatron_sse.data.metadata import CHAT_TEMPLATE, TOKENIZER_SETTINGS
from megatron_sse.errors import UserError

# Rounds of all loops in one rendering; conversations have some thousand turns at most.
MAX_ROUNDS = 1_000_000
# Where a record's turns are: as most write them, and as ShareGPT does.
LISTS = MESSAGES, CONVERSATIONS = ("messages", "conversations")
COLUMNS = (*LISTS, "prompt", "completion", "tools")
# ShareGPT's names of who speaks, and those that its successors use.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# For the byte tokenizer, which has no special token but the end of a document.
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' }}
{%- endif %}
"""


class ChatError(Exception):
    """An error that says what is wrong with one conversation."""


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with bounds: a template of unknown origin must neither run for ever nor fill the memory.

    rounds: how often loops have gone round in this rendering, all loops together.
    """

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.rounds = 0
        self.filters["_bounded"] = self._count_rounds

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "_bounded", [], [], None, None, lineno=loop.lineno)
        return tree

    def _count_rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.rounds += 1
            if self.rounds > MAX_ROUNDS:
                raise ChatError(f"more than {MAX_ROUNDS:,} rounds of its loops")
            yield value

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse products and powers of any size, such as 9 ** 9 ** 9."""
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if max(sizes) > MAX_ROUNDS or (operator == "*" and sizes[0] * sizes[1] > 1000 * MAX_ROUNDS):
            raise ChatError(f"{operator} of numbers or texts that are too large")
        if operator == "**" and sizes[1] > 64:
            raise ChatError("a power that is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %} of transformers, which marks answers: ignored, since answers are found without it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template:
    """A chat template, rendered as transformers does, but without the current time, which would change the result."""

    def __init__(self, text: str, special: Mapping[str, str], name: str):
        self.environment = environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals.update(special)
        try:
            self.template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}:{error.lineno}: cannot be read as a chat template ({error.message})") from None

    def render(self, messages: list[dict[str, Any]], tools: Any, answer: bool) -> str:
        """Return the text of messages, and with `answer` the generation prompt before the next answer.

        Raises ChatError.
        """
        self.environment.rounds = 0
        try:
            return self.template.render(messages=messages, tools=tools, add_generation_prompt=answer)
        # A template runs Python expressions, which may raise anything.
        except Exception as error:
            raise ChatError(f"refused by the chat template ({' '.join(str(error).split())[:200]})") from None

    def render_spans(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and the spans that the assistant writes, ends of turn included.

        Raises ChatError where the text up to a turn depends on what follows it.
        """
        # An answer is the text between the prompt for it and the end of the conversation cut off after it.
        text = self.render(messages, tools, answer=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], tools, answer=True)
            after = self.render(messages[: index + 1], tools, answer=False)
            advice = "so the answer's tokens cannot be found; give another with --chat-template"
            if not after.startswith(before):
                raise ChatError(
                    f"the chat template's text of turn {index + 1} does not start with its generation prompt, {advice}"
                )
            if not text.startswith(after):
                raise ChatError(f"the chat template's text up to turn {index + 1} depends on later turns, {advice}")
            spans.append((len(before), len(after)))
        return text, spans


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes characters that are special in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True)
class Dialogue:
    """The tokens of a conversation, which of them count (uint8), and the bytes of its text and of what counts."""

    tokens_T: np.ndarray
    mask_T: np.ndarray
    num_bytes: int
    label_bytes: int


def encode_record(record: Mapping[str, Any], template: Template | None, encoder: Encoder) -> Dialogue:
    """Encode a record with `messages`, ShareGPT's `conversations`, or `prompt` and `completion`.

    Raises ChatError, or UserError.
    """
    name = next((name for name in LISTS if record.get(name) is not None), None)
    if name is not None:
        if template is None:
            raise UserError(
                f"--chat-template: the tokenizer has none ({CHAT_TEMPLATE}, or chat_template in "
                f"{TOKENIZER_SETTINGS}); give a file with one"
            )
        messages = _check_messages(name, record[name])
        return _encode_messages(messages, record.get("tools"), template, encoder)
    prompt, completion = (_check_text(record, name) for name in ("prompt", "completion"))
    tokens_T, num_prompt = encoder.encode_parts(prompt, completion)
    mask_T = np.ones(len(tokens_T), dtype=np.uint8)
    mask_T[:num_prompt] = 0
    label_bytes = len(completion.encode())
    return Dialogue(tokens_T, mask_T, len(prompt.encode()) + label_bytes, label_bytes)


def _encode_messages(messages: list[dict[str, Any]], tools: Any, template: Template, encoder: Encoder) -> Dialogue:
    text, spans = template.render_spans(messages, tools)
    if not spans:
        raise ChatError("no assistant turn, so no token counts")
    tokens_T, span_T = encoder.encode_spans(text, spans)
    is_last = messages[-1]["role"] == "assistant"
    # Some templates end a turn with the token that ends documents; others need it appended.
    last_turn_T = tokens_T[span_T == len(spans) - 1] if is_last else tokens_T[-1:]
    if encoder.end not in last_turn_T:
        tokens_T = np.append(tokens_T, np.array([encoder.end], dtype=tokens_T.dtype))
        span_T = np.append(span_T, len(spans) - 1 if is_last else -1)
    label_bytes = sum(len(text[begin:end].encode()) for begin, end in spans)
    return Dialogue(tokens_T, (span_T >= 0).astype(np.uint8), len(text.encode()), label_bytes)


def _check_messages(name: str, turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise ChatError(f"{name}: must be a list of at least one {{role, content}}")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{name}: {number}"
        if not isinstance(turn, dict):
            raise ChatError(f"{place}: must be an object with role and content")
        # A Parquet table holds every key in every row, with null where a message has none.
        message = {key: value for key, value in turn.items() if value is not None}
        if name == CONVERSATIONS and "from" in message:
            message = _from_share_gpt(place, message)
        if not isinstance(message.get("role"), str):
            raise ChatError(f"{place}: must be an object with role and content")
        if isinstance(message.get("content"), list):
            message["content"] = _join_parts(place, message["content"])
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ChatError(f"{place}: has no content")
        messages.append(message)
    return messages


def _from_share_gpt(place: str, turn: dict[str, Any]) -> dict[str, Any]:
    """Return {from, value} as {role, content}. Raises ChatError."""
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise ChatError(f"{place}: from: got {speaker!r}, allowed {', '.join(_SPEAKERS)}")
    return {"role": _SPEAKERS[speaker]} | ({"content": turn["value"]} if "value" in turn else {})


def _join_parts(place: str, parts: list[Any]) -> str:
    """Return the text of content in parts, [{"type": "text", "text": ...}, ...]. Raises ChatError for a picture."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ChatError(f"{place}: content has a part of type {kind!r}, allowed text")
        texts.append(part["text"])
    return "".join(texts)


def _check_text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        found = "missing" if value is None else type(value).__name__
        raise ChatError(f"no messages or conversations, and {name} is {found}, not text")
    return value
