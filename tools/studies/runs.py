"""The runs of a study: each is trained, measured, and kept as result.json in its folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_sse.checkpoint.folders import step_folder
from megatron_sse.config import RunConfig, load_config
from megatron_sse.durable import write_durably
from megatron_sse.errors import UserError
from megatron_sse.run_folder import CHECKPOINTS
from megatron_sse.tools.studies.processes import Processes, RunError
from megatron_sse.tools.studies.results import RESULT, RESULTS, Key, Result

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Run:
    """One training of a study.

    key: names it among the results. settings: overrides of the file's settings. measure: arguments of python that
    measure its checkpoints; the run's folder and the JSON file to write come after the module's name.
    """

    key: Key
    folder: Path
    config_path: Path
    settings: list[str]
    config: RunConfig
    measure: tuple[str, ...]

    def description(self) -> dict[str, Any]:
        """Return the settings that its result depends on."""
        return _describe(self.config)

    @property
    def name(self) -> str:
        """The run in a line of the console."""
        return ", ".join(self.key)


def make_run(key: Key, folder: Path, path: Path, settings: list[str], points: int, measure: tuple[str, ...]) -> Run:
    """Return a run that saves `points` checkpoints on its way. Raises UserError."""
    config = load_config(path, settings)
    interval = max(1, config.training.steps // points)
    own = [f"checkpoint.interval={interval}", f"monitor.folder={json.dumps(str(folder))}", "monitor.tensorboard=false"]
    return Run(key, folder, path, [*settings, *own], config, measure)


def _describe(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"monitor", "checkpoint"})


def check_same(output: Path, run: Run, result: Result | None) -> None:
    """Raise UserError where a run was started, measured, or has a result, with other settings."""
    path = run.folder / SETTINGS
    # Results of earlier versions do not say how they were measured.
    if result is not None and result.get("measure", list(run.measure)) != list(run.measure):
        was, now = (" ".join(map(str, words[1:])) for words in (result["measure"], run.measure))
        raise UserError(f"--output: {run.name} was measured with {was}, not {now}; give another folder, or remove it")
    if path.is_file():
        begun, place = json.loads(path.read_text()), f"{run.folder} is a run"
    elif result is not None:
        begun, place = result["settings"], f"{output / RESULTS} has {run.name},"
    else:
        return
    try:
        # Settings that came after the run have their defaults.
        same = (
            _describe(RunConfig.model_validate(begun | {"monitor": {"folder": str(run.folder)}})) == run.description()
        )
    except ValidationError:
        same = False
    if not same:
        raise UserError(f"--output: {place} with other settings; give another folder, or remove it")


def check_writable(output: Path) -> None:
    """Make the study's folder. Raises UserError where nothing can be written to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror})") from None


def train_all(
    runs: list[Run],
    done: Mapping[Key, Result],
    workers: int,
    finish: Callable[[Run, Any], Result],
    say: Callable[[Result], str],
) -> int:
    """Train the runs that have no result yet, `workers` at a time, and return how many failed.

    finish: makes a run's result of what was measured. say: the result in a line of the console.
    """
    left = [run for run in runs if run.key not in done]
    print(f"\n{len(runs)} runs, {len(runs) - len(left)} already done", flush=True)
    processes, failed = Processes(), 0
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[Result], Run] = {pool.submit(_train, run, processes, finish): run for run in left}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                run = futures[future]
                try:
                    result = future.result()
                    text = f"{say(result)}, {result['seconds']:.0f} s"
                except (RunError, OSError) as error:
                    failed, text = failed + 1, f"failed: {error}"
                print(f"{number} of {len(left)}: {run.name}: {text}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return failed


def _train(run: Run, processes: Processes, finish: Callable[[Run, Any], Result]) -> Result:
    """Train, measure, write the result and remove the checkpoints. Raises RunError."""
    run.folder.mkdir(parents=True, exist_ok=True)
    _write(run.folder / SETTINGS, run.description())
    checkpoints, measured, log = (run.folder / name for name in (CHECKPOINTS, "points.json", "train.log"))
    resumed, started = checkpoints.is_dir(), time.monotonic()
    python = [sys.executable, "-m"]
    cpu = processes.run([*python, "megatron_sse", "train", str(run.config_path), *run.settings], log)
    seconds, steps = time.monotonic() - started, run.config.training.steps
    if not step_folder(checkpoints, steps).is_dir():
        raise RunError(f"ended before step {steps}; run the same command to resume")
    module, *options = run.measure
    processes.run([*python, module, str(run.folder), str(measured), *options], log)
    result = finish(run, json.loads(measured.read_text()))
    result |= {"settings": run.description(), "seconds": seconds, "cpu_seconds": cpu, "resumed": resumed}
    result |= {"measure": list(run.measure), "versions": _versions(), "commit": _commit()}
    _write(run.folder / RESULT, result)
    measured.unlink()
    shutil.rmtree(checkpoints)
    return result


def _write(path: Path, content: dict[str, Any]) -> None:
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def _versions() -> dict[str, Any]:
    # Imported late: it loads Megatron-Core for its version, which takes seconds.
    from megatron_sse.installed import versions

    return versions()


def _commit() -> str:
    """Return the commit of the code; reports that a study itself has written do not make it dirty."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
