"""The report of check-parallel: tables and verdicts to print, and the numbers as JSON."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_sse.check_parallel.probe import layer_row
from megatron_sse.check_parallel.verdict import Result, row_of
from megatron_sse.durable import output_file
from megatron_sse.errors import UserError

COLUMNS_PER_BLOCK = 7
CELL_WIDTH = 13


def table_lines(results: list[Result], kinds: list[str]) -> list[str]:
    """Return the table: a column per result, and a row per layer with the worst errors of its output and its gradients.

    The scalars (losses, gradient norm) follow as rows of their own. kinds: the kind of each layer, such as sse.
    """
    reference = results[0]
    labels = {row: row for row in reference.outputs}
    labels |= {layer_row(number): f"{layer_row(number)} {kind}" for number, kind in enumerate(kinds, 1)}
    width = 2 + max(map(len, [*labels.values(), *reference.scalars]))
    lines = []
    for first in range(0, len(results), COLUMNS_PER_BLOCK):
        block = results[first : first + COLUMNS_PER_BLOCK]
        lines += ["", _line(" " * width, [result.layout.name for result in block])]
        for row in reference.outputs:
            cells = [f"{_short(result.outputs[row])} {_short(_gradient(result, row))}" for result in block]
            lines.append(_line(f"{labels[row]:{width}}", cells))
        for name in reference.scalars:
            lines.append(_line(f"{name.replace('_', ' '):{width}}", [_short(result.scalars[name]) for result in block]))
    return lines


def _line(label: str, cells: list[str]) -> str:
    return (label + "".join(f"{cell:<{CELL_WIDTH}}" for cell in cells)).rstrip()


def _gradient(result: Result, row: str) -> float:
    return max((error for name, error in result.gradients.items() if row_of(name) == row), default=0.0)


def _short(error: float) -> str:
    """Return a number with one digit: 1.2e-07 becomes 1e-7."""
    return f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e+") if error else "0"


def verdict_lines(results: list[Result], limits: dict[str, float]) -> list[str]:
    """Return one line per layout (more where a rank failed) and one for the unpinned routing."""
    lines = ["", *(f"{result.layout.name:<{CELL_WIDTH}}{_verdict(result, limits)}" for result in results)]
    same = [result.layout.name for result in results if result.moved == 0]
    return [*lines, f"unpinned routing of the first router: same in {', '.join(same)}"] if same else lines


def _verdict(result: Result, limits: dict[str, float]) -> str:
    if result.layout.config is None:
        return f"not possible: {result.layout.reason}"
    if result.failure:
        return f"FAILED on {result.failure.rstrip()}"
    name, error, limit = result.worst(limits)
    if name.startswith("gradient of decoder.layers."):
        # Names of parameters count layers from 0.
        name += f" ({row_of(name.removeprefix('gradient of '))})"
    text = f"{'same' if result.passes(limits) else 'DIFFERENT'}: worst {error:.1e} (allowed {limit:.1e}), {name}"
    if result.moved:
        text += f"; unpinned routing DIFFERENT for {result.moved} tokens, summed over ranks"
    return text


def write_json(path: Path, results: list[Result], noise: Result, limits: dict[str, float], rules: list[str]) -> None:
    """Write the errors of every tensor in every layout; null where one is not finite or no rank held the tensor.

    Raises UserError.
    """
    layouts = {result.layout.name: _describe(result, limits) for result in results}
    document = {"rules": rules, "allowed": limits, "noise": _finite(noise.errors()), "layouts": layouts}
    try:
        with output_file(path) as file:
            file.write((json.dumps(document, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--json: {path} cannot be written ({error.strerror})") from None


def _describe(result: Result, limits: dict[str, float]) -> dict[str, Any]:
    described: dict[str, Any] = {"parallel": result.layout.parallel.model_dump()}
    if result.layout.config is None:
        return described | {"verdict": "not possible", "reason": result.layout.reason}
    if result.failure:
        return described | {"verdict": "failed", "reason": result.failure}
    verdict = "same" if result.passes(limits) else "different"
    return described | {"verdict": verdict, "moved_picks": result.moved, "errors": _finite(result.errors())}


def _finite(errors: dict[str, float]) -> dict[str, float | None]:
    return {name: error if math.isfinite(error) else None for name, error in errors.items()}
