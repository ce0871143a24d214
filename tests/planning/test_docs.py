"""Every command of docs/plan.md and docs/doctor.md works as the page says."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_sse.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = {page: (ROOT / "docs" / f"{page}.md").read_text() for page in ("plan", "doctor")}
COMMANDS = [
    command
    for page, text in PAGES.items()
    for command in re.findall(rf"^ +megatron-sse ({page} configs/.*)$", text, re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 5
