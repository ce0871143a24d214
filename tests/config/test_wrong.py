"""Each wrong configuration gives one line with its place, its key, what was given and what is allowed."""

from pathlib import Path

import pytest

from megatron_sse.config import RunConfig, check_world_size, ignored_settings, load_config
from megatron_sse.config.mixer import MixerSpec
from megatron_sse.errors import UserError

GOOD = """\
model:
  num_layers: 6
  hidden_size: 64
  vocab_size: 257
  layers: 5*sse, softmax
  sse:
    num_heads: 4
    head_dim: 16
  softmax:
    num_heads: 4
data:
  train: corpora/train
  sequence_length: 128
training:
  steps: 10
  global_batch_size: 4
optimizer:
  learning_rate: 1e-3
monitor:
  folder: runs/test
"""
GDN = "    recurrence: gdn\n"


def add_sse(lines: str) -> tuple[str, str]:
    return "    head_dim: 16\n", f"    head_dim: 16\n{lines}"


def add_section(lines: str) -> tuple[str, str]:
    return "training:\n", f"{lines}training:\n"


# name: ((text of GOOD, replacement), the error after "run.yaml:", or its beginning where it ends in ...)
WRONG = {
    "key of another section": (
        ("  steps: 10", "  steps: 10\n  learning_rate: 1"),
        "16: training.learning_rate: got an unknown key, ...; did you mean optimizer.learning_rate?",
    ),
    "steps beyond any run": (
        ("  steps: 10", "  steps: 100000000000000000"),
        "15: training.steps: got 100000000000000000, allowed at most 1000000000",
    ),
    "layers beyond any model": (
        ("num_layers: 6", "num_layers: 1000000000"),
        "2: model.num_layers: got 1000000000, allowed at most 10000",
    ),
    "learning rate that overflows": (
        ("learning_rate: 1e-3", "learning_rate: 1e38"),
        "18: optimizer.learning_rate: got 1e+38, allowed at most 1000.0",
    ),
    "a number to the base 60": (
        ("  steps: 10", "  steps: 1:30"),
        "15: training.steps: got '1:30', allowed an integer",
    ),
    "unknown section": (
        ("optimizer:", "optimiser:"),
        "17: optimiser: got an unknown key, allowed model, parallel, data, training, optimizer, stages, rl, "
        "checkpoint, monitor"
        "; did you mean optimizer?",
    ),
    "missing key": (
        ("  hidden_size: 64\n", ""),
        "1: model.hidden_size: got nothing, allowed a value, the key is required",
    ),
    "missing section": (
        ("monitor:\n  folder: runs/test\n", ""),
        "1: monitor: got nothing, allowed a value, the key is required",
    ),
    "empty folder": (
        ("  folder: runs/test", "  folder: ''"),
        "20: monitor.folder: got '', allowed a name that is not empty",
    ),
    "control characters in a name": (
        ("  folder: runs/test", '  folder: "runs/\\e[2Jtest"'),
        "20: monitor.folder: got 'runs/\\x1b[2Jtest', allowed a name without control characters",
    ),
    "control characters in a prefix": (
        ("  train: corpora/train", '  train: "a\\nb"'),
        "12: data.train.0.prefix: got 'a\\nb', allowed a name without control characters",
    ),
    "fraction for a count": (("  steps: 10", "  steps: 1.5"), "15: training.steps: got 1.5, allowed an integer"),
    "bool for a count": (("  steps: 10", "  steps: true"), "15: training.steps: got true, allowed an integer"),
    "zero": (("  steps: 10", "  steps: 0"), "15: training.steps: got 0, allowed at least 1"),
    "null for a required value": (("  steps: 10", "  steps:"), "15: training.steps: got nothing, allowed a value, ..."),
    "negative rate": (
        ("learning_rate: 1e-3", "learning_rate: -1e-3"),
        "18: optimizer.learning_rate: got -0.001, allowed more than 0.0",
    ),
    "infinite rate": (
        ("learning_rate: 1e-3", "learning_rate: .inf"),
        "18: optimizer.learning_rate: got inf, allowed a finite number",
    ),
    "unknown choice": (
        add_sse("    recurrence: gated\n"),
        "9: model.sse.recurrence: got 'gated', allowed 'gla', 'gdn' or 'kda'",
    ),
    "number for a switch": (
        add_sse("    output_gate: 1\n"),
        "9: model.sse.output_gate: got 1, allowed true or false",
    ),
    "value for a section": (
        add_section("parallel: 2\n"),
        "14: parallel: got 2, allowed a section of keys",
    ),
    "number as key": (
        add_section("1: 2\n"),
        "14: top level: got '1' as a key, allowed a name",
    ),
    "list as key": (
        add_section("? [a, b]\n: 2\n"),
        "14: top level: got a list or a section as a key, allowed a name",
    ),
    "unknown kind of layer": (
        ("5*sse, softmax", "5*ssm, softmax"),
        "5: model.layers: got 'ssm', allowed sse, gla, gdn, kda, softmax",
    ),
    "pattern that is no pattern": (
        ("5*sse, softmax", "sse*5"),
        "5: model.layers: got 'sse*5', allowed entries such as softmax or 5*sse, separated by commas",
    ),
    "layers and pattern": (
        ("num_layers: 6", "num_layers: 8"),
        "2: model.num_layers: got 8, allowed a multiple of 6, the number of layers in model.layers",
    ),
    "value heads": (
        add_sse("    num_value_heads: 6\n"),
        "9: model.sse.num_value_heads: got 6, allowed a multiple of model.sse.num_heads 4",
    ),
    "softmax heads by tensor": (
        ("  softmax:\n    num_heads: 4\ndata:\n", "  softmax: {num_heads: 2}\nparallel: {tensor: 4}\ndata:\n"),
        "9: model.softmax.num_heads: got 2, allowed a multiple of parallel.tensor 4",
    ),
    "softmax heads missing": (
        ("  softmax:\n    num_heads: 4\n", ""),
        "1: model.softmax.num_heads: got null, allowed a number, since model.layers has softmax layers",
    ),
    "softmax heads and hidden size": (
        ("  softmax:\n    num_heads: 4\n", "  softmax:\n    num_heads: 5\n"),
        "10: model.softmax.num_heads: got 5, "
        "allowed a divisor of model.hidden_size 64 while model.softmax.head_dim is null",
    ),
    "sse heads missing": (
        ("    num_heads: 4\n    head_dim: 16\n", "    head_dim: 16\n"),
        "6: model.sse.num_heads: got null, allowed a number, since model.layers has sse layers",
    ),
    "layers by virtual stages": (
        add_section("parallel: {pipeline: 2, virtual_pipeline: 2}\n"),
        "14: parallel.virtual_pipeline: got 2, allowed a divisor of the 3 layers of a pipeline stage",
    ),
    "virtual stages alone": (
        add_section("parallel: {virtual_pipeline: 2}\n"),
        "14: parallel.virtual_pipeline: got 2, allowed 1 while parallel.pipeline is 1",
    ),
    "micro-batches by pipeline": (
        (
            "training:\n  steps: 10\n  global_batch_size: 4",
            "parallel: {pipeline: 2, virtual_pipeline: 3}\ntraining:\n  steps: 10\n  global_batch_size: 5",
        ),
        "17: training.global_batch_size: got 5, "
        "allowed a multiple of 2 (micro-batches in multiples of parallel.pipeline with virtual stages)",
    ),
    "sequence parallelism alone": (
        add_section("parallel: {sequence: true}\n"),
        "14: parallel.sequence: got true, allowed false, or null for the default, while parallel.tensor is 1",
    ),
    "length by tensor": (
        ("length: 128\n", "length: 127\nparallel: {tensor: 2}\n"),
        "13: data.sequence_length: got 127, allowed a multiple of 2: parallel.tensor 2 (parallel.sequence), "
        "or parallel.sequence false",
    ),
    "vocabulary by tensor": (
        ("model:\n", "parallel: {tensor: 2}\nmodel:\n  vocab_multiple: 1\n"),
        "3: model.vocab_multiple: got 1, allowed a value that pads the vocabulary to a multiple of parallel.tensor 2",
    ),
    "feed-forward by tensor": (
        ("model:\n", "parallel: {tensor: 2}\nmodel:\n  ffn_hidden_size: 7\n"),
        "3: model.ffn_hidden_size: got 7, allowed a multiple of parallel.tensor 2",
    ),
    "batch by micro-batch": (
        ("global_batch_size: 4", "global_batch_size: 4\n  micro_batch_size: 3"),
        "16: training.global_batch_size: got 4, allowed a multiple of 3 (micro-batch 3 x 1 data-parallel)",
    ),
    "more writers than partitions": (
        add_sse("    num_writers: 5\n"),
        "9: model.sse.num_writers: got 5, allowed at most model.sse.num_partitions 4",
    ),
    "several writers by write strength": (
        add_sse(GDN + "    gate: beta\n    num_writers: 2\n"),
        "11: model.sse.num_writers: got 2, allowed 1 with model.sse.gate beta",
    ),
    "no bank": (
        add_sse("    num_partitions: 0\n    shared_bank: false\n"),
        "10: model.sse.shared_bank: got false, allowed true while model.sse.num_partitions is 0",
    ),
    "convolution without its bank": (
        add_sse("    shared_bank: false\n    short_convolution: 4\n"),
        "10: model.sse.short_convolution: got 4, allowed 0 while model.sse.shared_bank is false: ...",
    ),
    "top-k without k": (
        add_sse("    key_map: topk_softmax\n"),
        "6: model.sse.key_topk: got null, allowed a number of rows, since model.sse.key_map is topk_softmax",
    ),
    "k without top-k": (
        add_sse("    key_topk: 4\n"),
        "9: model.sse.key_topk: got 4, allowed null unless model.sse.key_map is topk_softmax",
    ),
    "gla setting with gdn": (
        add_sse(GDN + "    decay: constant\n"),
        "10: model.sse.decay: got 'constant', allowed gate with the gdn recurrence",
    ),
    "gla key map with gdn": (
        add_sse(GDN + "    key_map: one_minus_decay\n"),
        "10: model.sse.key_map: got 'one_minus_decay', allowed null, softmax, silu with the gdn recurrence",
    ),
    "decay longer than the run": (
        ("learning_rate: 1e-3", "learning_rate: 1e-3\n  schedule: wsd\n  warmup_steps: 5\n  decay_steps: 6"),
        "21: optimizer.decay_steps: got 6, allowed at most the 5 steps after the warm-up",
    ),
    "rates in the wrong order": (
        ("learning_rate: 1e-3", "learning_rate: 1e-3\n  min_learning_rate: 0.01"),
        "19: optimizer.min_learning_rate: got 0.01, allowed at most optimizer.learning_rate 0.001",
    ),
    "no YAML": (("  sse:", "\tsse:"), "6: not valid YAML: found character '\\t' that cannot start any token"),
    "a list": ((GOOD, "- model\n"), "1: got ['model'], allowed the sections model, parallel, data, ..."),
    "empty": ((GOOD, ""), "1: got null, allowed the sections model, parallel, data, ..."),
}

