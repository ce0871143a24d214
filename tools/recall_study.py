"""The study of recall: trains every arm of tools/recall_arms.py with several seeds, and writes a report.

    python -m megatron_sse.tools.recall_study --output docs/evidence --workers 2

Each run takes minutes on one core, and each arm has 5 runs; `--arms n8k1,gla --seeds 1` is a first look. Each run is
trained by `megatron-sse train` in OUTPUT/ARM/seed_S, on one thread, with a log in train.log; then its checkpoints are
measured (tools/recall_measure.py) and removed, and result.json stays. The same command resumes after an interrupt:
finished runs are skipped, even if only OUTPUT/results.json has them; others resume at their last checkpoint.
Settings after the options, such as data.sequence_length=192, hold for all arms. The report (report.md, results.json and
plots, which need the `plot` extra) covers all results in OUTPUT; `--report` writes it without training. Exit status 0;
1 where a run failed, 2 for a wrong request.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_sse.checkpoint.folders import step_folder
from megatron_sse.config import RunConfig, load_config
from megatron_sse.durable import write_durably
from megatron_sse.errors import INTERRUPT_EXIT, USER_ERROR_EXIT, UserError
from megatron_sse.installed import require
from megatron_sse.interrupts import PR_SET_PDEATHSIG
from megatron_sse.run_folder import CHECKPOINTS
from megatron_sse.tools.recall_arms import ARMS, arm_settings, find_arms, num_parameters, state_elements, tabulate_arms
from megatron_sse.tools.recall_results import RESULT, RESULTS, Result, find_results, read_results

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "settings.json"
# Number of checkpoints of a run, which are measured.
POINTS = 8
# Seconds that a run has to save when it is terminated.
PATIENCE = 60
_LIBC = ctypes.CDLL(None)


class RunError(Exception):
    """Failure of a run."""


@dataclass(frozen=True)
class Run:
    """One model and seed. settings: overrides of the file's settings."""

    arm: str
    seed: int
    folder: Path
    config_path: Path
    settings: list[str]
    config: RunConfig

    def description(self) -> dict[str, Any]:
        """Return the settings that its result depends on."""
        return _describe(self.config)


class Processes:
    """The processes of the runs under way; none is started after `stop`."""

    def __init__(self) -> None:
        self.lock, self.stopped = threading.Lock(), False
        self.running: list[subprocess.Popen] = []

    def run(self, command: list[str], log: Path) -> None:
        """Run a command to its end, its output appended to a log. Raises RunError."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            with self.lock:
                if self.stopped:
                    raise RunError("not started")
                # In a session of its own, so that Ctrl-C at the terminal reaches it only through `stop`.
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
                self.running.append(process)
            status = process.wait()
        with self.lock:
            self.running.remove(process)
        if status:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise RunError(f"exit status {status}: {last} ({log})")

    def stop(self) -> None:
        """Terminate all processes; training saves first."""
        with self.lock:
            self.stopped, running = True, list(self.running)
        for process in running:
            process.terminate()
        end = time.monotonic() + PATIENCE
        for process in running:
            try:
                process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _end_with_parent() -> None:
    """Ask Linux to terminate this process when its parent dies.

    Otherwise a study that was killed and started again would have two processes in a run's folder.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    options = _parse(arguments)
    try:
        require("matplotlib", "plots", "plot")
        from megatron_sse.tools.recall_report import write_report

        for name in ("seeds", "workers", "steps", "samples"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(f"--{name}: got {getattr(options, name)}, allowed 1 or more")
        arms = find_arms(options.arms)
        failed = 0 if options.report else _train(options, _plan(options, arms), options.workers)
        missing = [(arm, seed) for arm in arms for seed in range(options.seeds)]
        print(write_report(options.output, read_results(options.output), missing))
        return 1 if failed else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPT_EXIT


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and report")
    parser.add_argument("--arms", metavar="LIST", help=f"arms to train; default all: {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... of each arm; default 5")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--steps", type=int, help="steps of training; default the file's")
    parser.add_argument("--samples", type=int, default=100, help="sequences to measure on; default 100")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "recall_mqar.yaml")
    parser.add_argument("--report", action="store_true", help="write the report without training")
    parser.add_argument("settings", metavar="section.key=value", nargs="*", help="setting for all arms")
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace, arms: list[str]) -> list[Run]:
    """Return all runs, ordered by seed so that every arm has a result early, and print how the arms are matched.

    Raises UserError where a run cannot be made, or was started with other settings.
    """
    common = [*options.settings, *([] if options.steps is None else [f"training.steps={options.steps}"])]
    settings = {arm: arm_settings(arm, options.config, common) for arm in arms}
    print(tabulate_arms(arms, options.config, common), flush=True)
    runs, results = [], find_results(options.output)
    for seed in range(options.seeds):
        for arm in arms:
            folder = options.output / arm / f"seed_{seed}"
            own = [*settings[arm], f"training.seed={seed}"]
            config = load_config(options.config, own)
            if not any(source.mqar for source in config.data.train):
                raise UserError(f"--config: got {options.config}, allowed one whose data.train is mqar")
            # POINTS checkpoints on the way; training also saves at its end.
            interval = max(1, config.training.steps // POINTS)
            own += [f"checkpoint.interval={interval}", f"monitor.folder={json.dumps(str(folder))}"]
            run = Run(arm, seed, folder, options.config, [*own, "monitor.tensorboard=false"], config)
            _check_same(run, results.get((arm, seed)))
            runs.append(run)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.output).close()
    except OSError as error:
        raise UserError(f"--output: {options.output} cannot be written ({error.strerror})") from None
    return runs


