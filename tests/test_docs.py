"""The pages about training: every command runs, on a small model, and every link has a target."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sse.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = ["model.num_layers=2", "model.layers=sse, softmax", "model.hidden_size=32", "model.sse.num_heads=2"]
SMALL += ["model.sse.head_dim=8", "model.softmax.num_heads=2", "data.validation=null"]
# In place of PREFIX and RUN, which the reader has.
OWN = ["data.corpus=python_stdlib", "data.train=corpora/python_stdlib/train", "checkpoint.load_weights=null"]
OWN += ["model.vocab_size=257", "model.softmax.num_kv_heads=2", "optimizer.warmup_steps=1"]
RUNS = {
    "quickstart": [*SMALL, "data.sequence_length=64", "training.steps=2"],
    "sse_h_2b_1m": [*SMALL, *OWN, "data.sequence_length=64", "parallel.context=2", "training.steps=2"],
    "stages": [*SMALL, "stages=[{tokens: 2000, sequence_length: 64}, {tokens: 500, sequence_length: 256}]"],
}
# The commands of this page are run by tests/check_parallel.
CHECK_PARALLEL = (ROOT / "docs" / "check_parallel.md").read_text().splitlines()
COMMANDS = list(
    dict.fromkeys(
        command
        for page in ("train", "go_long")
        for command in re.findall(
            r"^ {4,}((?:\./run\.sh|\.venv/bin/megatron-sse) .*)$", (ROOT / f"docs/{page}.md").read_text(), re.MULTILINE
        )
        if f"    {command}" not in CHECK_PARALLEL
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where the commands run, with the project's configurations but without corpus and runs."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in (folder, folder / "untrained"):
        part.mkdir(exist_ok=True)
        (part / "configs").symlink_to(ROOT / "configs")
    return folder


def train(command: str, folder: Path) -> str:
    """Run a page's training command, without the set-up of ./run.sh and with a small model."""
    _, *arguments = shlex.split(command)
    # A resumed run takes one step.
    arguments += [
        "training.steps=3" if part == "training.steps=2" and len(arguments) > 1 else part
        for part in RUNS[Path(arguments[0]).stem]
    ]
    call = [sys.executable, "-m", "megatron_sse", "train", *arguments]
    done = subprocess.run(call, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("./run.sh")])
def test_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder without runs, since runs of small models do not match the full-size models of these commands.
    monkeypatch.chdir(folder / "untrained")
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("./run.sh")])
def test_training(command: str, folder: Path) -> None:
    said = train(command, folder)
    if "training.steps=120" in command:
        assert "resumed from runs/quickstart/checkpoints/iter_0000002" in said and "step 3/3" in said
    if "stages.yaml" in command:
        assert "stage 2 of 2: steps 3 to 3" in said and "checkpoint saved" in said


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_files_that_contributing_names_exist() -> None:
    """A name may leave out the folders before it: `config/run.py`."""
    folders = ("megatron_sse", "kernels", "parallel", "tools", "configs", "tests")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.*")]
    named = re.findall(r"`([\w/]+\.(?:py|yaml))`", (ROOT / "CONTRIBUTING.md").read_text())
    # A placeholder of a new recurrence.
    named.remove("kernels/NAME.py")
    assert len(named) > 30
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]
