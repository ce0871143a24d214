"""Benchmark of checkpoints on one process: how long training waits for a save, and the share of hashing in it.

Only the shares are meaningful: absolute times depend on the CPU and its disk.
"""

import argparse
import hashlib
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from megatron_sse import durable
from megatron_sse.checkpoint.folders import step_folder
from megatron_sse.checkpoint.load import load_checkpoint
from megatron_sse.checkpoint.save import Saver
from megatron_sse.checkpoint.state import held_by
from megatron_sse.checkpoint.verify import first_intact
from megatron_sse.config import RunConfig
from megatron_sse.model import build_model
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import init_groups, init_process_group
from megatron_sse.training.optimizer import build_optimizer
from megatron_sse.training.step import wrap_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure; default the system's temporary folder"
    )
    return parser.parse_args()


def run_config(args: argparse.Namespace, folder: Path) -> RunConfig:
    sections = {
        "model": {
            "num_layers": args.layers,
            "hidden_size": args.hidden,
            "vocab_size": args.vocabulary,
            "layers": "5*sse, softmax",
            "sse": {"num_heads": 8, "head_dim": args.hidden // 8},
            "softmax": {"num_heads": 8},
        },
        "data": {"train": "none", "sequence_length": 128},
        "training": {"steps": 1, "global_batch_size": 1, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3},
        "monitor": {"folder": str(folder)},
    }
    return RunConfig.model_validate(sections)


# Two numbers: wall-clock seconds and processor seconds.
Seconds = np.ndarray

SHA256 = hashlib.sha256


class Bench:
    """A model with its optimizer, filled with random numbers."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        device = setup_device(0)
        init_process_group(device)
        self.config, self.groups = run_config(args, folder), init_groups()
        self.chunks = wrap_model(self.config, build_model(self.config, self.groups, device), self.groups)
        self.optimizer = build_optimizer(self.config, self.chunks, self.groups)
        self.num_parameters = sum(parameter.numel() for parameter in self.chunks[0].parameters())
        for held in held_by(self.optimizer):
            for tensor in held.tensors.values():
                tensor.normal_()
        self.saver = Saver(self.config, self.chunks, self.optimizer, self.groups)
        self.checkpoint = step_folder(self.saver.folder, 1)

    def save(self) -> Seconds:
        """Return the time of a save in the foreground, for which training waits."""
        begun = now()
        self.saver.start(1, 1, background=False)
        self.saver.finish()
        return now() - begun

    def hash_in_save(self) -> Seconds:
        """Return the part of such a save that SHA-256 takes."""
        TimedHash.seconds = 0 * now()
        with patch.object(durable.hashlib, "sha256", TimedHash):
            self.save()
        return TimedHash.seconds

    def save_in_background(self) -> Seconds:
        """Return how long training waits for a save that is written in the background."""
        begun = now(of_thread=True)
        self.saver.start(1, 1, background=True)
        seconds = now(of_thread=True) - begun
        # The wait is not counted: training would continue meanwhile.
        while self.saver.is_writing():
            time.sleep(0.01)
        begun = now(of_thread=True)
        self.saver.finish()
        return seconds + now(of_thread=True) - begun

    def verify(self) -> Seconds:
        begun = now()
        assert first_intact([self.checkpoint], hashes=True) == self.checkpoint
        return now() - begun

    def load(self) -> Seconds:
        begun = now()
        load_checkpoint(self.checkpoint, self.config, self.chunks, self.optimizer, self.groups)
        return now() - begun


def now(of_thread: bool = False) -> Seconds:
    """Return wall-clock and processor time so far, of the process or (of_thread) of the training thread alone."""
    return np.array([time.perf_counter(), time.thread_time() if of_thread else time.process_time()])


class TimedHash:
    """A SHA-256 object that adds up the time it takes."""

    seconds: Seconds

    def __init__(self) -> None:
        self.digest = SHA256()

    def update(self, data: memoryview) -> None:
        begun = now()
        self.digest.update(data)
        TimedHash.seconds = TimedHash.seconds + now() - begun

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        bench = Bench(args, folder)
        measured: dict[str, Callable[[], Seconds]] = {
            "save, training waits": bench.save,
            "of it hashing": bench.hash_in_save,
            "save in the background": bench.save_in_background,
            "verify": bench.verify,
            "load": bench.load,
        }
        times: dict[str, list[Seconds]] = {name: [] for name in measured}
        # Measured in turn rather than in blocks, since the disk's speed drifts; the first round warms up.
        for repeat in range(args.repeats + 1):
            for name, measure in measured.items():
                seconds = measure()
                if repeat:
                    times[name].append(seconds)
        report(args, bench, times)
    finally:
        shutil.rmtree(folder)


def report(args: argparse.Namespace, bench: Bench, times: dict[str, list[Seconds]]) -> None:
    """Print a table of shares of the save during which training waits."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    size = sum(path.stat().st_size for path in bench.checkpoint.iterdir())
    model = f"{bench.num_parameters / 1e6:.0f} M parameters, fp32, {size / 2**30:.2f} GiB"
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    print(f"Commit {commit}, {versions}; {model}; one thread, {args.repeats} repeats\n")
    print("| what | share of the time: median (p10, p90) | share of the processor time |\n|---|---|---|")
    whole = np.median(times["save, training waits"], axis=0)
    for name, seconds in times.items():
        quantiles = np.quantile(seconds, (0.5, 0.1, 0.9), axis=0) / whole
        clock, processor = (f"{middle:.1%} ({low:.1%}, {high:.1%})" for middle, low, high in quantiles.T)
        print(f"| {name} | {clock} | {processor} |")


if __name__ == "__main__":
    main()
