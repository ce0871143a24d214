"""The commands of docs/observe.md work as it says, and its table lists the tags that a run writes."""

import json
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from megatron_sse.cli import main
from megatron_sse.config import RunConfig, load_config
from megatron_sse.data.metadata import Metadata
from megatron_sse.training.loop import Signals
from tests.data.files import random_documents, write_tokens
from tests.monitor.events import read_events
from tests.training.support import start
from tests.workers import run_workers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "observe.md").read_text()
COMMANDS = re.findall(r"^    (?:\.venv/bin/|\./)([^\[\]\n]*(?:'[^']*')?)$", PAGE, re.MULTILINE)
SMALL = ["model.hidden_size=32", "model.sse.head_dim=8", "model.layers=[sse,gla,softmax]", "data.sequence_length=32"]
SMALL += [
    "model.num_layers=3",
    "model.sse.num_partitions=2",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "data.corpus=null",
]
SMALL += ["training.steps=12", "training.validation_interval=0", "training.validation_batches=1"]


def test_the_commands_are_these() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["run.sh", "run.sh", "tensorboard", "megatron-sse"]


def run(config: RunConfig) -> None:
    start(config).run(Signals())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with smaller and shorter versions of the page's runs, on random tokens."""
    folder = tmp_path_factory.mktemp("observe")
    write_tokens(str(folder / "train"), random_documents(300, 40))
    Metadata("bytes", 257, 300, 6000, 6000, 4.5).write(folder / "train.json")
    for command in COMMANDS[:2]:
        _, path, *overrides = shlex.split(command)
        data = [f"data.{name}={folder}/train" for name in ("train", "validation")]
        config = load_config(ROOT / path, [*overrides, *SMALL, *data])
        config.monitor.folder = str(folder / config.monitor.folder)
        run_workers(config.parallel.replica_size * (config.parallel.data or 1), run, config)
    return folder


def test_the_profile_is_where_the_page_says(workplace: Path) -> None:
    folder = workplace / "runs/quickstart"
    for name in re.findall(r"^- `(.*?)`", PAGE, re.MULTILINE):
        [path] = folder.glob(name)
        assert path.stat().st_size > 1000


def test_the_table_has_every_tag_and_no_other(workplace: Path) -> None:
    table = PAGE.split("## TensorBoard")[1].split("\n##")[0]
    named = {tag for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for tag in re.findall(r"`(.*?)`", row)}
    written = {
        re.sub(r"share_\d+", "share_K", re.sub(r"layer_\d\d", "layer_NN", tag))
        for tag in read_events(workplace / "runs/quickstart")
    }
    # A CPU has no known peak, and these runs have no task.
    assert named - {"speed/mfu", "validation/accuracy"} == written


def test_tensorboard_shows_the_runs(workplace: Path) -> None:
    command = shlex.split(COMMANDS[2])
    process = subprocess.Popen(
        [Path(sys.executable).parent / command[0], *command[1:], "--port=0"],
        cwd=workplace,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+:\d+", line)))
        runs: dict[str, object] = {}
        # The server answers before it has read all events.
        while len(runs) < 2:
            assert process.poll() is None
            with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags") as answer:
                runs = json.load(answer)
        assert address.startswith("http://127.0.0.1:") or address.startswith("http://localhost:")
        assert sorted(runs) == ["quickstart/tensorboard", "quickstart_data2/tensorboard"]
    finally:
        process.terminate()
        process.communicate()


def test_the_plot_has_the_pictures_of_the_table(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert main(shlex.split(COMMANDS[3])[1:]) == 0
    names = {path.stem for path in (workplace / "runs/plot").glob("*.png")}
    rows = re.findall(r"^\| (\w+(?:, \w+)*) \|", PAGE.split("## Pictures")[1], re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} - {"picture"} == names
    assert (workplace / "runs/plot/index.html").stat().st_size > 100_000