# override: the error after "command line: "
WRONG_OVERRIDES = {
    "training.recompute=mixers": "training.recompute: got 'mixers', allowed none, full, one of mixer, mlp, or a list "
    "of these",
    "training.recompute=[mlp,mlp]": "training.recompute: got ['mlp', 'mlp'], allowed none, full, one of mixer, mlp, "
    "or a list of these",
    "training.steps=ten": "training.steps: got 'ten', allowed an integer",
    "training.step=3": "training.step: got an unknown key, ...; did you mean training.steps?",
    "steps=3": "steps: got an unknown key, ...; did you mean training.steps?",
    "training.steps": "got 'training.steps', allowed section.key=value",
    "training.steps.more=3": "training.steps.more: training.steps holds a value (10), not a section",
    "model.sse={num_heads: 4": "model.sse: not valid YAML: expected ',' or '}', but got '<stream end>'",
    "model.vocab_multiple=0": "model.vocab_multiple: got 0, allowed at least 1",
    "model.transformer.hidden_dropuot=0.1": "model.transformer.hidden_dropuot: got 0.1, allowed nothing: of the fields "
    "of Megatron's TransformerConfig only attention_dropout, ... have an effect here; "
    "did you mean model.transformer.hidden_dropout?",
    "model.transformer.hidden_dropout=lots": "model.transformer.hidden_dropout: got 'lots', "
    "allowed a number from 0.0 up to, but not including, 1.0",
    "model.transformer.hidden_dropout=-1": "model.transformer.hidden_dropout: got -1, allowed a number from 0.0 ...",
    "model.transformer.hidden_dropout=.nan": "model.transformer.hidden_dropout: got nan, allowed a number from 0.0 ...",
    "model.transformer.attention_dropout=1.0": "model.transformer.attention_dropout: got 1.0, allowed a number ...",
    "model.transformer.softmax_scale=.nan": "model.transformer.softmax_scale: got nan, "
    "allowed a number above 0.0 or null",
    "model.transformer.softmax_scale=0": "model.transformer.softmax_scale: got 0, allowed a number above 0.0 or null",
    "model.transformer.softmax_scale=.inf": "model.transformer.softmax_scale: got inf, allowed a number above 0.0 ...",
    "model.transformer.cp_comm_type=ring": "model.transformer.cp_comm_type: got 'ring', "
    "allowed p2p, all_gather, a2a or null",
    "model.transformer.bf16=true": "model.transformer.bf16: got true, allowed nothing: use training.precision",
    "parallel.context=256 data.sequence_length=128": "data.sequence_length: got 128, "
    "allowed a multiple of 256: parallel.context 256",
    "parallel.context=128 parallel.layout=zigzag data.sequence_length=128": "data.sequence_length: got 128, "
    "allowed a multiple of 256 with parallel.layout zigzag",
    "parallel.context=4 parallel.hand_off=two_level parallel.context_per_node=3": "parallel.context_per_node: got 3, "
    "allowed a divisor of parallel.context 4",
    "parallel.context=2 parallel.hand_off=ring": "parallel.hand_off: got 'ring', "
    "allowed 'auto', 'exscan', 'allgather', 'p2p' or 'two_level'",
    "parallel.context=2 model.transformer.cp_comm_type=p2p model.softmax.window=8": "model.transformer.cp_comm_type: "
    "got 'p2p', allowed a2a, null: p2p does not go with model.softmax.window",
    "parallel.context=2 model.transformer.cp_comm_type=all_gather": "model.transformer.cp_comm_type: "
    "got 'all_gather', allowed p2p, a2a, null: all_gather does not go with data.reset_at_documents",
    "parallel.context=2 model.transformer.cp_comm_type=a2a parallel.tensor=4": "model.transformer.cp_comm_type: "
    "got 'a2a', allowed p2p, null: a2a does not go with model.softmax.num_heads 4 on 4 x 2 ranks",
    "parallel.context=2 model.transformer.cp_comm_type=[p2p]": "model.transformer.cp_comm_type: got ['p2p'], "
    "allowed p2p, all_gather, a2a or null",
    "parallel.context=2 model.transformer.attention_dropout=0.1": "model.transformer.attention_dropout: got 0.1, "
    "allowed 0.0 while parallel.context is above 1",
    "model.transformer.add_qkv_bias=true": "model.transformer.add_qkv_bias: got true, "
    "allowed nothing: use model.softmax.qkv_bias",
    "monitor.profile_steps=[3,2]": "monitor.profile_steps: got [3, 2], "
    "allowed the first and the last of some steps, such as [10, 12]",
    "monitor.profile_steps=5": "monitor.profile_steps: got 5, allowed the first and the last of ...",
    "monitor.memory_steps=[0,1]": "monitor.memory_steps: got [0, 1], allowed the first and the last of ...",
    "monitor.memory_steps=[1,11]": "monitor.memory_steps: got [1, 11], allowed steps up to training.steps 10",
    "monitor.profile_ranks=[-1]": "monitor.profile_ranks.0: got -1, allowed at least 0",
    "monitor.spike_factor=-1": "monitor.spike_factor: got -1, allowed at least 0.0",
    "model.softmax.rotary_scaling.factor=0.5": "model.softmax.rotary_scaling.factor: got 0.5, allowed at least 1.0",
    "model.softmax.rotary_scaling.factor=8 model.softmax.rotary_scaling.low_turns=4": "model.softmax.rotary_scaling."
    "low_turns: got 4.0, allowed less than model.softmax.rotary_scaling.high_turns 4.0",
    "data.corpus=python_stdlib model.vocab_size=256": "model.vocab_size: got 256, allowed 257 "
    "(256 byte values and the end of a document) with data.corpus",
}


