"""A histogram of document lengths by powers of two, for the terminal and as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_BAR = 30


def count_lengths(lengths_D: np.ndarray) -> tuple[dict[int, int], dict[int, int]]:
    """Count documents and tokens by k, for lengths of 2^k to 2^(k+1) - 1, without empty documents."""
    lengths_D = lengths_D[lengths_D > 0].astype(np.int64)
    power_D = np.floor(np.log2(lengths_D)).astype(np.int64)
    documents, tokens = np.bincount(power_D), np.bincount(power_D, weights=lengths_D)
    found = [int(power) for power in np.flatnonzero(documents)]
    return {power: int(documents[power]) for power in found}, {power: int(tokens[power]) for power in found}


def format_lengths(documents: Mapping[int, int], tokens: Mapping[int, int]) -> list[str]:
    """Return a header and a line for each power of two between the shortest and the longest document."""
    powers = range(min(documents), max(documents) + 1)
    all_documents, all_tokens, most = sum(documents.values()), sum(tokens.values()), max(tokens.values())
    lines = [f"{'length in tokens':>25} {'documents':>13} {'':7} {'tokens':>17}"]
    for power in powers:
        count, size = documents.get(power, 0), tokens.get(power, 0)
        span = f"{1 << power:,} to {(2 << power) - 1:,}"
        shares = f"{count:13,} {count / all_documents:7.1%} {size:17,} {size / all_tokens:7.1%}"
        lines.append(f"{span:>25} {shares} {'#' * round(_BAR * size / most)}".rstrip())
    return lines


def draw_lengths(path: Path, title: str, documents: Mapping[int, int], tokens: Mapping[int, int]) -> bool:
    """Write a picture of the histogram and return True; return False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    from megatron_sse.reports.style import save_picture

    powers = range(min(documents), max(documents) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, values, name in ((upper, documents, "documents"), (lower, tokens, "tokens")):
        axes.bar(list(powers), [values.get(power, 0) for power in powers], width=0.9)
        axes.set_ylabel(name)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    labels = [f"{1 << power:,}" for power in powers]
    lower.set_xticks(list(powers), labels, rotation=45, ha="right")
    lower.set_xlabel("length in tokens, from this one to twice as many")
    upper.set_title(title)
    save_picture(figure, path, dpi=120)
    return True
