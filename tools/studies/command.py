"""Options, errors and exit status of a study's command, the same in all studies."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from megatron_sse.errors import INTERRUPT_EXIT, USER_ERROR_EXIT, UserError
from megatron_sse.installed import require
from megatron_sse.tools.studies.results import Result


def make_parser(description: str | None, arms: Iterable[str], seeds: int, config: Path) -> argparse.ArgumentParser:
    """Return a parser of the options that all studies have; seeds and config are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and report")
    parser.add_argument("--arms", metavar="LIST", help=f"arms to train; default all: {', '.join(arms)}")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"seeds 0, 1, ... of each arm; default {seeds}")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--report", action="store_true", help="write the report without training")
    parser.add_argument("settings", metavar="section.key=value", nargs="*", help="setting for all arms")
    return parser


def find_arms(names: str | None, known: Collection[str]) -> list[str]:
    """Return the arms named in a string with commas, or all arms for None. Raises UserError."""
    found = list(known) if names is None else [name.strip() for name in names.split(",")]
    for name in found:
        if name not in known or found.count(name) > 1:
            raise UserError(f"--arms: got {name!r}, allowed {', '.join(known)}, each once")
    return found


def run_study(
    options: argparse.Namespace, counts: Iterable[str], train: Callable[[], int], report: Callable[[], str]
) -> int:
    """Train unless --report is given, print the report, and return the exit status.

    counts: names of options that are numbers of at least 1. train: returns how many runs failed.
    """
    try:
        require("matplotlib", "plots", "plot")
        for name in counts:
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(f"--{name}: got {getattr(options, name)}, allowed 1 or more")
        failed = 0 if options.report else train()
        try:
            print(report())
        except UserError as error:
            if not failed:
                raise
            # Runs that failed are more than a wrong request.
            print(error, file=sys.stderr)
        return 1 if failed else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPT_EXIT


def group_by_arm(results: Iterable[Result], arms: Iterable[str], output: Path) -> dict[str, list[Result]]:
    """Return the results of each arm by seed, arms in their order; those that the study no longer has are left out.

    Raises UserError where there are none.
    """
    results = sorted(results, key=lambda result: result["seed"])
    found = {arm: [result for result in results if result["arm"] == arm] for arm in arms}
    found = {arm: own for arm, own in found.items() if own}
    if not found:
        raise UserError(f"--output: {output} has no results")
    return found


def run_main(main: Callable[[], int]) -> None:
    """Run a study's main function as a program: SIGTERM ends it like an interrupt, with the processes it started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
