"""Event files of a run, of a resumed run and of a killed run; folders that are no runs."""

import os
import time
from pathlib import Path

import pytest

from megatron_sse.errors import UserError
from megatron_sse.monitor.events import Events
from megatron_sse.plot.read import RunLog, read_runs, read_scalars
from tests.plot.runs import write_events, write_run


def losses(*steps: int, value: float = 0.0) -> dict[int, dict[str, float]]:
    return {step: {"train/loss": value} for step in steps}


def test_all_scalars_are_read(tmp_path: Path) -> None:
    [run] = read_runs([str(write_run(tmp_path / "a", steps=20))])
    assert run.name == "a" and run.settings["model.sse.num_partitions"] == 4
    assert [step for step, _ in run.curve("train/loss")] == list(range(1, 21))
    assert run.last("validation/loss") == pytest.approx(2.1) and run.last("validation/bits_per_byte") is None
    assert list(run.entropies()) == [1, 3]
    assert {layer: list(shares) for layer, shares in run.shares().items()} == {1: [1, 2, 3, 4], 3: [1, 2, 3, 4]}
    assert run.shares()[1][4] == [(10, pytest.approx(0.4)), (20, pytest.approx(0.4))]


def test_partitions_and_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tags = [f"sse/layer_{layer:02d}/share_{partition}" for layer in (9, 10, 100) for partition in range(1, 13)]
    tags += [f"sse/layer_{layer:02d}/router_entropy" for layer in (9, 10, 100)]
    run = RunLog("run", {}, {tag: [(1, 0.0)] for tag in sorted(tags)})
    assert {layer: list(shares) for layer, shares in run.shares().items()} == {n: [*range(1, 13)] for n in (9, 10, 100)}
    assert list(run.shares()) == list(run.entropies()) == [9, 10, 100]


def test_ten_thousands_of_steps_are_all_read(tmp_path: Path) -> None:
    write_events(tmp_path, losses(*range(1, 12_001)))
    assert len(read_scalars(tmp_path)["train/loss"]) == 12_000


def test_a_resumed_run_takes_the_place_of_what_it_repeats(tmp_path: Path) -> None:
    write_events(tmp_path, losses(1, 2, 3, 4, 5, 6, value=1.0))
    # The run resumed after step 3, and ended before it reached the first attempt's last step.
    write_events(tmp_path, losses(4, 5, value=2.0))
    assert read_scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_event_files_of_one_second_are_read_in_their_order(tmp_path: Path) -> None:
    for number, value in ((9, 1.0), (10, 2.0)):
        write_events(tmp_path, losses(1, 2, value=value))
        [path] = (path for path in (tmp_path / "tensorboard").iterdir() if not path.name.endswith("host.1.9"))
        path.rename(path.with_name(f"events.out.tfevents.1700000000.host.1.{number}"))
    assert read_scalars(tmp_path)["train/loss"] == [(1, 2.0), (2, 2.0)]


@pytest.mark.parametrize("old_name", [False, True])
def test_a_clock_that_was_set_back(old_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resumed run's file is the later one, whatever its times; its name is in order, unless torch chose it."""
    for clock, first_step, value in ((2e9, 1, 1.0), (1e9, 4, 2.0)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        events = Events(tmp_path / "tensorboard", first_step)
        for step in range(first_step, first_step + 6):
            events.write(step, {"train/loss": value})
    assert [path.name[:31] for path in sorted((tmp_path / "tensorboard").iterdir())] == [
        "events.out.tfevents.2000000000.",
        "events.out.tfevents.2000000001.",
    ]
    if old_name:
        assert events.path is not None
        events.path.rename(events.path.with_name("events.out.tfevents.1000000000.host.1.0"))
    assert read_scalars(tmp_path)["train/loss"] == [(n, 1.0 if n < 4 else 2.0) for n in range(1, 10)]


def test_a_run_that_was_started_anew(tmp_path: Path) -> None:
    for steps, value in (((1, 2, 3, 4, 5), 1.0), ((4, 5, 6), 2.0), ((1, 2), 3.0)):
        write_events(tmp_path, losses(*steps, value=value))
    assert read_scalars(tmp_path)["train/loss"] == [(1, 3.0), (2, 3.0)]


def test_a_tag_that_the_resumed_run_has_not_written_yet(tmp_path: Path) -> None:
    write_events(tmp_path, losses(2, 4, value=1.0) | {3: {"validation/loss": 1.0}, 6: {"validation/loss": 1.0}})
    write_events(tmp_path, losses(5, value=2.0))
    assert read_scalars(tmp_path)["validation/loss"] == [(3, 1.0)]


def test_a_truncated_file_gives_its_complete_records(tmp_path: Path) -> None:
    write_events(tmp_path, losses(*range(1, 101)))
    [path] = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert [step for step, _ in read_scalars(tmp_path)["train/loss"]] == list(range(1, 100))


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, steps=1) for name in ("one/run", "two/run", "other")]
    names = [run.name for run in read_runs([str(folder) for folder in folders])]
    assert names == ["one/run", "two/run", f"{tmp_path.name}/other"]


def test_wrong_folders(tmp_path: Path) -> None:
    good, empty, no_events, foreign = (tmp_path / name for name in ("good", "empty", "no_events", "foreign"))
    write_run(good, steps=1)
    empty.mkdir()
    write_run(no_events, steps=1)
    for path in (no_events / "tensorboard").iterdir():
        path.unlink()
    write_run(foreign, steps=1)
    (foreign / "config.yaml").write_text("steps: 3\n")
    wrong = {
        tmp_path / "none": "none: folder not found",
        empty: "empty/config.yaml: cannot be read",
        no_events: "no_events/tensorboard: no TensorBoard events; runs with monitor.tensorboard true write them",
        foreign: "foreign/config.yaml: model.layers missing; give a folder with the config.yaml that a run wrote",
        good: "good: given twice",
    }
    for folder, text in wrong.items():
        with pytest.raises(UserError, match=text) as caught:
            read_runs([str(good), str(folder)])
        assert "\n" not in str(caught.value)


def test_what_is_no_event_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders and named pipes with the name of an event file; a pipe would be waited for."""
    write_events(tmp_path, losses(1, 2))
    folder = tmp_path / "tensorboard"
    (folder / "events.out.tfevents.1.folder").mkdir()
    os.mkfifo(folder / "events.out.tfevents.2.pipe")
    assert len(read_scalars(tmp_path)["train/loss"]) == 2
    for name in ("1.folder", "2.pipe"):
        assert f"{folder}/events.out.tfevents.{name}: not a regular file, left out" in caplog.text