def _describe(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"monitor", "checkpoint"})


def _check_same(run: Run, result: Result | None) -> None:
    path = run.folder / SETTINGS
    if path.is_file():
        begun, place = json.loads(path.read_text()), f"{run.folder} is a run"
    elif result is not None:
        begun, place = result["settings"], f"{run.folder.parents[1] / RESULTS} has {run.arm}, seed {run.seed},"
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


def _train(options: argparse.Namespace, runs: list[Run], workers: int) -> int:
    """Train the runs that have no result yet, and return how many failed."""
    done = find_results(options.output)
    left = [run for run in runs if (run.arm, run.seed) not in done]
    print(f"\n{len(runs)} runs, {len(runs) - len(left)} already done", flush=True)
    processes, failed = Processes(), 0
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[Result], Run] = {pool.submit(_do, run, processes, options.samples): run for run in left}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                run, text = futures[future], ""
                try:
                    result = future.result()
                    text = f"accuracy {result['accuracy']:.3f}, {result['seconds']:.0f} s"
                except (RunError, OSError) as error:
                    failed, text = failed + 1, f"failed: {error}"
                print(f"{number} of {len(left)}: {run.arm}, seed {run.seed}: {text}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return failed


def _do(run: Run, processes: Processes, samples: int) -> Result:
    """Train, measure, write the result and remove the checkpoints. Raises RunError."""
    run.folder.mkdir(parents=True, exist_ok=True)
    _write(run.folder / SETTINGS, run.description())
    checkpoints, points_path, log = (run.folder / name for name in (CHECKPOINTS, "points.json", "train.log"))
    resumed, started = checkpoints.is_dir(), time.monotonic()
    python = [sys.executable, "-m"]
    processes.run([*python, "megatron_sse", "train", str(run.config_path), *run.settings], log)
    seconds, steps = time.monotonic() - started, run.config.training.steps
    if not step_folder(checkpoints, steps).is_dir():
        raise RunError(f"ended before step {steps}; run the same command to resume")
    measure = "megatron_sse.tools.recall_measure"
    processes.run([*python, measure, str(run.folder), str(points_path), "--samples", str(samples)], log)
    result = _result(run, json.loads(points_path.read_text()), samples)
    result |= {"seconds": seconds, "resumed": resumed}
    _write(run.folder / RESULT, result)
    points_path.unlink()
    shutil.rmtree(checkpoints)
    return result


def _write(path: Path, content: dict[str, Any]) -> None:
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def _result(run: Run, points: list[dict[str, Any]], samples: int) -> Result:
    # Imported late: it loads Megatron-Core for its version, which takes seconds.
    from megatron_sse.installed import versions

    last = points[-1]
    return {
        "arm": run.arm,
        "seed": run.seed,
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "parameters": num_parameters(run.config.model),
        "state_elements": state_elements(run.config),
        "partitions": run.config.model.sse.num_partitions if "sse" in run.config.model.layer_kinds() else 0,
        "points": points,
        "samples": samples,
        "settings": run.description(),
        "versions": versions(),
        "commit": _commit(),
    }


def _commit() -> str:
    """Return the commit of the code; reports that the study itself has written do not make it dirty."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


if __name__ == "__main__":
    # SIGTERM ends the study like an interrupt, together with the processes that it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
