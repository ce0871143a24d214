"""Weights & Biases and MLflow, with their real libraries and without a server: each step is sent once, no fault ends a
run."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sse import installed
from megatron_sse.config import RunConfig
from megatron_sse.errors import UserError
from megatron_sse.monitor import trackers
from megatron_sse.monitor.trackers import Sender, Tracker, check_trackers, start_trackers
from tests.data.files import run_config


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    yield


def config_of(folder: Path, **monitor: str) -> RunConfig:
    return run_config("tokens", monitor={"folder": str(folder / "run"), **monitor})


def send(config: RunConfig, first_step: int, last_step: int) -> None:
    """Report some steps, as a run that starts at `first_step` does."""
    Path(config.monitor.folder).mkdir(exist_ok=True)
    senders = start_trackers(config, first_step)
    for step in range(first_step, last_step + 1):
        for sender in senders:
            sender.write(step, {"train/loss": 1.0 / step})
            sender.write(step, {"validation/loss": 2.0 / step})
    for sender in senders:
        sender.close()
        assert not sender.output.is_failing and not sender.thread.is_alive()


def test_mlflow_gets_each_step_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = config_of(tmp_path, mlflow="experiment")
    # A crash after step 5, and a resume from the checkpoint after step 3.
    send(config, 1, 5)
    send(config, 4, 7)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("experiment")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    for name, scale in (("train/loss", 1.0), ("validation/loss", 2.0)):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == [(step, scale / step) for step in range(1, 8)]
    # A run that starts over is another one.
    send(config, 1, 1)
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_wandb_gets_each_step_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, wandb="project")
    send(config, 1, 3)
    state = json.loads((tmp_path / "run/wandb_run.json").read_text())
    assert state["step"] == 3
    send(config, 3, 4)
    assert json.loads((tmp_path / "run/wandb_run.json").read_text()) == {"run": state["run"], "step": 4}
    files = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{state['run']}/*.wandb"))
    assert [steps_of(file) for file in files] == [[1, 2, 3], [4]]


def steps_of(file: Path) -> list[int]:
    """Return the steps in a file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for content in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            assert values["train/loss"] == 1 / values["_step"] and values["validation/loss"] == 2 / values["_step"]
            steps.append(values["_step"])
    return steps


def records_of(data: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format, which starts with 7 bytes of W&B's own and has blocks of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        # A full record, or the last part of one.
        if kind in (1, 4):
            yield record
            record = b""


class Broken(Tracker):
    """A tracker that fails, then waits until the test ends."""

    name = "broken"

    def __init__(self) -> None:
        self.calls, self.released = 0, threading.Event()

    def start(self, config: RunConfig, known_as: str | None) -> str:
        self.calls += 1
        if self.calls == 1:
            raise ValueError("no such project")
        return "it"

    def send(self, step: int, scalars: dict[str, float], seconds: float) -> None:
        if step == 3:
            self.released.wait()

    def end(self) -> None:
        pass


def test_a_tracker_that_fails_or_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "SECONDS_TO_SEND", 0.0)
    monkeypatch.setattr(trackers, "_MAX_WAITING", 3)
    (tmp_path / "run").mkdir()
    tracker = Broken()
    sender = Sender(tracker, config_of(tmp_path), 1)
    for step in range(1, 20):
        sender.write(step, {"a": 1.0})
    sender.close()
    said = [record.getMessage() for record in caplog.records]
    assert said[-1] == "broken: not everything was sent within 0 s"
    assert any("not written" in line for line in said[:-1])
    tracker.released.set()


def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(config_of(tmp_path, wandb="project", mlflow="experiment"))
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    check_trackers(config_of(tmp_path))
    message = r'^monitor.mlflow: needs mlflow, which is not installed: pip install "megatron-sse\[mlflow\]"$'
    with pytest.raises(UserError, match=message):
        check_trackers(config_of(tmp_path, mlflow="experiment"))
