"""The command plot: its files, a page that needs no network, one run and many, and wrong requests."""

import base64
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_sse.cli import main
from tests.leases import alive_here
from tests.plot.runs import write_events, write_run

PICTURES = ["grad_norm", "layouts", "learning_rate", "loss", "memory", "partition_load", "router_entropy", "throughput"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pictures of two runs with different layouts."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "one <1>")
    second = write_run(folder / "two", 80, 8, parallel={"tensor": 2, "context": 2}, training={"precision": "fp32"})
    assert main(["plot", str(first), str(second), "--output", str(folder / "out")]) == 0
    return folder / "out"


def test_pictures_are_there_and_not_empty(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == sorted([f"{n}.png" for n in PICTURES] + ["index.html"])
    for path in drawn.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[0] >= 250 and pixels.shape[1] >= 800
        colours = np.unique(pixels.astype(int) @ [1, 1 << 8, 1 << 16])
        assert len(colours) > 50, path


def test_the_page_holds_the_pictures_and_loads_nothing_else(drawn: Path) -> None:
    page = (drawn / "index.html").read_text()
    images = re.findall(r'<img alt="[^"]*" src="data:image/png;base64,([^"]*)">', page)
    assert [base64.b64decode(image) for image in images] == [
        (drawn / f"{name}.png").read_bytes()
        for name in ("loss", "learning_rate", "grad_norm", "throughput", "memory")
        + ("partition_load", "router_entropy", "layouts")
    ]
    rest = re.sub(r"base64,[^\"]*", "", page)
    assert "//" not in rest and "url(" not in rest and "<script" not in rest and "<link" not in rest


def rows(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in page.splitlines() if line.startswith("<tr>")]


def test_the_tables(drawn: Path) -> None:
    table = rows((drawn / "index.html").read_text())
    assert table[0] == ["run", "layout", "processes", "steps", "loss", "validation loss", "tokens/s", "spikes"]
    assert table[1][0].endswith("one &lt;1&gt;") and table[1][1:4] == ["one process", "1", "60 of 10"]
    assert table[2][1:4] == ["tensor 2, context 2, data 2", "8", "80 of 10"]
    assert table[2][5:] == ["2.1000", "80,000", "0"]
    # The runs' folders also hold token files, which do not count here.
    assert [row for row in table[4:] if not row[0].startswith("data.train")] == [
        ["parallel.tensor", "1", "2"],
        ["parallel.sequence", "false", "true"],
        ["parallel.context", "1", "2"],
        ["training.precision", "bf16", "fp32"],
    ]


def test_what_earlier_versions_wrote_otherwise_does_not_differ(tmp_path: Path) -> None:
    """Null entries of sources, and keys that are null since."""
    runs = [write_run(tmp_path / name, steps=1) for name in ("early", "late")]
    settings = yaml.safe_load((runs[1] / "config.yaml").read_text())
    for part in settings["data"]["train"]:
        part |= {"mqar": None, "needle": None}
    for section, key in (("training", "loss_chunk"), ("monitor", "wandb")):
        assert settings[section].pop(key) is None
    settings["data"]["train"][0]["prefix"] = str(tmp_path / "early/train")
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["plot", *map(str, runs), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/index.html").read_text()
    assert rows(page[page.index("Settings that differ") :])[1:] == [["none", "", ""]]


def test_a_run_with_few_numbers(tmp_path: Path) -> None:
    """Runs that stopped after the first step, have no SSE layers, or a loss that is not finite, can be drawn."""
    write_run(tmp_path / "run", steps=1, model={"layers": "softmax"})
    for path in (tmp_path / "run/tensorboard").iterdir():
        path.unlink()
    write_events(tmp_path / "run", {1: {"train/loss": float("nan"), "optimizer/learning_rate": 1e-3}})
    assert main(["plot", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == ["layouts", "learning_rate", "loss"]


def test_wrong_requests_are_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(write_run(tmp_path / "run", steps=1))
    (tmp_path / "file").touch()
    wrong: list[tuple[list[str], str]] = [
        ([str(tmp_path / "none")], "none: folder not found"),
        ([run, "--output", str(tmp_path / "file/out")], "--output: "),
    ]
    for arguments, text in wrong:
        assert main(["plot", *arguments]) == 2
        said = capsys.readouterr().err
        assert text in said and said.count("\n") == 1
    find = __import__("importlib.util").util.find_spec

    def find_without_matplotlib(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else find(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", find_without_matplotlib)
    assert main(["plot", run]) == 2
    assert 'pip install "megatron-sse[plot]"' in capsys.readouterr().err


def test_two_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease = alive_here(tmp_path / "out/results")
    assert main(["plot", str(write_run(tmp_path / "run", steps=1)), "--output", str(tmp_path / "out")]) == 2
    assert f"--output: got {tmp_path / 'out'}, which process {os.getpid()} on " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == [lease]
