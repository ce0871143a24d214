"""Every command of docs/states.md runs, on a small model in place of the page's."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_sse.cli import main
from tests.inference.support import SOFTMAX, make_checkpoint, model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "states.md").read_text()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^ +\.venv/bin/megatron-sse (inspect-states (?!CHECKPOINT).*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    (tmp_path / "runs").mkdir()
    # The model has the sequence length and layer kinds of the quickstart's.
    make_checkpoint(tmp_path / "runs" / "quickstart", model("sse, softmax", softmax=SOFTMAX), 1024)
    make_checkpoint(tmp_path / "runs" / "recall_mqar", model(vocab_size=97))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "tokens.txt").write_text("3 70 6 65\n1 80 1\n")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(shlex.split(command)) == 0
        output = re.findall(r"--output (\S+)", command)[0]
        # The page names the files that are written.
        for path in (tmp_path / output).iterdir():
            assert f"`{path.name}`" in PAGE
