"""The shipped configurations are listed and written, over no file."""

from pathlib import Path

import pytest

from megatron_sse.cli import main
from megatron_sse.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_lists_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    [line] = [line for line in lines if line.startswith("quickstart ")]
    assert "  A small SSE-H model on the sources of Python's standard library" in line
    assert last == "megatron-sse init NAME writes one to NAME.yaml"


def test_writes_a_configuration_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "quickstart"]) == 0
    assert capsys.readouterr().out.endswith("megatron-sse train quickstart.yaml\n")
    written = tmp_path / "quickstart.yaml"
    assert written.read_text() == (CONFIGS / "quickstart.yaml").read_text()
    assert load_config(written).monitor.folder == "runs/quickstart"
    written.write_text("mine")
    assert main(["init", "quickstart"]) == 2
    assert capsys.readouterr().err == "--output: quickstart.yaml exists and is not overwritten; name another file\n"
    assert written.read_text() == "mine"
    assert main(["init", "stages", "--output", "own.yaml"]) == 0
    assert (tmp_path / "own.yaml").read_text() == (CONFIGS / "stages.yaml").read_text()


WRONG = [
    (["quick"], "NAME: got quick, allowed distill, distill_teacher, language_study, "),
    (["quickstart", "--output", "none/a.yaml"], "--output: the folder none was not found"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_refuses(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *arguments]) == 2
    assert capfd.readouterr().err.startswith(message)
