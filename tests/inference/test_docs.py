"""The command of docs/generate.md runs, on a small model in place of the quickstart's."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_sse.cli import main
from tests.inference.support import make_checkpoint, model

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "generate.md").read_text()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    [command] = re.findall(r"^ +\.venv/bin/megatron-sse (generate (?!CHECKPOINT).*)$", PAGE, re.MULTILINE)
    (tmp_path / "runs").mkdir()
    make_checkpoint(tmp_path / "runs" / "quickstart", model())
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    # A random model's 200 tokens are bytes that seldom form complete characters.
    assert len(capsys.readouterr().out) > 50
