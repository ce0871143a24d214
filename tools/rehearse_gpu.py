"""Rehearses a training run on GPUs, on a machine without one: finds what would make them wait, or fail.

    python -m megatron_sse.tools.rehearse_gpu CONFIG [--ranks N] [section.key=value ...]

The whole of a run is executed on fake CUDA tensors, along the path that a GPU takes: two steps, validation and a
checkpoint, in a temporary folder. Reported by file and line are values that the host reads from the GPU, copies from
memory that is not pinned, tensors on the wrong device, collectives on tensors of the host, and boolean indexing. Exit
status 1 if a training step or validation has any of them, beyond what it has to read once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sse.config import RunConfig
from megatron_sse.config.derive import describe_run
from megatron_sse.config.load import load_config
from megatron_sse.errors import USER_ERROR_EXIT, UserError
from megatron_sse.tools.rehearsal.guard import load_guard

if TYPE_CHECKING:
    from megatron_sse.tools.rehearsal.findings import Findings

# The compute capability of the GPUs.
ARCHITECTURE = 90
# A short run with everything that longer ones do; the overrides of the command line come after these.
SHORT = (
    "training.steps=2",
    "training.validation_interval=1",
    "training.validation_batches=1",
    "optimizer.warmup_steps=0",
    "checkpoint.interval=1",
    "monitor.health_interval=1",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ranks", type=int, help="processes of the run (default: one for each part of the layout)")
    parser.add_argument(
        "--transformer-engine",
        type=Path,
        metavar="FOLDER",
        help="its unpacked wheel: rehearse with its Python code, too",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="rehearse_gpu_") as folder:
            overrides = [*SHORT, *options.overrides, f"monitor.folder={folder}"]
            config = load_config(options.config, overrides)
            ranks = options.ranks or config.parallel.replica_size * (config.parallel.data or 1)
            describe_run(config, ranks)
            # In a process of its own, since it imports torch, which has to come after the guard.
            if status := run_in_process(prepare, config):
                return status
            load_guard()
            return rehearse_ranks(config, ranks, install_stand_ins(ranks, options.transformer_engine))
    except UserError as error:
        print(f"rehearse_gpu: {error}", file=sys.stderr)
        return USER_ERROR_EXIT


def prepare(config: RunConfig) -> None:
    """Build the token files that the run asks for, as its launcher does; end with a line where that cannot be done."""
    from megatron_sse.launch.prepare import prepare_data

    try:
        prepare_data(config)
    except UserError as error:
        print(f"rehearse_gpu: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT)


def run_in_process(target: Callable[..., None], *arguments: Any) -> int:
    """Call a function in a fork of this process; return its exit status."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def install_stand_ins(num_ranks: int, transformer_engine: Path | None = None) -> Findings:
    """Make torch take this machine for one with `num_ranks` GPUs; return what receives the findings.

    transformer_engine: the folder of its unpacked wheel, to be used over a stand-in for its compiled part.
    """
    # Triton's operators by their fake implementations; compiled functions line by line, so that places are known.
    os.environ.update(TRITON_INTERPRET="0", TORCHDYNAMO_DISABLE="1")
    from megatron_sse.tools.rehearsal.cuda import GPUS, install_cuda
    from megatron_sse.tools.rehearsal.findings import Findings

    findings = Findings()
    install_cuda(GPUS[ARCHITECTURE], num_ranks, findings.note)
    # After the stand-ins for torch.cuda, which Triton asks when it is imported.
    from megatron_sse.tools.rehearsal.launches import Launches

    Launches().install(GPUS[ARCHITECTURE], compile=False)
    if transformer_engine is not None:
        from megatron_sse.tools.rehearsal.engine import install_engine

        install_engine(transformer_engine, findings.note)
    return findings


def rehearse_ranks(config: RunConfig, num_ranks: int, findings: Findings) -> int:
    """Rehearse the first and the last rank, which differ the most, one after the other; return the exit status."""
    # Imported before the fork, so that it is done once.
    from megatron_sse.logs import set_up_logging
    from megatron_sse.tools.rehearsal.findings import Phase
    from megatron_sse.tools.rehearsal.run import rehearse

    set_up_logging(rank=0)

    def run(rank: int) -> None:
        # A rank of its own run: rank 0 leaves a checkpoint, from which another would resume.
        monitor = config.monitor.model_copy(update={"folder": f"{config.monitor.folder}/rank_{rank}"})
        status = rehearse(config.model_copy(update={"monitor": monitor}), rank, num_ranks, findings)
        title = f"rank {rank} of {num_ranks}: {findings.entered[Phase.STEP]} steps, exit status {status}"
        print(title, *findings.report(), sep="\n", flush=True)
        sys.exit(1 if status or findings.wrong() else 0)

    failed = False
    for rank in sorted({0, num_ranks - 1}):
        failed |= run_in_process(run, rank) != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
