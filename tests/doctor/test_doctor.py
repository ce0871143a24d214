"""The doctor's lines: ticks for a sound run, and for each fault a cross that says what to do."""

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.checkpoint.names import DATA
from megatron_sse.cli import main
from megatron_sse.config import load_config, plan_stages
from megatron_sse.data.fingerprint import describe_data
from megatron_sse.doctor import modules
from megatron_sse.doctor.command import find_all
from megatron_sse.doctor.finding import BAD, GOOD, OPEN
from megatron_sse.doctor.request import Request
from megatron_sse.model.backend import Installed
from tests.checkpoint.support import train_and_save
from tests.training.support import small_run
from tests.workers import run_workers

STEPS = 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with data, settings and a checkpoint after two steps."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "run.yaml").write_text(small_run(folder).to_yaml())
    run_workers(1, train_and_save, folder, {}, None, STEPS, True)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    text = (copy / "run.yaml").read_text().replace(str(saved), str(copy))
    (copy / "run.yaml").write_text(text)
    return copy


def marks(folder: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    """Return mark and text of each line, by name."""
    request = Request(config=str(folder / "run.yaml"), overrides=overrides)
    return {finding.name: (finding.mark, finding.text) for finding in find_all(request)}


def test_a_sound_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["doctor", str(folder / "run.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing is wrong"
    assert not any(line.startswith(BAD) for line in lines)
    found = marks(folder)
    good = {"versions", "settings", "processes", "data.train", "checkpoint.resume", "disk"}
    assert {name for name, (mark, _) in found.items() if mark == GOOD} == good
    assert f"step {STEPS}" in found["checkpoint.resume"][1]
    assert sorted(folder.rglob("*")) == before


def test_a_finished_run(folder: Path) -> None:
    (checkpoint,) = folder.rglob("iter_*")
    done = f"{checkpoint}: all {STEPS} steps are done; raise training.steps to train longer"
    assert marks(folder, f"training.steps={STEPS}")["checkpoint.resume"] == (OPEN, done)


def test_lines_about_tokenizers_name_their_file(folder: Path) -> None:
    assert marks(folder)["tokenizer"][1].startswith(f"{folder}/train.json not found")
    fields = {"documents": 1, "tokens": 1, "bytes": 1, "unigram_bits_per_byte": 1.0}
    (folder / "train.json").write_text(json.dumps({"tokenizer": "words", "vocab_size": 64, **fields}))
    assert marks(folder)["tokenizer"] == (GOOD, f"{folder}/train: words, 64 tokens, model.vocab_size 64")


def damage(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = max(folder.rglob(pattern), key=lambda path: path.stat().st_size)
        path.write_bytes(change(path.read_bytes()))

    return apply


def describe(folder: Path) -> None:
    fields = {"documents": 1, "tokens": 1, "bytes": 1, "unigram_bits_per_byte": 1.0}
    (folder / "train.json").write_text(json.dumps({"tokenizer": "words", "vocab_size": 70, **fields}))


def nothing(folder: Path) -> None:
    pass


# A change to the run, other settings, the line with the cross and its text.
WRONG: list[tuple[Callable[[Path], None], list[str], str, str]] = [
    (nothing, ["model.sse.num_head=3"], "settings", "did you mean model.sse.num_heads"),
    (nothing, ["training.steps=many"], "settings", "allowed an integer"),
    (damage("train.idx", lambda data: b"X" + data[1:]), [], "data.train", "not an index of a Megatron token file"),
    (damage("train.bin", lambda data: data[:-6]), [], "data.train", "truncated"),
    (damage("train.bin", lambda data: b"\xff\xff" + data[2:]), [], "data.train", "token id 65535 at token 0"),
    (lambda folder: (folder / "train.idx").unlink(), [], "data.train", "train.idx not found"),
    (describe, [], "data.train", "set model.vocab_size: 70"),
    (nothing, ["data.validation=nowhere"], "data.validation", "nowhere.idx not found"),
    (nothing, ["model.hidden_size=64"], "checkpoint.resume", "model.hidden_size: 32 in the checkpoint, 64 in this run"),
    (nothing, ["model.vocab_size=200"], "checkpoint.resume", "is of another model"),
    (damage("*.distcp", lambda data: data[:-1]), [], "checkpoint.resume", "the manifest says"),
    (damage("*.distcp", lambda data: data[:-1] + b"?"), [], "checkpoint.resume", "SHA-256"),
    (nothing, ["checkpoint.resume=nowhere"], "checkpoint", "nowhere not found"),
    (nothing, ["checkpoint.load_weights=nowhere", "checkpoint.resume=none"], "checkpoint", "nowhere not found"),
    (
        lambda folder: (folder / "file").touch(),
        ["monitor.folder={folder}/file/run"],
        "monitor.folder",
        "cannot be written",
    ),
]


@pytest.mark.parametrize(("change", "overrides", "name", "text"), WRONG, ids=range(len(WRONG)))
def test_a_cross_says_what_is_wrong(
    change: Callable[[Path], None], overrides: list[str], name: str, text: str, folder: Path
) -> None:
    change(folder)
    overrides = [override.format(folder=folder) for override in overrides]
    mark, said = marks(folder, *overrides)[name]
    assert mark == BAD and text in said and "\n" not in said
    assert main(["doctor", str(folder / "run.yaml"), *overrides]) == 1


def teacher(folder: Path) -> str:
    return f"training.distill={{teacher: {folder}/run, hidden: 1.0}}"


def test_a_teacher(folder: Path) -> None:
    """The teacher is the run itself, which fits; then of another size, and gone."""
    new = f"monitor.folder={folder}/new"
    mark, text = marks(folder, teacher(folder), new)["training.distill.teacher"]
    assert mark == GOOD and f"{folder}/run/checkpoints/" in text
    mark, text = marks(folder, teacher(folder), new, "model.hidden_size=64")["training.distill.teacher"]
    assert mark == BAD and "hidden_size" in text
    mark, text = marks(folder, teacher(folder / "gone"), new)["training.distill.teacher"]
    assert mark == BAD and "gone/run not found" in text


def test_problems(folder: Path) -> None:
    """Prompts of reinforcement learning are read with the tokenizer and the rewards that the run would have."""
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n')
    rl = "rl={{prompts: {}/prompts.jsonl, prompts_per_step: 1, group_size: 2, max_new_tokens: 4, reward: {}}}"
    given = ["data.train=[]", "training.global_batch_size=null", "model.vocab_size=257", "data.sequence_length=32"]
    given += ["data.validation=null", f"monitor.folder={folder}/new", "training.validation_interval=0"]
    mark, text = marks(folder, *given, rl.format(folder, "exact"))["rl.prompts"]
    assert mark == GOOD and "2 prompts; rewards found" in text
    mark, text = marks(folder, *given, rl.format(folder, "nowhere:reward"))["rl.prompts"]
    assert mark == BAD and "nowhere" in text
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    mark, text = marks(folder, *given, rl.format(folder, "exact"))["rl.prompts"]
    assert mark == BAD and "prompts.jsonl:1" in text and "answer" in text


def test_other_data_than_the_checkpoints(folder: Path) -> None:
    stage = plan_stages(load_config(folder / "run.yaml"))[0]
    (checkpoint,) = folder.rglob("iter_*")
    (checkpoint / DATA).write_text(json.dumps(describe_data(stage)))
    assert marks(folder)["checkpoint.resume"][0] == GOOD
    mark, text = marks(folder, "training.seed=6")["checkpoint.resume"]
    assert mark == BAD and "training.seed 5 then, 6 now" in text and "changed_data: accept" in text
    assert marks(folder, "training.seed=6", "checkpoint.changed_data=accept")["checkpoint.resume"][0] == GOOD


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**10, 2**10))
    mark, text = marks(folder)["disk"]
    assert mark == BAD and "set checkpoint.keep_last" in text


def test_what_the_next_save_deletes_counts_as_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**10, 2**10))
    left = folder / "run/checkpoints/partial_iter_0000004"
    left.mkdir()
    with (left / "__0_0.distcp").open("wb") as file:
        file.truncate(2**30)
    assert marks(folder)["disk"][0] == GOOD


