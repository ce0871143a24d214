"""The command line: exit status, and errors for wrong settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sse.cli import main

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")

WRONG = [
    ([QUICKSTART, "training.steps=none"], "command line: training.steps: got 'none', allowed an integer\n"),
    (["missing.yaml"], "missing.yaml: not found\n"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_user_errors_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(message) and errors.count("\n") == 1


def test_a_process_of_a_layout_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun a single process cannot hold a context group of two."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["train", QUICKSTART]) == 2
    message = "parallel: got 1 process, allowed a multiple of 2 (parallel.tensor 1 x pipeline 1 x context 2)\n"
    assert capfd.readouterr().err == message


def test_wrong_settings_are_answered_before_torch_is_loaded() -> None:
    """A run with wrong settings is refused within a fraction of a second, and starts no process."""
    code = f"""
import sys
from megatron_sse import cli
assert cli.main(["train", {QUICKSTART!r}, "model.sse.num_head=4"]) == 2
assert not {{"torch", "numpy", "megatron"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert run.stderr.startswith("command line: model.sse.num_head: got an unknown key")
    assert run.stderr.endswith("did you mean model.sse.num_heads?\n") and run.stderr.count("\n") == 1


def test_a_reader_that_leaves() -> None:
    """A reader that closes the pipe early, such as `head`, causes no traceback."""
    command = [sys.executable, "-m", "megatron_sse", "plan", QUICKSTART]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_arguments_that_are_no_text() -> None:
    command = [sys.executable, "-m", "megatron_sse", "train", b"caf\xe9.yaml"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "argument 2: got 'caf\\udce9.yaml', allowed text in UTF-8\n")


def test_a_prompt_that_is_no_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run", "--prompt", "caf\udce9"]) == 2
    assert capfd.readouterr().err == "--prompt: got 'caf\\udce9', allowed text in UTF-8\n"


LONG = "x" * 5000
PATHS = [
    ["inspect", LONG],
    ["plot", LONG],
    ["data", "inspect", LONG],
    ["plan", LONG],
    ["doctor", LONG],
    ["generate", LONG],
]


@pytest.mark.parametrize("arguments", PATHS, ids=lambda arguments: arguments[-2])
def test_a_path_that_is_too_long(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    status = main(arguments)
    output, errors = capfd.readouterr()
    # doctor reports it among its checks.
    assert status == (1 if arguments[0] == "doctor" else 2)
    assert errors.count("\n") == (0 if arguments[0] == "doctor" else 1) and "Traceback" not in output + errors


def test_folders_whose_names_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    command = [sys.executable, "-m", "megatron_sse", "doctor", QUICKSTART]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="surrogateescape")
    assert run.returncode in (0, 1) and "Traceback" not in run.stderr, run.stderr