def assert_reads(line: str, expected: str) -> None:
    """Check a line against `expected`, where `...` stands for any text."""
    assert "\n" not in line
    pieces = expected.split("...")
    assert line.startswith(pieces[0]) and line.endswith(pieces[-1]), line


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file(name: str, tmp_path: Path) -> None:
    (old, new), expected = WRONG[name]
    assert GOOD.count(old) == 1
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert_reads(str(caught.value), f"{path}:{expected}")


@pytest.mark.parametrize("overrides", WRONG_OVERRIDES)
def test_wrong_override(overrides: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    words = [overrides] if "{" in overrides else overrides.split()
    with pytest.raises(UserError) as caught:
        load_config(path, words)
    assert_reads(str(caught.value), f"command line: {WRONG_OVERRIDES[overrides]}")


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return load_config(path, list(overrides))


def test_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, text in [(tmp_path / "none.yaml", "not found"), (tmp_path, "cannot be read"), (binary, "cannot be")]:
        with pytest.raises(UserError, match=text) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_overrides_replace_and_the_last_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path, "training.steps=3", "training.steps=4", "parallel.tensor=2", "model.layers=[5*sse, softmax]"
    )
    assert (config.training.steps, config.parallel.tensor) == (4, 2)
    assert config.model.layer_kinds() == ["sse"] * 5 + ["softmax"]


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "+1e-3", ".1e-2"])
def test_numbers_that_yaml_takes_for_strings(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"optimizer.learning_rate={text}").optimizer.learning_rate == pytest.approx(1e-3)