def test_number_of_checkpoints(folder: Path) -> None:
    overrides = ["checkpoint.interval=10", "training.steps=1000"]
    assert "99 checkpoints" in marks(folder, *overrides)["disk"][1]
    assert "3 checkpoints" in marks(folder, *overrides, "checkpoint.keep_last=3")["disk"][1]


def test_versions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=99", "missing-package", 'triton>=99; extra == "gpu"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    mark, text = marks(folder)["versions"]
    assert mark == BAD
    assert f"torch {torch.__version__}, needed >=99; missing-package is not installed" in text and "triton" not in text


class Properties:
    total_memory = 2**30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report two small GPUs, the second one old."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda number: f"GPU of test {number}",
        "get_device_properties": lambda number: Properties,
        "get_device_capability": lambda number: ((9, 0), (7, 0))[number],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.usefixtures("two_gpus")
def test_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    found = marks(folder)
    assert found["GPU 0"] == (GOOD, "GPU of test 0, 1 GiB")
    assert found["GPU 1"][0] == BAD and "no bf16" in found["GPU 1"][1]
    assert found["NCCL"][0] == BAD
    assert found["memory"][0] == GOOD
    assert found["processes"] == (GOOD, "2 on this machine, 1 machine")
    monkeypatch.setattr(Properties, "total_memory", 2**12)
    mark, text = marks(folder)["memory"]
    assert mark == BAD and "plan --search" in text
    mark, text = marks(folder, "parallel.tensor=2", "parallel.context=2")["processes"]
    assert mark == BAD and "allowed 2, one per GPU" in text


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("installed", "present", "lines"),
    [
        (
            Installed(True, True, False),
            True,
            {
                "Transformer Engine": (GOOD, "2.11.0: linear layers, norms and attention"),
                "weight gradients": (GOOD, "fused (Transformer Engine; output layer: NVIDIA Apex)"),
                "attention": (GOOD, "Transformer Engine"),
            },
        ),
        (
            Installed(True, False, False),
            True,
            {
                "weight gradients": (
                    OPEN,
                    "fused (Transformer Engine), of the output layer separate (NVIDIA Apex not installed); docs/gpu.md "
                    "tells how to build Apex",
                )
            },
        ),
        (
            Installed(False, True, False),
            True,
            {
                "Transformer Engine": (
                    OPEN,
                    "installed, but cannot be imported: plain modules take its place, slower; ./run.sh compiles it, "
                    "and .venv/transformer_engine.log says what failed",
                ),
                "attention": (OPEN, "plain torch, slower: Transformer Engine cannot be imported"),
            },
        ),
        (
            Installed(False, False, False),
            False,
            {
                "Transformer Engine": (
                    OPEN,
                    "not installed: plain modules take its place, slower; ./run.sh compiles it, and "
                    ".venv/transformer_engine.log says what failed",
                )
            },
        ),
    ],
)
def test_modules(
    folder: Path, installed: Installed, present: bool, lines: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "find_installed", lambda: installed)
    find, version = importlib.util.find_spec, importlib.metadata.version
    is_te = {"transformer_engine", "transformer-engine"}.__contains__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: present or None if is_te(name) else find(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0" if is_te(name) else version(name))
    found = marks(folder)
    assert {name: found[name] for name in lines} == lines
    assert found["versions"][0] == GOOD


@pytest.mark.usefixtures("two_gpus")
def test_attention_on_an_older_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 0))
    for flash, mark in ((False, OPEN), (True, GOOD)):
        monkeypatch.setattr(modules, "find_installed", lambda flash=flash: Installed(True, False, flash))
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0")
        found = marks(folder)["attention"]
        assert found[0] == mark
        assert found[1] == (
            "Transformer Engine"
            if flash
            else "plain torch, slower: cuDNN has none for packed documents on sm_80, and flash-attn is not installed"
        )


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("given", "wanted", "mark"),
    [(None, True, None), ("1", True, GOOD), ("8", True, OPEN), ("8", False, GOOD), ("1", False, OPEN)],
)
def test_connections(
    folder: Path, given: str | None, wanted: bool, mark: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    monkeypatch.setattr(modules, "needs_one_connection", lambda tensor: wanted)
    assert marks(folder).get("CUDA connections", (None,))[0] == mark


def test_a_gpu_that_torch_does_not_see(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    mark, text = marks(folder)["GPU"]
    assert mark == BAD and "CUDA build" in text
