"""Every command of docs/evaluate.md runs, on small models."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sse.cli import main
from tests.data.files import random_documents, write_tokens
from tests.inference.support import make_checkpoint, model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evaluate.md").read_text()
COMMANDS = re.findall(r"^ +((?:\./run\.sh|\.venv/bin/megatron-sse) (?!evaluate CHECKPOINT).*)$", PAGE, re.MULTILINE)
# Options that are added to the page's.
FEWER = {
    "perplexity": ["--tokens", "500"],
    "mqar": ["--samples", "2"],
    "needle": ["--samples", "1", "--depths", "50"],
}
SMALL = [
    "training.steps=2",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    "training.validation_batches=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where the commands run.

    It has the project's configurations, a small model in place of the quickstart's, and one that the page trains.
    """
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "runs").mkdir()
    prefix = str(folder / "validation")
    write_tokens(prefix, random_documents(20, 300))
    make_checkpoint(folder / "runs" / "quickstart", model(), validation=prefix)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "./run.sh":
            train = [sys.executable, "-m", "megatron_sse", "train", *arguments, *SMALL]
            done = subprocess.run(train, cwd=folder, env=environment, text=True, capture_output=True)
            assert done.returncode == 0 and "mqar: 8 samples" in done.stdout, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("./run.sh")])
def test_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(command)[1:]
    monkeypatch.chdir(folder)
    assert main([*arguments, *(option for task, more in FEWER.items() if task in arguments for option in more)]) == 0


def test_there_are_commands(folder: Path) -> None:
    assert len(COMMANDS) == 7
    assert {path.name for path in (folder / "runs").iterdir()} == {"quickstart", "recall_mqar", "recall_16"}
