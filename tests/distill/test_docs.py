"""The commands of docs/distill.md, from a softmax model to a distilled hybrid, with models that hardly learn."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_sse.checkpoint.folders import find_weights
from megatron_sse.cli import main
from megatron_sse.config import DistillConfig, load_config
from megatron_sse.distill.run import DistillRun
from megatron_sse.distill.teacher import open_teacher
from megatron_sse.parallel.groups import destroy_groups, init_groups
from megatron_sse.tools import layer_sensitivity
from megatron_sse.training.loop import Run, Signals
from tests.data.files import random_documents, write_tokens
from tests.training.support import cpu
from tests.workers import run_workers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "distill.md").read_text()
COMMANDS = re.findall(r"^    ((?:\./run\.sh|\.venv/bin/).*)$", PAGE, re.MULTILINE)
SMALL = ["model.hidden_size=32", "data.sequence_length=64", "training.steps=2", "training.global_batch_size=2"]
SMALL += ["training.micro_batch_size=2", "training.validation_batches=1", "data.corpus=null"]
SSE = ["model.sse.head_dim=8"]


def train(folder: Path, name: str) -> None:
    """Run one of the page's configurations in a process of the pool."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        config = load_config(name, [*SMALL, *(SSE if "sse" in load_config(name).model.layer_kinds() else [])])
        given = config, init_groups(), cpu(), None, find_weights(config)
        run = Run(*given) if config.training.distill is None else DistillRun(open_teacher(config), *given)
        run.run(Signals())
        destroy_groups()
    finally:
        os.chdir(before)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    corpus = Path("corpora/python_stdlib")
    corpus.mkdir(parents=True)
    for part in ("train", "validation"):
        write_tokens(str(corpus / part), random_documents(40, 24))
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "./run.sh":
            run_workers(1, train, tmp_path, arguments[0])
        elif program.endswith("/python"):
            assert arguments[:2] == ["-m", layer_sensitivity.__name__]
            assert layer_sensitivity.main(arguments[2:]) == 0
        else:
            assert main(arguments) == 0
    assert find_weights(load_config("configs/distill.yaml")) == Path("models/start")
    made = load_config("models/start/config.yaml").model
    assert load_config("configs/distill.yaml", ["model.hidden_size=32", *SSE]).model == made


def test_the_settings_shown_are_the_settings() -> None:
    shown = yaml.safe_load(PAGE.partition("## Settings\n")[2].partition("\nThe loss is")[0])
    assert set(shown["training"]["distill"]) == set(DistillConfig.model_fields)
    DistillConfig.model_validate(shown["training"]["distill"])
