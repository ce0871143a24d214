"""The measures as text tables and for a JSON file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_sse.inspection.half_life import Spread
from megatron_sse.inspection.measure import Layer, Rank
from megatron_sse.reports.results import table

# Tables with more partitions would be wider than a terminal.
_MOST_COLUMNS = 16
_FIRST = ["layer", "kind"]


def tabulate(layers: Sequence[Layer]) -> str:
    """Return all tables."""
    tables = []
    num_partitions = partitions_of(layers)
    if num_partitions:
        tables.append(_tabulate_use(layers, num_partitions))
    tables += [_tabulate_ends(layers, num_partitions), _tabulate_growth(layers), _tabulate_half_lives(layers)]
    return "\n".join(tables)


def partitions_of(layers: Sequence[Layer]) -> int:
    """Return the largest number of partitions of a layer."""
    return max(len(layer.use.write_share_N) if layer.use else 0 for layer in layers)


def reads_elsewhere(layers: Sequence[Layer]) -> bool:
    """Check whether the shares of reads and writes differ in any layer."""
    return any(layer.use is not None and layer.use.write_share_N != layer.use.read_share_N for layer in layers)


def _tabulate_use(layers: Sequence[Layer], num_partitions: int) -> str:
    shares: list[tuple[str, Callable[[Any], list[float]], Callable[[Any], float]]]
    shares = [("writes", lambda use: use.write_share_N, lambda use: use.written)]
    if reads_elsewhere(layers):
        shares.append(("reads", lambda use: use.read_share_N, lambda use: use.read))
    names = _partition_names(num_partitions)
    tables = []
    for what, share_of, effect_of in shares:
        title = f"partitions: share of the {what if len(shares) > 1 else 'writes and reads'} of each"
        rows = []
        for layer in layers:
            use, cells = layer.use, ["-"] * (len(names) + 2)
            if use is not None:
                share_N = share_of(use)
                cells = [f"{share:.3f}" for share in _shorten(share_N)]
                cells += [f"{effect_of(use):.2f} of {len(share_N)}", f"{use.top_probability:.3f}"]
            rows.append([str(layer.layer), layer.kind, *cells])
        tables.append(table(title, [*_FIRST, *names, "in effect", "top probability"], rows))
    return "\n".join(tables)


def _partition_names(num_partitions: int) -> list[str]:
    """Return the names of the columns that _shorten fills."""
    if num_partitions > _MOST_COLUMNS:
        return ["least", "most"]
    return [str(number) for number in range(1, num_partitions + 1)]


def _shorten(value_N: list[float]) -> list[float]:
    """Return the values of all partitions, or of many partitions only the smallest and the largest."""
    return [min(value_N), max(value_N)] if len(value_N) > _MOST_COLUMNS else value_N


def _tabulate_ends(layers: Sequence[Layer], num_partitions: int) -> str:
    names, rows = _partition_names(num_partitions), []
    for layer in layers:
        ranks = [] if layer.end is None else [layer.end.shared, *_shorten(layer.end.partition_N)]
        cells = [_rank(rank) for rank in ranks]
        rows.append([str(layer.layer), layer.kind, *cells, *["-"] * (1 + len(names) - len(cells))])
    most = max(layer.most or 0 for layer in layers)
    title = f"states: effective rank at the end, of at most {most}"
    return table(title, [*_FIRST, "shared", *names], rows)


def _tabulate_growth(layers: Sequence[Layer]) -> str:
    marks = sorted({rank.tokens for layer in layers for rank in layer.growth})
    rows = []
    for layer in layers:
        found = {rank.tokens: rank for rank in layer.growth}
        rows.append([str(layer.layer), layer.kind, *(_pair(found.get(mark)) for mark in marks)])
    title = "states: effective rank by number of tokens read, shared bank / mean of the partitions"
    return table(title, [*_FIRST, *(f"{mark:,}" for mark in marks)], rows)


def _pair(rank: Rank | None) -> str:
    if rank is None:
        return "-"
    return f"{_rank(rank.shared)} / {_rank(mean_of(rank))}" if rank.partition_N else _rank(rank.shared)


def mean_of(rank: Rank) -> float:
    """Return the mean rank of the partitions."""
    return sum(rank.partition_N) / len(rank.partition_N)


def _rank(rank: float | None) -> str:
    return "-" if rank is None else f"{rank:.2f}"


def _tabulate_half_lives(layers: Sequence[Layer]) -> str:
    rows = []
    for layer in layers:
        found = layer.half_life
        spreads = [None] * 3 if found is None else [found.shared, found.sparse_tokens, found.sparse_writes]
        rows.append([str(layer.layer), layer.kind, *(cell for spread in spreads for cell in _spread(spread))])
    kinds = ("shared, tokens", "partitions, tokens", "partitions, writes")
    header = [name for kind in kinds for name in (f"{kind}: 10 %", "50 %", "90 %")]
    return table("decay: percentiles of half-lives", [*_FIRST, *header], rows)


def _spread(spread: Spread | None) -> list[str]:
    return ["-"] * 3 if spread is None else [show(value) for value in (spread.p10, spread.p50, spread.p90)]


def show(half_life: float) -> str:
    """Return a half-life as text with three digits."""
    if half_life == math.inf:
        return "inf"
    return f"{half_life:,.0f}" if 100 <= half_life < 1e6 else f"{half_life:.3g}"


def to_json(layers: Sequence[Layer]) -> list[Any]:
    """Return the layers as JSON values; infinite half-lives become "inf", since JSON has no such number."""
    return [_plain(asdict(layer)) for layer in layers]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return "inf" if value == math.inf else value
