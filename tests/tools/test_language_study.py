"""The study of language modelling: its arms, its text, its measures, a tiny study, and the report."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sse.config import ignored_settings, load_config
from megatron_sse.data.checks import check_token_file
from megatron_sse.evaluation.perplexity import measure_losses
from megatron_sse.evaluation.read import Reader
from megatron_sse.model import build_model
from megatron_sse.pretrained.network import inference_groups
from megatron_sse.tools import language_corpus
from megatron_sse.tools.language_arms import ARMS, BASE, LEARNING_RATES, arm_settings
from megatron_sse.tools.language_measure import KINDS, NEW, OTHER, RARE, RECALL, Pairs, distances, measure_kinds
from megatron_sse.tools.language_report import write_report
from megatron_sse.tools.language_study import main
from megatron_sse.tools.studies.rates import best_rates, chosen
from megatron_sse.tools.studies.runs import ROOT
from megatron_sse.tools.studies.sizes import TOLERANCE, num_parameters, state_elements
from tests.data.files import write_tokens

CONFIG = ROOT / "configs" / "language_study.yaml"
VOCAB = 32


def test_arms() -> None:
    """Every setting of an arm has an effect, parameters are equal, and so is the state where that is promised."""
    configs = {arm: load_config(CONFIG, arm_settings(arm, CONFIG, [])) for arm in ARMS}
    wanted = num_parameters(configs[BASE].model)
    for config in configs.values():
        assert ignored_settings(config) == []
        assert num_parameters(config.model) == pytest.approx(wanted, rel=TOLERANCE)
        assert config.model.ffn_hidden_size > 64
    assert state_elements(configs["gla_large"]) == state_elements(configs["n16k1"])
    assert len({config.model.model_dump_json() for config in configs.values()}) == len(ARMS)


def test_gpu_config() -> None:
    """The larger study has the same arms, but for the one whose heads are too long for kernels."""
    path = ROOT / "configs" / "language_study_gpu.yaml"
    for arm in set(ARMS) - {"gla_large"}:
        assert ignored_settings(load_config(path, arm_settings(arm, path, []))) == []


def test_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The three parts have different documents, all of them, and a second start makes nothing."""
    monkeypatch.chdir(tmp_path)
    texts = {f"module{n}": b"".join(b"name_%d = %d\n" % (n, i) for i in range(40)) for n in range(60)}
    monkeypatch.setattr(language_corpus, "read_documents", lambda folder: texts)
    language_corpus.make_corpus(300)
    parts = [language_corpus.TRAINING, language_corpus.VALIDATION, language_corpus.TEST]
    documents = [[json.loads(line)["text"] for line in Path(f"{prefix}.jsonl").open()] for prefix in parts]
    assert all(documents) and len(documents[0]) > 40
    assert sorted(sum(documents, [])) == sorted(text.decode() for text in texts.values())
    for prefix, held in zip(parts, documents, strict=True):
        assert len(check_token_file("data.train", prefix, 300).offsets_D1) == len(held) + 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    language_corpus.make_corpus(300)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_distances() -> None:
    assert distances(np.array([7, 8, 7, 7, 9, 8])).tolist() == [0, 0, 2, 1, 0, 4]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Token files; pairs of small tokens are frequent in training, those of large ones are rare."""
    folder, generator = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    prefixes = {}
    for name, count in (("training", 4000), ("validation", 200), ("test", 300)):
        prefixes[name] = str(folder / name)
        draw = np.minimum(generator.geometric(0.15, size=count) - 1, VOCAB - 1)
        write_tokens(prefixes[name], [draw[: count // 3].tolist(), draw[count // 3 :].tolist()])
    return prefixes


def test_kinds(files: dict[str, str]) -> None:
    """Kinds are those of a count by hand, and their losses add up to the loss of all tokens."""
    length, vocab = 64, VOCAB
    training, test = (check_token_file("--test", files[name], vocab) for name in ("training", "test"))
    settings = [f"model.vocab_size={vocab}", "model.hidden_size=24", "model.num_layers=1"]
    settings += ["model.sse={num_heads: 2, head_dim: 8}", "training.global_batch_size=1"]
    config = load_config(CONFIG, [*settings, "training.micro_batch_size=1"])
    with inference_groups(1) as (groups, device), torch.no_grad():
        [net] = build_model(config, groups, device)
        reader = Reader(net.eval(), vocab, 2, 100)
        measured = measure_kinds(reader, test, length, 1000, Pairs(training, vocab))
        whole = measure_losses(reader, test, length, 1000)
    tokens = sum(measured[kind]["tokens"] for kind in KINDS)
    loss = sum(measured[kind]["tokens"] * measured[kind]["loss"] for kind in KINDS) / tokens
    assert tokens == whole.tokens and loss == pytest.approx(whole.loss, rel=1e-9)

    train = np.fromfile(files["training"] + ".bin", dtype=np.uint16).tolist()
    frequent = list(zip(train[:-1], train[1:], strict=True))
    counts = dict.fromkeys(KINDS, 0)
    text = np.fromfile(files["test"] + ".bin", dtype=np.uint16).tolist()
    for document in (text[:100], text[100:]):
        for first in range(0, len(document) - 1, length):
            piece, seen = document[first : first + length + 1], set()
            for pair in zip(piece[:-1], piece[1:], strict=True):
                rare = frequent.count(pair) <= RARE
                counts[(RECALL if pair in seen else NEW) if rare else OTHER] += 1
                seen.add(pair)
    assert {kind: measured[kind]["tokens"] for kind in KINDS} == counts and min(counts.values()) > 0
    by_distance = measured["by_distance"]
    assert sum(part["tokens"] for part in by_distance) == counts[RECALL]
    recalled = sum(part["tokens"] * part["loss"] for part in by_distance) / counts[RECALL]
    assert recalled == pytest.approx(measured[RECALL]["loss"])


def test_study(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study of one arm and one learning rate; a clone finds nothing left to do."""
    output = tmp_path / "evidence"
    arguments = [
        "--output",
        str(output),
        "--arms",
        "gla",
        "--seeds",
        "1",
        "--rates",
        "4e-3",
        "--test",
        files["test"],
        "--tokens",
        "200",
    ]
    arguments += [f"model.vocab_size={VOCAB}", "model.hidden_size=24", "model.num_layers=1", "training.steps=2"]
    arguments += [f"data.train={files['training']}", f"data.validation={files['validation']}"]
    arguments += ["data.sequence_length=32", "training.validation_batches=1"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "1 of 1: gla, learning rate 0.004, seed 0: validation loss" in said and "| GLA |" in said
    [result] = json.loads((output / "results.json").read_text())["runs"]
    assert [entry["length"] for entry in result["lengths"]] == [32, 128, 512]
    assert result["cpu_seconds"] > 0 and result["tokens"] == 2 * 4 * 32
    assert not (output / "gla/lr_0.004_seed_0/checkpoints").exists()
    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.copy(output / "results.json", clone)
    arguments[1] = str(clone)
    assert main(arguments) == 0
    assert "1 runs, 1 already done" in capsys.readouterr().out and not list(clone.glob("*/"))


def made(arm: str, rate: float, seed: int, loss: float) -> dict[str, Any]:
    """Return a result whose losses all follow from one number."""
    bucket = {"tokens": 5, "error": 0.1}
    buckets = [bucket | {"first": first, "loss": loss + 1 / first} for first in (1, 16, 32, 64)]
    lengths = [
        {"length": n, "tokens": 9, "loss": loss, "bits_per_byte": loss / 2, "buckets": buckets} for n in (64, 256)
    ]
    kinds: dict[str, Any] = {kind: {"tokens": 10, "loss": loss + number} for number, kind in enumerate(KINDS)}
    kinds["by_distance"] = [{"first": 16, "tokens": 1, "loss": 1.0}, {"first": 64, "tokens": 3, "loss": 3.0}]
    kinds["by_distance"] += [{"first": 32, "tokens": 1, "loss": 2.0}]
    result = {"arm": arm, "learning_rate": rate, "seed": seed, "validation": loss, "parameters": 1000, "tokens": 2000}
    result |= {
        "state_elements": 20,
        "cpu_seconds": 3.0,
        "resumed": False,
        "commit": "abc",
        "kinds": kinds,
        "lengths": lengths,
    }
    return result | {"settings": {"data": {"sequence_length": 64}}}


def test_best_rates() -> None:
    """The choice is by validation with seed 0, and waits for all learning rates."""
    low, high = LEARNING_RATES
    results = [made("gla", low, 0, 2.0), made("gla", high, 0, 1.5), made("gla", low, 1, 1.0)]
    assert best_rates([*results, made("kda", low, 0, 1.0)], [low, high]) == {"gla": high}
    assert [result["validation"] for result in chosen(results)] == [1.5]


def test_report(tmp_path: Path) -> None:
    low, high = LEARNING_RATES
    found = {
        "softmax": [made("softmax", low, 0, 1.0), made("softmax", high, 0, 2.0), made("softmax", low, 1, 1.5)],
        BASE: [made(BASE, high, 0, 3.0)],
    }
    text = write_report(tmp_path, found)
    assert "4 runs of 2,000 tokens in sequences of 64. Commits: abc." in text
    numbers = "1,000 | 20 | 1.000 | 2.000 | 0.004 | 2 | 0.625 (0.500 to 0.750) | 1.250 (1.000 to 1.500) | 1500 |"
    assert f"| softmax | {numbers}" in text
    assert "| SSE, 4 partitions | 1,000 | 20 | - | 3.000 | 0.012 | 1 | 1.500 | 3.000 | 1500 |" in text
    assert "| SSE, 4 partitions | 3.000 | 4.000 | 5.000 | 1.000 | 2.750 | - | - |" in text
    assert "| arm | 16 | 32 |\n" in text and "| softmax | 1.312 | 1.281 |" in text
    assert {path.stem for path in tmp_path.glob("*.png")} == {"kinds", "positions", "lengths"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--arms", "n3k1"], "--arms: got 'n3k1', allowed softmax, "),
        (["--tokens", "0"], "--tokens: got 0, allowed 1 or more"),
        (["--rates", "fast"], "--rates: got fast, allowed different numbers"),
        (["--report"], "has no results"),
        (["model.nothing=1"], "command line: model.nothing: got an unknown key"),
        (["--test", "nowhere"], "--test: nowhere.idx"),
        (["model.sse.num_partitions=2"], "has to have model.layers: sse with model.sse.num_partitions: 4"),
    ],
)
def test_errors(arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors are one line, and nothing is trained."""
    assert main(["--output", str(tmp_path), "--arms", BASE, *arguments, "data.train=nothing"]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
