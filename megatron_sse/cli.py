"""The command `megatron-sse`: one subcommand per job."""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from megatron_sse import __version__
from megatron_sse.config import RunConfig, ignored_settings, load_config
from megatron_sse.config.derive import describe_run
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)

USER_ERROR_EXIT = 2
INTERRUPT_EXIT = 130


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand. Exit status: 0, 2 after a UserError (one line on stderr), 130 after an interrupt."""
    options = _parse(arguments)
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(rank)
    try:
        return options.job(options, rank)
    except UserError as error:
        print(f"{f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        return INTERRUPT_EXIT


def set_up_logging(rank: int) -> None:
    """Lines of this package on stdout, from rank 0; of others warnings alone."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )
    logging.getLogger("megatron_sse").setLevel(logging.WARNING if rank else logging.INFO)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-sse", description="Trains language models with SSE layers.")
    parser.add_argument("--version", action="version", version=__version__)
    jobs = parser.add_subparsers(required=True, metavar="JOB")
    train = jobs.add_parser("train", help="train a model", description="Train the model of a YAML file.")
    train.set_defaults(job=_train)
    check = jobs.add_parser(
        "check-parallel",
        help="compare layouts with one process",
        description="Run one training step of a YAML file's model, made small, in several layouts and compare each "
        "with one process. Exit status 1 where they differ. docs/check_parallel.md explains the output.",
    )
    check.set_defaults(job=_check_parallel)
    for job in (train, check):
        job.add_argument("config", metavar="CONFIG", help="YAML file; configs/reference.yaml documents every key")
        job.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings put over the file's")
    check.add_argument("--as-is", action="store_true", help="keep the model's sizes")
    check.add_argument("--layouts", metavar="LIST", help="names of layouts, separated by commas; default all")
    check.add_argument("--tolerance", metavar="X", type=float, help="largest error allowed, of every tensor")
    check.add_argument("--json", metavar="FILE", type=Path, help="file to write all numbers to")
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no settings after an option.
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return options


def _train(options: argparse.Namespace, rank: int) -> int:
    config = load_config(options.config, options.overrides)
    description = describe_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    if rank == 0:
        for line in description:
            logger.info(line)
        for line in ignored_settings(config):
            logger.warning(line)
    # Imported late: a wrong setting is answered before Megatron-Core is loaded.
    from megatron_sse.training import train

    if "RANK" not in os.environ:
        prepare_data(config)
    return train(config)


def _check_parallel(options: argparse.Namespace, rank: int) -> int:
    config = load_config(options.config, options.overrides)
    names = None if options.layouts is None else [name.strip() for name in options.layouts.split(",")]
    from megatron_sse.check_parallel import check_parallel

    # Like an interrupt, so that the processes that it started end with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return check_parallel(config, names, options.as_is, options.tolerance, options.json)


def prepare_data(config: RunConfig) -> None:
    """Build the corpus that the run asks for and check its token files; once per machine. Raises UserError."""
    from megatron_sse.data import check_data, prepare_corpus

    prepare_corpus(config)
    check_data(config)