def test_derived_values(tmp_path: Path) -> None:
    config = load(tmp_path, "optimizer.schedule=wsd")
    assert config.model.ffn_hidden_size == 192
    assert config.model.padded_vocab_size == 384
    assert (config.model.sse.value_head_dim, config.model.sse.num_value_heads) == (16, 4)
    assert (config.model.softmax.head_dim, config.model.softmax.num_kv_heads) == (16, 4)
    assert config.optimizer.decay_steps == 2
    assert [MixerSpec(config.model.sse, kind).key_map for kind in ("gla", "gdn")] == ["softmax", "silu"]


def test_world_size(tmp_path: Path) -> None:
    config = load(tmp_path, "parallel.tensor=2")
    assert check_world_size(config, 4) == 2
    with pytest.raises(UserError, match=r"parallel: got 3 processes, allowed a multiple of 2"):
        check_world_size(config, 3)
    with pytest.raises(UserError, match=r"training.global_batch_size: got 4, allowed a multiple of 3"):
        check_world_size(config, 6)
    with pytest.raises(UserError, match=r"parallel.data: got 1, allowed 2 with 4 processes \(2 needed\)"):
        check_world_size(load(tmp_path, "parallel.tensor=2", "parallel.data=1"), 4)


UNWEIGHTED = "model.sse.weight_writes=false model.sse.weight_reads=false model.sse.weight_scale=4.0"
IGNORED = {
    "model.sse.negative_eigenvalues=true": "model.sse.negative_eigenvalues is ignored: "
    "no layer has the gdn or kda recurrence",
    "model.sse.gate=reference": "model.sse.gate is ignored: no layer has the gdn or kda recurrence",
    "model.sse.recurrence=gdn model.sse.decay_low_rank=8": "model.sse.decay_low_rank is ignored: "
    "no layer has the gla or kda recurrence",
    "model.layers=sse": "model.softmax is ignored: model.layers has no softmax layer",
    "model.layers=softmax": "model.sse is ignored: model.layers is all softmax",
    "model.layers=[5*gla,softmax] model.sse.shared_bank=false model.sse.short_convolution=4": "model.sse.shared_bank "
    "is ignored: model.layers has no sse layer",
    "model.layers=[5*gla,softmax] model.sse.num_partitions=8": "model.sse.num_partitions is ignored: "
    "model.layers has no sse layer",
    "model.sse.num_partitions=0 model.sse.form=mask": "model.sse.form is ignored: model.sse.num_partitions is 0",
    "training.precision=fp32 parallel.overlap_parameters=true": "parallel.overlap_parameters is ignored: "
    "parallel.distributed_optimizer is false",
    "parallel.overlap_gradients=false parallel.overlap_parameters=true": "parallel.overlap_parameters is ignored: "
    "parallel.overlap_gradients is false",
    UNWEIGHTED: "model.sse.weight_scale is ignored: model.sse.weight_writes and weight_reads are false",
    "model.transformer.cp_comm_type=p2p": "model.transformer.cp_comm_type is ignored: "
    "only bf16 softmax layers with parallel.context above 1 use it",
    "model.layers=sse model.softmax={} model.transformer.softmax_scale=0.5": "model.transformer.softmax_scale "
    "is ignored: model.layers has no softmax layer",
    "monitor.profile_ranks=[1]": "monitor.profile_ranks is ignored: "
    "monitor.profile_steps and monitor.memory_steps are null",
    "training.validation_interval=5": "training.validation_interval is ignored: there is no validation data",
    "optimizer.warmup_steps=11": "optimizer.schedule is ignored: the warm-up has 11 steps, the run 10",
    "optimizer.decay_steps=5": "optimizer.decay_steps is ignored: optimizer.schedule is cosine, not wsd",
    "optimizer.schedule=constant optimizer.min_learning_rate=1e-4": "optimizer.min_learning_rate is ignored: "
    "optimizer.schedule is constant",
}


@pytest.mark.parametrize("overrides", IGNORED)
def test_ignored_settings(overrides: str, tmp_path: Path) -> None:
    assert ignored_settings(load(tmp_path, *overrides.split())) == [IGNORED[overrides]]
