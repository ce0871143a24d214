"""The command check-parallel: make settings comparable, record a step of one process, compare layouts with it."""

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_sse.check_parallel.layouts import Layout, choose_layouts, fit_layout, make_config, num_ranks, one_process
from megatron_sse.check_parallel.processes import Processes, RankError
from megatron_sse.check_parallel.report import table_lines, verdict_lines, write_json
from megatron_sse.check_parallel.request import Request
from megatron_sse.check_parallel.scale import scale
from megatron_sse.check_parallel.step import compare, record
from megatron_sse.check_parallel.verdict import Result, make_limits, merge
from megatron_sse.config import RunConfig, longest_stage
from megatron_sse.errors import UserError

DIFFERENT_EXIT = 1


def run(request: Request, prepare: Callable[[], None] | None = None) -> int:
    """Compare one training step in several layouts with that of one process, and print what differs.

    prepare: called in every process at its start; tests use it to inject faults.

    Returns the exit status, 1 where a layout differs or a rank fails. Raises UserError before any process is started.
    """
    request.check()
    # SIGTERM ends the command like an interrupt, so that the processes that it started end with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    config, names = request.run_config, request.layout_names()
    config = longest_stage(config).config
    parallels = choose_layouts(config, names)
    values, rules = scale(config, list(parallels.values()), request.as_is)
    single = make_config(values, one_process(config.parallel))
    num_gpus = torch.cuda.device_count()
    given = config.model_dump()
    layouts = [fit_layout(name, parallel, values, given, num_gpus) for name, parallel in parallels.items()]
    possible = [layout for layout in layouts if layout.config is not None]
    if not possible:
        raise UserError(f"--layouts: none is possible; {layouts[0].name}: {layouts[0].reason}")
    for line in rules:
        print(line)
    tensor = max(layout.config.parallel.tensor for layout in possible if layout.config is not None)
    processes = Processes(max(num_ranks(layout.parallel) for layout in possible), prepare, tensor)
    try:
        noise, results = _run(processes, single, layouts)
    except RankError as error:
        print(f"\none process: FAILED on {error}")
        return DIFFERENT_EXIT
    finally:
        processes.close()

    limits = make_limits(noise, request.tolerance)
    compared = [result for result in results if result.outputs]
    for line in table_lines([noise, *compared], single.model.layer_kinds()) + verdict_lines(results, limits):
        print(line)
    if request.json is not None:
        write_json(request.json, results, noise, limits, rules)
    return 0 if all(result.passes(limits) for result in results if result.layout.config) else DIFFERENT_EXIT


def _run(processes: Processes, single: RunConfig, layouts: list[Layout]) -> tuple[Result, list[Result]]:
    """Return the noise (errors of one process whose weights were nudged) and the errors of each layout.

    Raises RankError where one process alone already fails.
    """
    with tempfile.TemporaryDirectory(prefix="check-parallel-") as folder:
        path = Path(folder) / "record.pt"
        print("runs one process", end="", flush=True)
        processes.run(1, record, single, path)
        noise = merge(Layout("noise", single.parallel, single), processes.run(1, compare, single, path, True))
        results = []
        for layout in layouts:
            result = Result(layout)
            if layout.config is not None:
                print(f", {layout.name}", end="", flush=True)
                try:
                    ranks = processes.run(num_ranks(layout.parallel), compare, layout.config, path, False)
                    result = merge(layout, ranks, noise)
                except RankError as error:
                    result.failure = str(error)
            results.append(result)
        print()
    return noise, results
