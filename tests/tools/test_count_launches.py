"""An SSE layer queues as many kernels as it is known to, and each of Triton's fits the GPUs that it is compiled for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# By recurrence and kernel: launches forward, launches backward.
SHARED = {
    "bad_states_kernel": (1, 0),
    "bad_tokens_kernel": (1, 0),
    "conv_backward_kernel": (0, 1),
    "conv_forward_kernel": (1, 0),
    "count_before_spans_kernel": (1, 0),
    "count_picks_kernel": (1, 0),
    "cut_segments_kernel": (1, 0),
    "keep_finite_kernel": (1, 0),
    "mark_rows_kernel": (1, 0),
    "norm_backward_kernel": (0, 1),
    "norm_forward_kernel": (1, 0),
    "offsets_kernel": (1, 0),
    "place_picks_kernel": (1, 0),
    "spoil_rows_kernel": (1, 0),
    "sum_counts_kernel": (1, 0),
    "top_banks_kernel": (1, 0),
    "torch's operators": (6, 13),
}
EXPECTED = {
    "gla": SHARED
    | {
        "gla_inter_kernel": (0, 1),
        "gla_intra_kernel": (0, 2),
        "gla_output_kernel": (1, 0),
        "gla_prepare_kernel": (1, 1),
        "gla_states_kernel": (0, 1),
        "gla_steep_scores_kernel": (1, 1),
        "gla_summarize_kernel": (1, 1),
        "gla_values_kernel": (0, 1),
        "scan_decay_kernel": (1, 1),
        "all": (25, 24),
    },
    "gdn": SHARED
    | {
        "gdn_attend_kernel": (1, 1),
        "gdn_gates_backward_kernel": (0, 1),
        "gdn_gates_kernel": (1, 1),
        "gdn_keys_backward_kernel": (0, 1),
        "gdn_prepare_kernel": (1, 1),
        "gdn_scores_backward_kernel": (0, 1),
        "gdn_states_backward_kernel": (0, 2),
        "gdn_summarize_kernel": (1, 0),
        "normalize_backward_kernel": (0, 1),
        "normalize_kernel": (1, 0),
        "scan_matrix_kernel": (1, 1),
        "all": (26, 25),
    },
    "kda": SHARED
    | {
        "kda_attend_kernel": (1, 1),
        "kda_inter_kernel": (0, 1),
        "kda_intra_kernel": (0, 1),
        "kda_prepare_kernel": (1, 1),
        "kda_scores_backward_kernel": (0, 1),
        "kda_states_backward_kernel": (0, 2),
        "kda_summarize_kernel": (1, 0),
        "normalize_backward_kernel": (0, 1),
        "normalize_kernel": (1, 0),
        "scan_matrix_kernel": (1, 1),
        "all": (25, 24),
    },
}


def count(cache: Path, *options: str) -> tuple[dict[tuple[str, int], dict[str, tuple[int, int]]], list[list[str]]]:
    """Return launches by recurrence, architecture and kernel, and the rows of the table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_sse.tools.count_launches", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^\| (\w+ \| \d+ .*) \|$", done.stdout, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    counts: dict[tuple[str, int], dict[str, tuple[int, int]]] = {}
    for recurrence, arch, kernel, forward, backward, *_ in rows:
        counts.setdefault((recurrence, int(arch)), {})[kernel] = int(forward), int(backward)
    return counts, rows


def test_launches_of_a_layer(tmp_path: Path) -> None:
    counts, _ = count(tmp_path, "--only-count", "--arch", "90")
    assert counts == {(recurrence, 90): kernels for recurrence, kernels in EXPECTED.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dim", ["64", "128"])
def test_every_launch_compiles_and_fits(dim: str, tmp_path: Path) -> None:
    counts, rows = count(tmp_path, "--dim", dim)
    architectures = (80, 90, 100)
    assert counts == {(name, arch): kernels for arch in architectures for name, kernels in EXPECTED.items()}
    assert all(int(row[5].split("/")[0]) > 0 for row in rows if row[2].endswith("_kernel"))
