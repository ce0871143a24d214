"""Conversion of SSE models: the authors' layout both ways, and exports with their own modeling file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_sse.errors import UserError
from megatron_sse.hf import folder
from megatron_sse.hf.exported import network_megatron_sse
from megatron_sse.hf.sse_settings import model_from_sse, model_to_sse
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model
from megatron_sse.recurrence import RECURRENCES
from tests.convert.support import (
    SOFTMAX,
    assert_same_tensors,
    convert,
    logits_by_transformers,
    make_ours,
    model,
    random_tokens,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "hf_sse_gla"
# Settings that the authors' code supports.
THEIRS = {
    "gla": model(sse={"value_head_dim": 12}),
    "gdn": model(sse={"recurrence": "gdn", "gate": "reference", "num_value_heads": 4, "negative_eigenvalues": True}),
    "hybrid": model("sse, softmax", {"num_writers": 2, "num_readers": 2}, softmax=SOFTMAX | {"window": 16}),
    "conv, tied": model(sse={"short_convolution": 4, "output_gate": False}, tie_embeddings=True),
    "gdn hybrid, conv, bias": model(
        "softmax, sse",
        {"recurrence": "gdn", "gate": "reference", "short_convolution": 3},
        softmax=SOFTMAX | {"qkv_bias": True, "rotary_base": 500.0},
    ),
    "mask": model(sse={"form": "mask", "num_writers": 2, "num_readers": 1}),
}
# Settings that it does not support.
OURS = {
    "gdn, post_norm": model(sse={"recurrence": "gdn", "num_writers": 2, "num_readers": 1}),
    "all kinds": model("sse, gla, gdn, softmax", num_layers=4, softmax=SOFTMAX | {"qk_norm": True, "head_dim": 12}),
    "sse kda": model(sse={"recurrence": "kda", "num_value_heads": 4, "num_readers": 2, "short_convolution": 3}),
    "kda, reference gate": model(sse={"recurrence": "kda", "gate": "reference", "negative_eigenvalues": True}),
    "kda, hybrid": model("kda, softmax", softmax=SOFTMAX),
    "gdn, weights on beta": model(sse={"recurrence": "gdn", "gate": "beta"}),
    "input convolution": model("sse, softmax", {"short_convolution": 3}, softmax=SOFTMAX, input_convolution=4),
    "two routers": model(sse={"own_read_router": True, "num_readers": 2}),
    "no shared bank": model(sse={"shared_bank": False, "weight_scale": 4.0}),
    "gdn, no shared bank": model(sse={"shared_bank": False, "recurrence": "gdn"}),
    "top k": model(sse={"key_map": "topk_softmax", "key_topk": 3, "query_map": "softmax", "decay_low_rank": 5}),
    "hgrn2": model(sse={"key_map": "one_minus_decay", "num_value_heads": 4, "short_convolution": 4}),
    "retnet": model(sse={"decay": "constant", "num_partitions": 0, "key_map": "silu"}),
    "no decay": model("gla", {"decay": "none"}),
    "no weights": model(sse={"weight_writes": False, "weight_reads": False, "num_writers": 3}),
    "scaled rotary": model(
        "softmax, sse", softmax=SOFTMAX | {"rotary_scaling": {"factor": 8.0, "original_length": 32}}
    ),
    "softmax alone, no rotary": model("softmax", softmax=SOFTMAX | {"rotary_base": 0.0}),
}


def assert_same_weights(ours: Path, other: Path) -> None:
    first, second = open_model("", ours), open_model("", other)
    assert first.config.model == second.config.model
    vocabulary = first.config.model.vocab_size
    for name in first.weights.keys():
        # Rows that pad the vocabulary are exported as zeros.
        rows = slice(vocabulary if name in PADDED else None)
        assert torch.equal(first.weights.get(name)[rows], second.weights.get(name)[rows]), name
    assert set(first.weights.keys()) == set(second.weights.keys())


PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def test_golden_model(tmp_path: Path) -> None:
    assert convert(str(GOLDEN), str(tmp_path / "ours")) == 0
    assert convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="sse") == 0
    assert convert(str(tmp_path / "ours"), str(tmp_path / "hf")) == 0
    expected = load_file(GOLDEN / "expected.safetensors")
    for name in ("ours", "back", "hf"):
        logits = compute_logits(open_model("", tmp_path / name), expected["input_ids"])
        assert (logits - expected["logits"]).abs().max() < 1e-4 * expected["logits"].abs().max()
    (tmp_path / "golden").mkdir()
    save_file(load_file(GOLDEN / "model.safetensors"), tmp_path / "golden/model.safetensors")
    assert_same_tensors(tmp_path / "golden", tmp_path / "back")
    settings = [json.loads((path / "config.json").read_text()) for path in (GOLDEN, tmp_path / "back")]
    assert model_from_sse(settings[0], "") == model_from_sse(settings[1], "")


@pytest.mark.parametrize("name", THEIRS)
def test_the_authors_layout_both_ways(tmp_path: Path, name: str) -> None:
    ours = make_ours(tmp_path / "ours", THEIRS[name])
    assert convert(str(ours), str(tmp_path / "sse"), to="sse") == 0
    assert convert(str(tmp_path / "sse"), str(tmp_path / "back")) == 0
    assert_same_weights(ours, tmp_path / "back")
    config = open_model("", ours).config
    theirs = json.loads((tmp_path / "sse/config.json").read_text())
    assert {key: theirs[key] for key in model_to_sse(config.model)} == model_to_sse(config.model)


@pytest.mark.parametrize("name", THEIRS | OURS)
def test_an_export_computes_what_we_do(tmp_path: Path, name: str) -> None:
    ours = make_ours(tmp_path / "ours", (THEIRS | OURS)[name])
    assert convert(str(ours), str(tmp_path / "hf")) == 0
    tokens_BL = random_tokens()
    expected = compute_logits(open_model("", ours), tokens_BL)
    logits = logits_by_transformers(tmp_path / "hf", tokens_BL)
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    if name in OURS:
        assert convert(str(tmp_path / "hf"), str(tmp_path / "back")) == 0
        assert_same_weights(ours, tmp_path / "back")


def test_an_export_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FILE_BYTES", 20_000)
    ours = make_ours(tmp_path / "ours", THEIRS["hybrid"])
    assert convert(str(ours), str(tmp_path / "hf")) == 0
    names = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert names[0] == "model-00001-of-00005.safetensors" and len(names) == 5
    tokens_BL = random_tokens()
    error = logits_by_transformers(tmp_path / "hf", tokens_BL) - compute_logits(open_model("", ours), tokens_BL)
    assert error.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gdn hybrid, conv, bias", "all kinds", "hybrid", "sse kda"])
def test_an_export_generates_what_we_do(tmp_path: Path, name: str) -> None:
    ours = make_ours(tmp_path / "ours", (THEIRS | OURS)[name])
    assert convert(str(ours), str(tmp_path / "hf")) == 0
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens_BL = random_tokens(length=20)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = network.generate(tokens_BL, **settings)
    # Each generated token is our model's most probable one.
    logits = compute_logits(open_model("", ours), generated[:, :-1])
    assert torch.equal(logits[:, 19:].argmax(-1), generated[:, 20:])
    assert len(generated[:, 20:].unique()) > 4
    # Short prompts, padded on the left beside longer ones, give the same tokens as alone.
    real_BL = torch.ones_like(tokens_BL)
    real_BL[0, :7] = 0
    padded = network.generate(tokens_BL.where(real_BL.bool(), 0), attention_mask=real_BL, **settings)
    alone = network.generate(tokens_BL[:1, 7:], **settings)
    assert torch.equal(padded[:1, 7:], alone) and torch.equal(padded[1:], generated[1:])
    beams = network.generate(tokens_BL, num_beams=2, **settings)
    assert torch.equal(beams, network.generate(tokens_BL, num_beams=2, use_cache=False, **settings))
    # Packed in a row, and with padding in between, tokens are computed as alone: by the kernels and in plain torch.
    expected = compute_logits(open_model("", ours), tokens_BL)
    real_BL = torch.arange(40).expand(2, -1) % 2
    spread_BL = torch.zeros_like(real_BL).masked_scatter(real_BL.bool(), tokens_BL)
    for kernels in (True, False):
        network.config.megatron_sse_kernels = kernels
        with torch.no_grad():
            packed = network(tokens_BL.view(1, -1), position_ids=torch.arange(20).repeat(2)[None]).logits
            spread = network(spread_BL, attention_mask=real_BL).logits
        for logits in (packed.view_as(expected), spread[:, 1::2]):
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), kernels


def test_an_export_in_half_precision(tmp_path: Path) -> None:
    section = OURS["gdn, post_norm"]
    ours = make_ours(tmp_path / "ours", section, precision="bf16")
    assert convert(str(ours), str(tmp_path / "hf")) == 0
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype="auto")
    assert network.dtype == torch.bfloat16
    layer = network.model.layers[0]
    assert layer.attn.A_log.dtype == layer.attn.e_proj.weight.dtype == torch.float32
    assert layer.mlp.gate_proj.weight.dtype == torch.bfloat16
    tokens_BL = random_tokens()
    expected = compute_logits(open_model("", ours), tokens_BL)
    with torch.no_grad():
        error = (network(tokens_BL).logits.float() - expected).norm() / expected.norm()
    assert error < 0.1
    loss = network(tokens_BL, labels=tokens_BL).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gdn, post_norm", "model.sse.num_readers: got 1, allowed in the layout of the SSE authors' code: as many as"),
        ("all kinds", "model.layers: got gdn, gla, softmax, sse, allowed"),
        (
            "top k",
            "model.sse.query_map: got softmax, allowed in the layout of the SSE authors' code: silu; use --to hf",
        ),
        ("scaled rotary", "model.softmax.rotary_scaling: got a section, allowed"),
    ],
)
def test_settings_that_the_authors_code_lacks_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    ours = make_ours(tmp_path / "ours", OURS[name])
    with pytest.raises(UserError) as error:
        convert(str(ours), str(tmp_path / "sse"), to="sse")
    assert str(error.value).startswith(message)


def test_a_model_of_bytes_gets_a_tokenizer(tmp_path: Path) -> None:
    ours = make_ours(tmp_path / "ours", model(vocab_size=257))
    (ours / "tokens.json").write_text(json.dumps({"tokenizer": "bytes"}))
    assert convert(str(ours), str(tmp_path / "hf")) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    text = "def ä(x):\n\treturn  'ß €'\x00\x7f"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == 257
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True).eos_token_id == 256


def test_the_exported_code_has_all_recurrences() -> None:
    """The exported modeling files must run alone, so they have a table of their own."""
    ours = {row.name: (row.delta_rule, row.channel_decay, row.key_map) for row in RECURRENCES.values()}
    assert network_megatron_sse.RECURRENCES == ours
