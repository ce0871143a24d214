"""Counts the kernels that an SSE layer queues on a GPU, without one; Triton's are compiled as they are really made.

    python -m megatron_sse.tools.count_launches [--arch 80 90 100] [--tokens 4096] [--heads 16] [--dim 128]
        [--only-count] [--output X]

The layer's convolution, routing, attention, norm and gate run forward and backward on fake CUDA tensors, with documents
that start inside the tokens, as in training. Projections and activations are not counted. A stand-in for
Triton's driver compiles every launch with its own types, alignment and specialisation. A launch that needs more shared
memory than the GPU has ends the program, as it would there. Exit status 1 if anything would make the host wait. Needs
a CPU build of torch, and g++ the first time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sse.errors import USER_ERROR_EXIT, UserError
from megatron_sse.recurrence import RECURRENCES
from megatron_sse.tools.rehearsal.guard import load_guard

if TYPE_CHECKING:
    from megatron_sse.tools.rehearsal.launches import Launches

COLUMNS = ("recurrence", "sm", "kernel", "forward", "backward", "warps", "shared")
PARTITIONS, PICKS, CONVOLUTION, DOCUMENT = 4, 1, 4, 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    all_gpus, kernels = (80, 90, 100), tuple(RECURRENCES)
    parser.add_argument("--arch", type=int, nargs="+", choices=all_gpus, default=all_gpus, help="compute capabilities")
    parser.add_argument("--recurrences", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the layer (default: 4096)")
    parser.add_argument("--heads", type=int, default=16, help="heads (default: 16)")
    parser.add_argument("--dim", type=int, default=128, help="channels of keys and values of a head (default: 128)")
    parser.add_argument("--only-count", action="store_true", help="do not compile; warps and shared memory are 0")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: the console)")
    options = parser.parse_args()
    try:
        load_guard()
    except UserError as error:
        print(f"count_launches: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    rows: list[tuple] = []
    waits: list[str] = []
    # An architecture at a time, each in its own process: the planners of launches ask for it once.
    for arch in options.arch:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            more_rows, more_waits = pool.apply(count, (arch, options))
        rows, waits = rows + more_rows, waits + more_waits
    size = f"{options.tokens} tokens, {options.heads} heads of {options.dim}"
    text = table(rows, f"{size}, {PARTITIONS} partitions, {PICKS} pick, bf16")
    if options.output:
        options.output.write_text(f"# Launches of a layer\n\n{text}")
    else:
        print(text)
    print(*waits, sep="\n", end="", file=sys.stderr)
    return 1 if waits else 0


def count(arch: int, options: argparse.Namespace) -> tuple[list[tuple], list[str]]:
    """Return the rows of the table for one architecture, and what makes the host wait."""
    os.environ.update(TRITON_INTERPRET="0", TORCHDYNAMO_DISABLE="1")
    from megatron_sse.tools.rehearsal.cuda import GPUS, install_cuda
    from megatron_sse.tools.rehearsal.findings import Findings

    findings = Findings()
    install_cuda(GPUS[arch], 1, findings.note)
    import torch

    from megatron_sse.tools.rehearsal.launches import Launches
    from megatron_sse.tools.rehearsal.watch import Watch

    torch.autograd.set_multithreading_enabled(False)
    launches = Launches()
    launches.install(GPUS[arch], compile=not options.only_count)
    rows = []
    for recurrence in options.recurrences:
        launches.counts.clear()
        operators: Counter[bool] = Counter()

        def count_operator(name: str, operators: Counter[bool] = operators) -> None:
            operators[torch._C._current_graph_task_id() != -1] += 1

        with Watch(findings, count_operator):
            run_layer(recurrence, options.tokens, options.heads, options.dim, operators.clear)
        rows += [(recurrence, arch, *row) for row in by_kernel(launches)]
        rows.append((recurrence, arch, "torch's operators", operators[False], operators[True], "", 0))
    return rows, list(findings.report())


def run_layer(recurrence: str, tokens: int, heads: int, dim: int, start: Callable[[], object]) -> None:
    """Run what a layer launches, forward and backward; `start` is called once its inputs are made."""
    import torch

    from megatron_sse.kernels import BankInputs, gated_norm, route, short_convolution, sse_attention

    facts = RECURRENCES[recurrence]

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device="cuda", requires_grad=True)

    def bank() -> BankInputs:
        gates = (tokens, heads, dim) if facts.channel_decay else (tokens, heads)
        beta = leaf(tokens, heads, dtype=torch.float32) if facts.delta_rule else None
        q, k = (leaf(tokens, heads, dim) for _ in range(2))
        return BankInputs(q, k, leaf(*gates, dtype=torch.float32), beta)

    def convolved(x_THK: torch.Tensor) -> torch.Tensor:
        return short_convolution(x_THK.flatten(1), weight, position_T).view_as(x_THK)

    position_T, span_T = torch.arange(tokens, device="cuda"), torch.zeros(tokens, dtype=torch.int64, device="cuda")
    document_T = position_T // DOCUMENT
    offsets_Y1 = torch.empty(2, dtype=torch.int64, device="cuda")
    shared, sparse, v_THV = bank(), bank(), leaf(tokens, heads, dim)
    logits_TN = leaf(tokens, PARTITIONS, dtype=torch.float32)
    weight_V, gate_THV, grad_THV = leaf(dim), leaf(tokens, heads, dim), leaf(tokens, heads, dim).detach()
    weight = leaf(heads * dim, CONVOLUTION)
    start()
    shared = BankInputs(convolved(shared.q_THK), shared.k_THK, shared.g, shared.beta_TH)
    routes = route(logits_TN.softmax(-1), PICKS, PICKS)
    banks = sse_attention(shared, sparse, v_THV, routes, offsets_Y1, span_T, document_T)
    out_THV = gated_norm(banks.shared_THV, banks.picked_TPHV, weight_V, gate_THV, 1e-5)
    out_THV.backward(grad_THV)


def by_kernel(launches: Launches) -> list[tuple[str, int, int, str, int]]:
    """Return rows: kernel, launches forward and backward, warps of each variant, most shared memory."""
    rows = []
    for kernel in sorted({launch.kernel for launch in launches.counts}):
        own = {launch: number for launch, number in launches.counts.items() if launch.kernel == kernel}
        forward = sum(number for launch, number in own.items() if not launch.backward)
        warps = "/".join(map(str, sorted({launch.warps for launch in own})))
        rows.append((kernel, forward, sum(own.values()) - forward, warps, max(launch.shared for launch in own)))
    return rows


def table(rows: list[tuple], size: str) -> str:
    """Return a markdown table, with a line of sums for each recurrence and architecture."""
    lines = [f"Launches of one layer, {size}; bytes of shared memory of a block.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for key in dict.fromkeys(row[:2] for row in rows):
        own = [row for row in rows if row[:2] == key]
        sums = (*key, "all", sum(row[3] for row in own), sum(row[4] for row in own), "", max(row[6] for row in own))
        lines += [f"| {' | '.join(map(str, row))} |" for row in [*own, sums]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
