"""An exported model takes transformers' arguments and tools as transformers' own models do."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from transformers import DataCollatorWithFlattening

from megatron_sse.hf.bank_kernels import run_banks
from megatron_sse.hf.exported.settings_megatron_sse import DERIVED, SHARED
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import open_tokenizer
from tests.convert.support import convert, random_tokens

TOKENS = random_tokens(257, 40)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_arguments_are_honoured(network: Any) -> None:
    with torch.no_grad():
        plain = network(TOKENS)
        output = network(TOKENS, output_hidden_states=True)
        assert len(output.hidden_states) == network.config.num_hidden_layers + 1
        assert torch.equal(network.lm_head(output.hidden_states[-1]), output.logits)
        assert torch.equal(output.hidden_states[0], network.get_input_embeddings()(TOKENS))
        assert torch.equal(network(TOKENS, return_dict=False)[0], plain.logits)
        assert torch.equal(network(TOKENS, logits_to_keep=3).logits, plain.logits[:, -3:])
        columns = torch.tensor([1, 30])
        assert torch.equal(network(TOKENS, logits_to_keep=columns).logits, plain.logits[:, columns])
        embedded = network(inputs_embeds=network.get_input_embeddings()(TOKENS)).logits
        assert torch.equal(embedded, plain.logits)
        assert network(TOKENS, use_cache=False).past_key_values is None
        # Softmax layers see positions.
        assert (network(TOKENS, position_ids=torch.arange(5, 45)[None]).logits - plain.logits).abs().max() < 1e-4
        assert torch.equal(network(TOKENS, cache_position=torch.arange(40)).logits, plain.logits)
        base = network.base_model(TOKENS)
        assert torch.equal(base.last_hidden_state, output.hidden_states[-1])
        # The loss: a sum over the labels divided by what is given.
        labels = TOKENS.clone()
        labels[:, :10] = -100
        mean = network(TOKENS, labels=labels).loss
        assert torch.allclose(network(TOKENS, labels=labels, num_items_in_batch=120).loss, mean / 2, rtol=1e-6)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        assert torch.equal(network(TOKENS, shift_labels=shifted).loss, mean)
    assert isinstance(network.base_model, transformers.PreTrainedModel)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"output_attentions": True}, ValueError, "output_attentions: got True"),
        ({"is_causal": False}, ValueError, "is_causal: got False"),
        ({"output_router_logits": True}, ValueError, "output_router_logits: got True"),
        ({"output_hidden_states": [0]}, ValueError, r"output_hidden_states: got \[0\]"),
        ({"token_type_ids": TOKENS}, TypeError, "unexpected keyword argument 'token_type_ids'"),
        ({"attention_mask": torch.ones(2, 1, 40, 40)}, ValueError, "attention_mask: got shape .2, 1, 40, 40., allowed"),
        ({"position_ids": torch.arange(9)[None]}, ValueError, "position_ids: got shape .1, 9., allowed .2, 40. or"),
        ({"cache_position": torch.arange(40) + 7}, ValueError, "cache_position: got 7 as the first, allowed 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 40])}, ValueError, "cu_seq_lens_q: got 2 sequences, allowed one"),
        ({"seq_idx": TOKENS, "attention_mask": torch.ones(2, 40)}, ValueError, "seq_idx: allowed without attention_"),
        ({"inputs_embeds": torch.ones(2, 40, 32)}, ValueError, "input_ids, inputs_embeds: got both"),
        ({"labels": TOKENS, "logits_to_keep": 2}, ValueError, "logits_to_keep: allowed 0 with labels"),
        ({"past_key_values": transformers.DynamicCache()}, ValueError, "past_key_values: got a DynamicCache, allowed"),
    ],
)  # fmt: skip
def test_other_arguments_are_refused_by_name(
    network: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        network(TOKENS, **arguments)


@pytest.mark.parametrize("kernels", [True, False])
def test_packed_documents_are_computed_as_alone(network: Any, kernels: bool) -> None:
    """As collators say it: by positions, by offsets or by numbers; rows of the batch differ."""
    model = deepcopy(network)
    model.config.megatron_sse_kernels = kernels
    tokens_BL, lengths = random_tokens(257, 150), (11, 1, 70, 30, 38)
    parts = tokens_BL[:1].split(lengths, dim=1)
    collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": part[0]} for part in parts])
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in parts], dim=1)
        for names in (
            ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
            ("position_ids",),
            ("cu_seq_lens_q", "max_length_q"),
            ("seq_idx",),
        ):
            logits = model(batch["input_ids"], **{name: batch[name] for name in names}).logits
            assert (logits - expected).abs().max() < 1e-4, names
        # Rows of a batch are packed in different ways.
        positions = torch.stack((batch["position_ids"][0], torch.cat((torch.arange(100), torch.arange(50)))))
        logits = model(tokens_BL, position_ids=positions).logits
        assert (logits[0] - expected[0]).abs().max() < 1e-4
        assert (logits[1:, 100:] - model(tokens_BL[1:, 100:]).logits).abs().max() < 1e-4
        # The last document goes on.
        cache = model.make_cache()
        for part in (slice(0, 100), slice(100, 120), slice(120, 150)):
            positions = batch["position_ids"][:, part]
            logits = model(tokens_BL[:1, part], position_ids=positions, past_key_values=cache).logits
            assert (logits - expected[:, part]).abs().max() < 1e-4
        # It matters.
        assert (model(tokens_BL[:1]).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("kernels", [True, False])
def test_padding_anywhere_with_and_without_a_cache(network: Any, kernels: bool) -> None:
    model = deepcopy(network)
    model.config.megatron_sse_kernels = kernels
    # Left, right, and between, as after a second turn of a batch of chats.
    real = torch.zeros(3, 60, dtype=torch.bool)
    real[0, -21:] = real[1, :21] = real[2, 3:14] = real[2, 30:40] = True
    texts = torch.cat((TOKENS, TOKENS.flip(1)))[:3]
    tokens = torch.zeros(3, 60, dtype=torch.long).masked_scatter(real, texts[:, :21])
    with torch.no_grad():
        expected = model(texts).logits
        logits = model(tokens, attention_mask=real.long()).logits
        assert (logits[real].view(3, 21, -1) - expected[:, :21]).abs().max() < 1e-4
        cache, parts = model.make_cache(), []
        for start, end in ((0, 7), (7, 8), (8, 35), (35, 36), (36, 60)):
            output = model(tokens[:, start:end], attention_mask=real[:, :end], past_key_values=cache)
            assert output.past_key_values is cache and cache.get_seq_length() == end
            parts.append(output.logits)
        logits = torch.cat(parts, dim=1)
        assert (logits[real].view(3, 21, -1) - expected[:, :21]).abs().max() < 1e-4
        # All go on without a mask, in another order, and one of them twice.
        order = torch.tensor([2, 0, 1])
        cache.batch_select_indices(order)
        cache.batch_repeat_interleave(2)
        logits = model(texts[order, 21:].repeat_interleave(2, 0), past_key_values=cache).logits
        assert (logits - expected[order, 21:].repeat_interleave(2, 0)).abs().max() < 1e-4


@pytest.mark.parametrize("kernels", [True, False])
def test_what_is_not_finite_stays_in_its_document(network: Any, kernels: bool) -> None:
    """Logits and gradients, also where calls and padding lie between; in plain torch bit by bit."""
    model = deepcopy(network)
    model.config.megatron_sse_kernels = kernels
    clean_BLd = model.get_input_embeddings()(TOKENS).detach()
    document_L = torch.arange(3).repeat_interleave(torch.tensor((11, 20, 9)))
    positions = torch.cat([torch.arange(length) for length in (11, 20, 9)]).expand(2, -1)

    def same(actual: Tensor, expected: Tensor) -> bool:
        # The kernels sort tokens by partition; those of a token that is nan may have more or fewer: 7.4e-7 was seen.
        allowed = 4e-6 * expected.abs().max() if kernels else 0
        return bool((actual - expected).abs().max() <= allowed)

    def run(x_BLd: Tensor, counts_L: Tensor, arguments: dict[str, Any], split: int) -> tuple[Tensor, list[Tensor]]:
        """Return logits and, of the tokens that count, logits and gradients. split: where a second call begins."""
        leaf, cache, parts = x_BLd.clone().requires_grad_(), model.make_cache(), []
        for part in filter(lambda part: part.start < part.stop, (slice(0, split), slice(split, 40))):
            given = {
                name: x[:, : part.stop] if name == "attention_mask" else x[:, part] for name, x in arguments.items()
            }
            parts.append(model(inputs_embeds=leaf[:, part], past_key_values=cache, **given).logits)
        logits = torch.cat(parts, dim=1)
        [gradient] = torch.autograd.grad(logits[:, counts_L].square().sum(), [leaf])
        return logits.detach(), [logits[:, counts_L].detach(), gradient[:, counts_L]]

    for value in (torch.inf, torch.nan):
        for bad, token, end in ((0, 6, 11), (1, 20, 31), (2, 35, 40)):
            for split in (0, 25):
                dirty_BLd = clean_BLd.clone()
                dirty_BLd[:, token] = value
                arguments = {"position_ids": positions}
                _, expected = run(clean_BLd, document_L != bad, arguments, split)
                logits, actual = run(dirty_BLd, document_L != bad, arguments, split)
                assert logits[:, :token].isfinite().all() and logits[:, token:end].isnan().all()
        real_L = (torch.arange(40) >= 4) & (document_L != 1)
        dirty_BLd = clean_BLd.masked_fill(~real_L[:, None], value)
        arguments = {"attention_mask": real_L.long().expand(2, -1)}
        _, expected = run(clean_BLd, real_L, arguments, 25)
        assert all(map(same, run(dirty_BLd, real_L, arguments, 25)[1], expected))


def test_a_cache_goes_on(network: Any) -> None:
    expected = network.generate(TOKENS, use_cache=False, **GREEDY)
    assert len(expected[:, 40:].unique()) > 3
    assert torch.equal(network.generate(TOKENS, **GREEDY), expected)
    assert torch.equal(network.generate(TOKENS, prefill_chunk_size=7, **GREEDY), expected)
    # A prefix is computed once and used twice.
    prefix = network.make_cache()
    with torch.no_grad():
        network(TOKENS[:, :9], past_key_values=prefix)
        # The name in newer versions of transformers.
        network(TOKENS[:, 9:17], cache=prefix)
        with pytest.raises(ValueError, match="^past_key_values, cache: got both"):
            network(TOKENS[:, 17:18], past_key_values=prefix, cache=prefix)
    for name, cache in (("cache", deepcopy(prefix)), ("past_key_values", prefix)):
        assert torch.equal(network.generate(TOKENS, **{name: cache}, **GREEDY), expected)
    # A second turn.
    turn = network.generate(TOKENS, return_dict_in_generate=True, **GREEDY)
    second = torch.cat((turn.sequences, random_tokens(257, 9)), dim=1)
    again = network.generate(second, past_key_values=turn.past_key_values, **GREEDY)
    assert torch.equal(again, network.generate(second, use_cache=False, **GREEDY))
    beams = network.generate(TOKENS, num_beams=2, **GREEDY)
    assert torch.equal(beams, network.generate(TOKENS, num_beams=2, use_cache=False, **GREEDY))
    with pytest.raises(ValueError, match="cannot be cut"):
        prefix.crop(-1)
    prefix.reset()
    assert torch.equal(network.generate(TOKENS, past_key_values=prefix, **GREEDY), expected)
    with pytest.raises(ValueError, match="^cache_implementation: got 'static', allowed None"):
        network.generate(TOKENS, cache_implementation="static", **GREEDY)


def test_generation_with_stop_strings_and_from_embeddings(network: Any, export: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(export)
    everything = network.generate(TOKENS[:1], **GREEDY)[0, 40:]
    stop = tokenizer.decode(everything[2:3])
    stopped = network.generate(TOKENS[:1], stop_strings=[stop], tokenizer=tokenizer, **GREEDY)[0, 40:]
    assert torch.equal(stopped, everything[:3])
    embedded = network.get_input_embeddings()(TOKENS[:1])
    assert torch.equal(network.generate(inputs_embeds=embedded, **GREEDY)[0], everything)


def test_attention(load: Callable[..., Any]) -> None:
    assert load(attn_implementation="sdpa").config._attn_implementation == "sdpa"
    for name in ("flash_attention_2", "eager"):
        with pytest.raises(ValueError, match=f"^attn_implementation: got '{name}', allowed 'sdpa'"):
            load(attn_implementation=name)


def test_offloaded_weights_change_nothing(network: Any, load: Callable[..., Any], tmp_path: Path) -> None:
    parts = ("embeddings", "layers.0", "layers.1", "norm")
    places = {f"model.{name}": "disk" for name in parts} | {"lm_head": "cpu"}
    offloaded = load(device_map=places, offload_folder=tmp_path)
    assert sum(parameter.is_meta for parameter in offloaded.parameters()) > 30
    with torch.no_grad():
        assert torch.equal(offloaded(TOKENS).logits, network(TOKENS).logits)


def test_new_tokens_are_saved_loaded_and_converted(load: Callable[..., Any], tmp_path: Path) -> None:
    model = load()
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config.vocab_size == 300
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert convert(str(tmp_path / "saved"), str(tmp_path / "ours")) == 0
    assert open_model("", tmp_path / "ours").config.model.vocab_size == 300


def test_each_setting_stands_once(export: Path, load: Callable[..., Any], tmp_path: Path) -> None:
    values = json.loads((export / "config.json").read_text())
    assert not values.keys() & set(DERIVED) and not values["model"].keys() & {*SHARED.values(), "num_layers"}
    config = transformers.AutoConfig.from_pretrained(export, trust_remote_code=True)
    assert [getattr(config, name) for name in DERIVED] == [2, 4, 2, 8]
    assert config.pad_token_id == config.eos_token_id == 256
    assert transformers.AutoConfig.for_model("llama").pad_token_id == type(config)().pad_token_id
    # Earlier versions wrote some twice.
    (tmp_path / "old").mkdir()
    for path in export.iterdir():
        (tmp_path / "old" / path.name).symlink_to(path)
    written = tmp_path / "old/config.json"
    written.unlink()
    twice = values | {"num_hidden_layers": 2, "head_dim": 8}
    twice["model"] = values["model"] | {"vocab_size": 257, "num_layers": 2}
    written.write_text(json.dumps(twice))
    assert torch.equal(load(tmp_path / "old")(TOKENS).logits, load()(TOKENS).logits)
    assert open_model("", tmp_path / "old").config.model == open_model("", export).config.model
    written.write_text(json.dumps(twice | {"vocab_size": 300}))
    with pytest.raises(Exception, match="vocab_size: got 300, and model.vocab_size 257; remove the wrong one"):
        load(tmp_path / "old")
    with pytest.raises(Exception, match="config.json: vocab_size: got 300, and model.vocab_size 257"):
        open_model("SRC", tmp_path / "old")


@contextmanager
def transformers_warnings() -> Iterator[list[str]]:
    """Collect what transformers logs."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.add_handler(handler)
    try:
        yield found
    finally:
        transformers.logging.remove_handler(handler)
        transformers.logging.set_verbosity(before)


