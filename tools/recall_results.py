"""Results of the study of recall: one file in each run's folder, and all in results.json, which a clone has alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sse.errors import UserError
from megatron_sse.tools.recall_arms import ARMS

RESULT, RESULTS = "result.json", "results.json"
Result = dict[str, Any]


def find_results(output: Path) -> dict[tuple[str, int], Result]:
    """Results by arm and seed, arms in their order; a run's own file goes before results.json. Raises UserError."""
    path, found = output / RESULTS, {}
    if path.is_file():
        try:
            found = {(result["arm"], result["seed"]): result for result in json.loads(path.read_text())["runs"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--output: {path} is not what the study writes; remove it, or give another folder"
            ) from None
    for file in output.glob(f"*/seed_*/{RESULT}"):
        result = json.loads(file.read_text())
        found[result["arm"], result["seed"]] = result
    # Arms that the study no longer has are left out.
    return {(arm, seed): found[arm, seed] for arm in ARMS for seed in sorted(s for a, s in found if a == arm)}


def read_results(output: Path) -> dict[str, list[Result]]:
    """Results of each arm by seed. Raises UserError where there is none."""
    found: dict[str, list[Result]] = {}
    for (arm, _), result in find_results(output).items():
        found.setdefault(arm, []).append(result)
    if not found:
        raise UserError(f"--output: {output} has no results")
    return found
