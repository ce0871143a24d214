"""Results of a study: result.json in each run's folder, and all of them in results.json, for clones.

results.json has one run on each line. Settings that all runs share are written once, before the runs; every run has the
rest of its settings. Numbers have seven digits: those of states and shares are fp32, and accuracies stay exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_sse.durable import write_durably
from megatron_sse.errors import UserError

RESULT, RESULTS, REPORT = "result.json", "results.json", "report.md"
Result = dict[str, Any]
# What names a run, in words for the console: ("n8k1", "seed 0").
Key = tuple[str, ...]


def find_results(output: Path, key: Callable[[Result], Key]) -> dict[Key, Result]:
    """Return all results by the key of each; a run's own file goes before results.json.

    Raises UserError where results.json is not one of the study.
    """
    path, found = output / RESULTS, {}
    if path.is_file():
        try:
            content = json.loads(path.read_text())
            for run in content["runs"]:
                found[key(run)] = run | {"settings": _join(content["settings"], run["settings"])}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--output: {path} was not written by this study; remove it, or give another folder"
            ) from None
    for file in output.glob(f"*/*/{RESULT}"):
        try:
            result = json.loads(file.read_text())
            found[key(result)] = result
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--output: {file} was not written by this study; give another folder") from None
    return found


def mean_cpu_seconds(results: Iterable[Result]) -> float | None:
    """Return the mean processor time of runs; None where all were resumed, of which only the last part is known."""
    seconds = [result["cpu_seconds"] for result in results if not result["resumed"]]
    return mean(seconds) if seconds else None


def write_tables(output: Path, found: Mapping[str, Sequence[Result]], text: str) -> None:
    """Write results.json, of the results of all arms, and the text as report.md. Raises UserError."""
    try:
        write_results(output, [result for results in found.values() for result in results])
        write_durably(output / REPORT, text.encode())
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror})") from None


def write_results(output: Path, results: Sequence[Result]) -> None:
    """Write results.json. Raises OSError."""
    shared = _intersect([result["settings"] for result in results])
    runs = [_round(result | {"settings": _subtract(result["settings"], shared)}) for result in results]
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    text = f'{{"settings": {json.dumps(shared)},\n"runs": [\n{lines}\n]}}\n'
    # A clone has nothing else, so it is never half-written.
    write_durably(output / RESULTS, text.encode())


def _intersect(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all these settings have in common, section by section."""
    shared: dict[str, Any] = {}
    for key, value in settings[0].items():
        if not all(key in other for other in settings):
            continue
        values = [other[key] for other in settings]
        if all(isinstance(entry, dict) for entry in values):
            shared[key] = _intersect(values)
        elif all(entry == value for entry in values):
            shared[key] = value
    return shared


def _subtract(settings: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are not in `shared`."""
    own = {key: value for key, value in settings.items() if key not in shared}
    for key, value in shared.items():
        if isinstance(value, dict) and (rest := _subtract(settings[key], value)):
            own[key] = rest
    return own


def _join(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that _subtract took apart."""
    # Sections of which a part is shared have the rest in `own`.
    both = {key: _join(shared[key], value) for key, value in own.items() if isinstance(shared.get(key), dict)}
    return shared | own | both


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_round(entry) for entry in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
