"""Weights & Biases and MLflow: the scalars of a run sent to them by a thread, so that the run waits for neither."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_sse.config import RunConfig
from megatron_sse.durable import unique, write_durably
from megatron_sse.errors import UserError
from megatron_sse.installed import require
from megatron_sse.monitor.output import Output
from megatron_sse.reading import NotFoundError, read_json

logger = logging.getLogger(__name__)

# In the run folder, after the name of a tracker: what the run is known as there, and the last step that was sent.
STATE = "run.json"
# Reports that wait for a tracker; of a server that does not answer, later ones are lost.
_MAX_WAITING = 10_000
# How long the end of a run waits for what has not been sent.
SECONDS_TO_SEND = 60.0


class Tracker(ABC):
    """One run at a tracker. All methods may raise anything that its library raises."""

    name: str

    @abstractmethod
    def start(self, config: RunConfig, known_as: str | None) -> str:
        """Make the run, or continue the one that is `known_as`; return what it is known as."""

    @abstractmethod
    def send(self, step: int, scalars: dict[str, float], seconds: float) -> None:
        """Send scalars of a step. seconds: when they were measured, since 1970."""

    @abstractmethod
    def end(self) -> None:
        """Tell the tracker that the run has ended."""


class WandbTracker(Tracker):
    """A run in a project of Weights & Biases. Its variables, such as WANDB_MODE=offline, decide where it goes."""

    name = "wandb"

    def start(self, config: RunConfig, known_as: str | None) -> str:
        import wandb

        folder = Path(config.monitor.folder)
        self.run = wandb.init(
            project=config.monitor.wandb,
            name=folder.name,
            id=known_as or unique(),
            resume="allow",
            dir=folder,
            config=config.model_dump(mode="json"),
            # The run's console stays as it is.
            settings=wandb.Settings(console="off"),
        )
        return self.run.id

    def send(self, step: int, scalars: dict[str, float], seconds: float) -> None:
        self.run.log(scalars, step=step)

    def end(self) -> None:
        import wandb

        self.run.finish()
        # Wait for the process in which the library writes and sends.
        wandb.teardown()


class MlflowTracker(Tracker):
    """A run of an MLflow experiment. MLFLOW_TRACKING_URI says where the server is."""

    name = "mlflow"

    def start(self, config: RunConfig, known_as: str | None) -> str:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if known_as is not None:
            self.id = known_as
            self.client.update_run(known_as, status="RUNNING")
            return known_as
        assert config.monitor.mlflow is not None
        found = self.client.get_experiment_by_name(config.monitor.mlflow)
        experiment = self.client.create_experiment(config.monitor.mlflow) if found is None else found.experiment_id
        self.id = self.client.create_run(experiment, run_name=Path(config.monitor.folder).name).info.run_id
        self.client.log_text(self.id, config.to_yaml(), "config.yaml")
        return self.id

    def send(self, step: int, scalars: dict[str, float], seconds: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, round(1000 * seconds), step) for name, value in scalars.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def end(self) -> None:
        self.client.set_terminated(self.id)


KINDS: tuple[type[Tracker], ...] = (WandbTracker, MlflowTracker)


def check_trackers(config: RunConfig) -> None:
    """Raise UserError where the library of a tracker that the run asks for is not installed."""
    for kind in _asked(config):
        require(kind.name, f"monitor.{kind.name}", kind.name)


def start_trackers(config: RunConfig, first_step: int) -> list[Sender]:
    """Start a thread for each tracker that the run asks for. first_step: 0 or 1 in a new run."""
    return [Sender(kind(), config, first_step) for kind in _asked(config)]


def _asked(config: RunConfig) -> Sequence[type[Tracker]]:
    return [kind for kind in KINDS if getattr(config.monitor, kind.name) is not None]


class Sender:
    """A thread that sends the scalars of a run to one tracker. What fails is logged, and lost; the run goes on.

    A run that resumes continues its run at the tracker. Steps that were sent before are not sent again.
    """

    def __init__(self, tracker: Tracker, config: RunConfig, first_step: int) -> None:
        self.tracker, self.config = tracker, config
        self.path = Path(config.monitor.folder) / f"{tracker.name}_{STATE}"
        self.output = Output(tracker.name, (Exception,))
        self.waiting: queue.Queue[tuple[int, dict[str, float], float] | None] = queue.Queue(_MAX_WAITING)
        self.known_as, self.last = self._read_state() if first_step > 1 else (None, -1)
        self.sent = self.last
        self.thread = threading.Thread(target=self._run, name=tracker.name, daemon=True)
        self.thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Hand scalars of a step to the thread."""
        if step > self.last:
            try:
                self.waiting.put_nowait((step, dict(scalars), time.time()))
            except queue.Full:
                self.output.fail(f"{_MAX_WAITING} reports wait for it; later ones are lost")

    def close(self) -> None:
        """Send what is left, for a minute at most."""
        with suppress(queue.Full):
            self.waiting.put_nowait(None)
        self.thread.join(SECONDS_TO_SEND)
        if self.thread.is_alive():
            logger.warning("%s: not everything was sent within %.0f s", self.tracker.name, SECONDS_TO_SEND)

    def _run(self) -> None:
        is_started = False
        while (report := self.waiting.get()) is not None:
            with self.output.attempt():
                if not is_started:
                    self.known_as = self.tracker.start(self.config, self.known_as)
                    is_started = True
                self._send(*report)
        if is_started:
            with self.output.attempt():
                self.tracker.end()

    def _send(self, step: int, scalars: dict[str, float], seconds: float) -> None:
        if step > self.sent:
            # Noted first: after a crash a step may be missing at the tracker, but none is there twice.
            self.sent = step
            write_durably(self.path, json.dumps({"run": self.known_as, "step": step}).encode())
        self.tracker.send(step, scalars, seconds)

    def _read_state(self) -> tuple[str | None, int]:
        try:
            state = read_json(self.path, dict[str, str | int])
            return str(state["run"]), int(state["step"])
        except NotFoundError:
            pass
        except (UserError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read (%s): the run is a new one at %s", self.path, error, self.tracker.name)
        return None, -1