def test_the_tokenizer_needs_no_code_and_nothing_warns(export: Path, load: Callable[..., Any], tmp_path: Path) -> None:
    with transformers_warnings() as found:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(export)
        assert open_tokenizer(open_model("", export)).encode("ab") == [97, 98]
        assert convert(str(export), str(tmp_path / "ours")) == 0
        assert open_tokenizer(open_model("", tmp_path / "ours")).end == 256
        model = load()
        inputs = tokenizer(["ab", "abc"], return_tensors="pt", padding=True, padding_side="left")
        model.generate(**inputs, max_new_tokens=2)
    assert found == []
    assert tokenizer.pad_token_id == 256 and model.config.pad_token_id == 256


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Leave out, for a block, what this package puts around torch's functions on a CPU; users of exports have none."""
    with ExitStack() as stack:
        while _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        yield


def test_one_compiled_graph(network: Any) -> None:
    arguments = {"attention_mask": torch.ones_like(TOKENS), "position_ids": torch.arange(40)[None], "labels": TOKENS}
    with without_function_modes(), torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager", dynamic=False)
        logits = compiled(TOKENS, **arguments).logits
        assert (logits - network(TOKENS).logits).abs().max() < 1e-4
    torch.compiler.reset()


def test_checkpointed_layers_are_computed_again(load: Callable[..., Any]) -> None:
    model = load().train()
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    calls: list[int] = []
    model.model.layers[0].attn.register_forward_hook(lambda *_: calls.append(0))
    model.gradient_checkpointing_enable()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert len(calls) == 2
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    with pytest.raises(ValueError, match="past_key_values: got a cache, allowed None in training"):
        model(TOKENS, past_key_values=model.make_cache())


@pytest.mark.parametrize("kernels", [True, False])
def test_states_and_router_stay_in_fp32_under_autocast(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    model = load(megatron_sse_kernels=kernels)
    mixer = model.model.layers[0].attn
    module = sys.modules[type(mixer).__module__]
    name, seen = "run_banks" if kernels else "gdn", []
    run = getattr(module, name)

    def spy(*arguments: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return run(*arguments)

    monkeypatch.setattr(module, name, spy)
    x_BLd = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output = model(TOKENS, use_cache=True)
        scores = mixer.e_proj(x_BLd)
    assert seen == [False]
    state = next(x for x in output.past_key_values.kept[0].tensors if x is not None and x.dim() == 4)
    assert state.dtype == scores.dtype == torch.float32
    assert torch.equal(scores, mixer.e_proj(x_BLd))


def test_what_exports_call_stays(network: Any) -> None:
    """Exports that were made earlier call this function as it was then."""
    assert list(signature(run_banks).parameters) == [
        "banks", "v_THV", "prob_TrN", "initial_BAHKV", "offsets_B1", "sequence_T", "document_T", "settings"
    ]  # fmt: skip
    module = sys.modules[type(network.model.layers[0].attn).__module__]
    assert module.run_banks is run_banks
