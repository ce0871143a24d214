"""Chats are rendered as transformers renders them, and only the assistant's words count in the loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_sse.config import plan_stages
from megatron_sse.data.builder.chat import DEFAULT_TEMPLATE, ChatError, Template
from megatron_sse.data.builder.encode import ByteEncoder
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.data.metadata import read_metadata
from megatron_sse.data.tokenizer import END_OF_DOCUMENT, decode
from megatron_sse.errors import UserError
from tests.data.builder.support import documents, make_tokenizer, run, write_lines
from tests.data.files import data_parallel_groups, run_config

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "174 cm 🐈"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "words and words"},
]
# Turns end with the token that ends documents, as in ChatML.
CLOSED = """\
{{- '<begin>' }}
{% for message in messages %}
    {{- '<|user|>' if message.role != 'assistant' else '<|assistant|>' }}{{ message.content }}{{ eos_token -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|assistant|>' -}}
{% endif %}"""
MARKED = CLOSED.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}")


def mask_of(prefix: Path) -> list[np.ndarray]:
    """Return the loss mask of each document."""
    lengths = [len(document) for document in documents(prefix)]
    mask = np.fromfile(f"{prefix}.mask", dtype=np.uint8)
    assert len(mask) == sum(lengths) and set(mask.tolist()) <= {0, 1}
    return np.split(mask, np.cumsum(lengths)[:-1])


def counted(prefix: Path) -> list[str]:
    """Return the text of each byte document that counts in the loss, with its end as $."""
    kept = [document[mask == 1] for document, mask in zip(documents(prefix), mask_of(prefix), strict=True)]
    return [decode(tokens) + "$" * int((tokens == END_OF_DOCUMENT).sum()) for tokens in kept]


def test_answers_and_ends_count(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": TURNS}, {"prompt": "Größe: ", "completion": "174 cm 🐈"}, {"messages": TURNS[:4]}]
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", rows), format="chat")
    assert counted(tmp_path / "out") == ["174 cm 🐈\nwords and words\n$", "174 cm 🐈$", "174 cm 🐈\n"]
    whole = [decode(document) for document in documents(tmp_path / "out")]
    assert whole[0].startswith("<|system|>\nBe brief.\n<|user|>\nGröße?\n<|assistant|>\n174 cm 🐈\n<|user|>")
    assert whole[1] == "Größe: 174 cm 🐈"
    metadata = read_metadata(str(tmp_path / "out"))
    assert metadata is not None and metadata.loss_mask
    sizes = [len(text.encode()) for text in ("174 cm 🐈\nwords and words\n", "174 cm 🐈", "174 cm 🐈\n")]
    assert metadata.label_bytes == sum(sizes) and metadata.label_tokens == sum(sizes) + 2
    labels = np.concatenate(documents(tmp_path / "out"))[np.concatenate(mask_of(tmp_path / "out")) == 1]
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    expected = -len(labels) * (share * np.log2(share)).sum() / sum(sizes)
    assert np.isclose(metadata.unigram_bits_per_byte, expected)
    # The loss covers labels only: ln 2 nats for each.
    assert np.isclose(metadata.bits_per_byte(np.log(2)), (sum(sizes) + 2) / sum(sizes))


def test_training_counts_the_answers_alone(tmp_path: Path) -> None:
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}]), format="chat")
    sections: dict[str, Any] = {
        "model": {"vocab_size": 257},
        "data": {"sequence_length": 256, "packing": "best_fit"},
        "training": {"global_batch_size": 1, "micro_batch_size": 1},
    }
    config = run_config(str(tmp_path / "out"), **sections)
    batch = next(build_data_iterators(plan_stages(config)[0], data_parallel_groups(), 0)[0])
    labels = batch.labels_BL[batch.loss_mask_BL > 0].numpy()
    assert decode(labels) == "174 cm 🐈\nwords and words\n" and labels[-1] == END_OF_DOCUMENT


@pytest.mark.parametrize("template", [CLOSED, MARKED])
def test_with_a_tokenizer_the_tokens_are_those_of_transformers(tmp_path: Path, template: str) -> None:
    make_tokenizer(tmp_path / "tiny", begin=True, chat_template=template)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tiny/tokenizer.json"), eos_token="<end>")
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": TURNS[1:3]}])
    run(tmp_path / "out", path, tokenizer=str(tmp_path / "tiny"), format="chat")
    for document, turns in zip(documents(tmp_path / "out"), (TURNS, TURNS[1:3]), strict=True):
        text = theirs.apply_chat_template(turns, chat_template=CLOSED, tokenize=False)
        # The last turn has ended the document.
        assert document.tolist() == theirs.encode(text, add_special_tokens=False)
    for document, mask, turns in zip(
        documents(tmp_path / "out"), mask_of(tmp_path / "out"), (TURNS, TURNS[1:3]), strict=True
    ):
        answers = [f"{turn['content']}<end>" for turn in turns if turn["role"] == "assistant"]
        assert theirs.decode(document[mask == 1]) == "".join(answers)


def test_prompt_and_completion_are_encoded_apart(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tiny", begin=True)
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "words and w", "completion": "ords and words"}])
    run(tmp_path / "out", path, tokenizer=str(tmp_path / "tiny"), format="chat")
    parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("words and w", "ords and words")]
    assert documents(tmp_path / "out")[0].tolist() == [0, *parts[0], *parts[1], 1]
    assert mask_of(tmp_path / "out")[0].tolist() == [0] * (1 + len(parts[0])) + [1] * (len(parts[1]) + 1)


def test_chats_of_parquet_with_workers(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[:3]}, {"messages": TURNS[1:3]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    run(tmp_path / "table", tmp_path / "a.parquet", format="chat", workers=2)
    run(tmp_path / "lines", write_lines(tmp_path / "a.jsonl", rows), format="chat")
    for suffix in (".bin", ".mask", ".idx", ".json"):
        assert (tmp_path / f"table{suffix}").read_bytes() == (tmp_path / f"lines{suffix}").read_bytes()


def test_share_gpt_and_content_in_parts(tmp_path: Path) -> None:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    share = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in TURNS]
    parts = [turn | {"content": [{"type": "text", "text": part} for part in turn["content"]]} for turn in TURNS]
    run(tmp_path / "plain", write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}] * 3), format="chat")
    rows = [{"conversations": share}, {"conversations": TURNS}, {"messages": parts}]
    run(tmp_path / "other", write_lines(tmp_path / "b.jsonl", rows), format="chat")
    for suffix in (".bin", ".mask"):
        assert (tmp_path / f"other{suffix}").read_bytes() == (tmp_path / f"plain{suffix}").read_bytes()


def test_a_template_that_changes_what_came_before_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TURNS[2:4]}, {"messages": TURNS[2:]}])
    options = {"format": "chat", "chat_template": str(tmp_path / "template.jinja")}
    for old, new, message in (
        # A template that leaves out earlier thoughts, as those of reasoning models do.
        (
            "message['content']",
            "(message['content'] if loop.last else 'gone')",
            "1: .* turn 1 depends on later turns",
        ),
        ("{{ '<|assistant|>\\n' }}", "{{ '<|answer|>\\n' }}", "1: .* turn 1 does not start with its"),
    ):
        assert old in DEFAULT_TEMPLATE
        (tmp_path / "template.jinja").write_text(DEFAULT_TEMPLATE.replace(old, new))
        with pytest.raises(UserError, match=rf"a\.jsonl:{message}"):
            run(tmp_path / "out", path, **options)


def test_templates_refuse_write_json_and_cannot_reach_the_machine() -> None:
    turns = [{"role": "user", "content": "<ü>"}]

    def render(text: str) -> str:
        return Template(text, {"eos_token": "</s>"}, "template").render(turns, None, answer=False)

    assert render("{{ messages | tojson }}{{ eos_token }}") == '[{"role": "user", "content": "<ü>"}]</s>'
    assert render("{% for m in messages %}{% break %}x{% endfor %}") == ""
    for text, message in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
    ):
        with pytest.raises(ChatError, match=f"refused by the chat template .*{message}"):
            render(text)


def test_spans_of_bytes_are_those_of_characters() -> None:
    text = "aü🐈b"
    tokens_T, span_T = ByteEncoder().encode_spans(text, [(1, 2), (2, 4)])
    assert tokens_T.tobytes().replace(b"\0", b"") == text.encode()
    assert span_T.tolist() == [-1, 0, 0, 1, 1, 1, 1, 1]


ENDLESS = {
    "loops in loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a loop over characters": "{% for a in range(99999) %}{% for b in 'abcdefghijklmnop' %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a product": "{{ 'a' * 10000000000 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_refused(name: str) -> None:
    template = Template(ENDLESS[name], {}, "template")
    with pytest.raises(ChatError, match="^refused by the chat template"):
        template.render([{"role": "user", "content": "hi"}], None, answer=False)


def test_loops_know_their_place() -> None:
    """Counting the rounds of loops takes nothing from them."""
    text = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% else %}none{% endfor %}"
    )
    template = Template(text + "{{ '=' * 3 }}", {}, "template")
    assert template.render([{"role": "a"}, {"role": "b"}], None, answer=False) == "1/2,2/2==="
    assert template.render([], None, answer=False) == "none==="
