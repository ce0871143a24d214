"""`megatron-sse inspect-states`: its output, and the errors of wrong requests."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.cli import main
from megatron_sse.inspection import command
from megatron_sse.inspection.report import show
from tests.inference.support import SOFTMAX, make_checkpoint, model
from tests.leases import alive_here

PNG = b"\x89PNG"
PICTURES = {"partitions.png", "rank.png", "half_life.png"}


def inspect(folder: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """Run the command and return the content of its JSON file."""
    assert main(["inspect-states", str(folder), *arguments, "--output", str(output)]) == 0
    return json.loads((output / "states.json").read_text())


def test_hybrid(hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = inspect(hybrid, tmp_path / "out", "--prompt", "A text of 25 characters. ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"states.json", *PICTURES}
    assert all((tmp_path / "out" / name).read_bytes().startswith(PNG) for name in PICTURES)
    assert set(results) == {"checkpoint", "settings", "model", "tokens", "versions", "layers"}
    assert results["tokens"] == [25] and results["settings"]["precision"] == "fp32"
    sse, softmax = results["layers"]
    assert (sse["kind"], softmax["kind"], softmax["end"]) == ("sse", "softmax", None)
    tables = capsys.readouterr().out
    use, end = sse["use"], sse["end"]
    share = [f"{value:.3f}" for value in use["write_share_N"]]
    row = f"1      sse  {'  '.join(share)}  {use['written']:>4.2f} of 3"
    assert row in tables and "    2  softmax      -" in tables
    assert "  ".join(f"{rank:.2f}" for rank in [end["shared"], *end["partition_N"]][1:]) in tables
    assert f"{end['shared']:.2f} / {sum(end['partition_N']) / 3:.2f}" in tables
    assert "share of the writes and reads of each" in tables


def test_without_partitions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "model", model("gdn"))
    results = inspect(folder, tmp_path / "out", "--prompt", "A text")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"states.json", *PICTURES} - {"partitions.png"}
    layer = results["layers"][1]
    assert layer["use"] is None and layer["end"]["partition_N"] == []
    spread = layer["half_life"]["shared"]
    assert spread["p90"] != "inf" and layer["half_life"]["sparse_tokens"] is None
    tables = capsys.readouterr().out
    assert "partitions: share" not in tables
    assert tables.splitlines()[-2].split() == ["2", "gdn", *(show(value) for value in spread.values()), *["-"] * 6]


def test_without_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "model", model(sse={"decay": "none"}))
    found = inspect(folder, tmp_path / "out", "--prompt", "A text")["layers"][1]["half_life"]
    for name in ("shared", "sparse_writes", "sparse_tokens"):
        assert found[name] == {"p10": "inf", "p50": "inf", "p90": "inf"}
    assert capsys.readouterr().out.splitlines()[-2].split() == ["2", "sse", *["inf"] * 9]


def test_more_partitions_than_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With many partitions only the smallest and largest share is shown, for writes and for separately routed reads."""
    section = model(sse={"num_partitions": 20, "num_writers": 2, "num_readers": 1})
    folder = make_checkpoint(tmp_path / "model", section)
    results = inspect(folder, tmp_path / "out", "--prompt", "A text")
    use = results["layers"][0]["use"]
    assert len(use["write_share_N"]) == 20 and use["write_share_N"] != use["read_share_N"]
    tables = capsys.readouterr().out
    assert max(map(len, tables.splitlines())) < 150
    cells = tables.split("reads of each")[1].splitlines()[2].split()
    assert cells[2:4] == [f"{min(use['read_share_N']):.3f}", f"{max(use['read_share_N']):.3f}"]
    rank_N = results["layers"][0]["end"]["partition_N"]
    cells = tables.split("at the end")[1].splitlines()[2].split()
    assert len(rank_N) == 20 and cells[3:] == [f"{min(rank_N):.2f}", f"{max(rank_N):.2f}"]


def test_texts_of_all_kinds(pure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text gives the same numbers as a prompt, a file and token ids, also without matplotlib."""
    monkeypatch.setattr(command, "has_pictures", lambda: False)
    text = "from a to b"
    (tmp_path / "text").write_text(text)
    (tmp_path / "numbers").write_text(" ".join(str(byte) for byte in text.encode()))
    options = ["--prompt", text], ["--prompt-file", str(tmp_path / "text")], ["--tokens", str(tmp_path / "numbers")]
    first, *others = (inspect(pure, tmp_path / "out", *option)["layers"] for option in options)
    assert others == [first, first]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["states.json"]


WRONG = {
    "got no text, allowed one or more with --prompt, --prompt-file or --tokens": ["{pure}"],
    "CHECKPOINT: folder": ["{tmp}/none", "--prompt", "a"],
    "--prompt-file: {tmp}/none cannot be read": ["{pure}", "--prompt-file", "{tmp}/none"],
    "--prompt 2: got an empty prompt": ["{pure}", "--prompt", "a", "--prompt", ""],
    "--prompt-file {tmp}/empty: got an empty prompt": ["{pure}", "--prompt-file", "{tmp}/empty"],
    "--tokens: got text as well": ["{pure}", "--prompt", "a", "--tokens", "{tmp}/empty"],
    "--tokens: got {tmp}/empty, which is empty": ["{pure}", "--tokens", "{tmp}/empty"],
    "--tokens: {tmp}/large:1: got token 257, allowed 0 to 256": ["{pure}", "--tokens", "{tmp}/large"],
    "--chunk: got 0, allowed 1": ["{pure}", "--prompt", "a", "--chunk", "0"],
    "whose layers are all softmax, allowed a model with sse, gla or gdn": ["{softmax}", "--prompt", "a"],
    "got a text of 70 tokens, allowed 64, the length": ["{hybrid}", "--prompt", "7" * 70],
    "--output: /dev/null/x cannot be created": ["{pure}", "--prompt", "a", "--output", "/dev/null/x"],
}


@pytest.fixture(scope="module")
def softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("softmax") / "model", model("softmax", softmax=SOFTMAX))


@pytest.mark.parametrize("message", WRONG)
def test_wrong_requests(
    message: str, capsys: pytest.CaptureFixture[str], pure: Path, hybrid: Path, softmax: Path, tmp_path: Path
) -> None:
    places = {"pure": pure, "hybrid": hybrid, "softmax": softmax, "tmp": tmp_path}
    (tmp_path / "empty").write_text("")
    (tmp_path / "large").write_text("1 257\n")
    arguments = [word.format(**places) for word in WRONG[message]]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    assert main(["inspect-states", *arguments, *output]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message.format(**places) in said[0], said
    assert not (tmp_path / "out").exists()


def test_any_length(hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "has_pictures", lambda: False)
    assert inspect(hybrid, tmp_path, "--prompt", "7" * 70, "--any-length")["tokens"] == [70]


def test_two_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], hybrid: Path) -> None:
    lease = alive_here(tmp_path / "out/results")
    assert main(["inspect-states", str(hybrid), "--prompt", "a", "--output", str(tmp_path / "out")]) == 2
    assert f"--output: got {tmp_path / 'out'}, which process {os.getpid()} on " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == [lease]
