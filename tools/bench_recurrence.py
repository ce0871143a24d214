"""Benchmark of the chunked recurrences on random packed documents, against the token-by-token oracle.

With --packing, it compares documents as resets inside one span (training) with a span for each document (generation).
With --growth, it compares numbers of partitions: what SSE costs over one pass of its recurrence.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE, choose_chunk_size
from megatron_sse.kernels import BankInputs, Routes, route, sse_attention
from megatron_sse.kernels.reference import reference_sse
from megatron_sse.kernels.routing import join_segments
from megatron_sse.kernels.segments import Spans, cut
from megatron_sse.recurrence import RECURRENCES

# Largest error of the chunked form, relative to the oracle in the same precision, with which times are reported.
TOLERANCE = 1e-4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=4, help="number of documents, of equal length")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=32, help="size of keys and of values, per head")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--picks", type=int, default=1, help="partitions written and read per token")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="repeats of the chunked form")
    parser.add_argument("--oracle-repeats", type=int, default=3)
    parser.add_argument("--least-ratio", type=float, default=0.0, help="exit with 1 below this ratio")
    parser.add_argument("--packing", action="store_true", help="compare numbers of documents and of partitions instead")
    parser.add_argument("--growth", action="store_true", help="compare numbers of partitions instead")
    parser.add_argument("--largest-growth", type=float, default=float("inf"), help="exit with 1 where resets cost more")
    return parser.parse_args()


class Problem:
    """Random inputs of one recurrence; `leaves` take gradients."""

    def __init__(self, recurrence: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, args.dtype)
        tokens, heads, dim = args.tokens, args.heads, args.dim
        facts = RECURRENCES[recurrence]
        self.leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            self.leaves.append(x.to(dtype).requires_grad_())
            return self.leaves[-1]

        def bank() -> BankInputs:
            q, k = leaf(torch.randn(tokens, heads, dim)), leaf(torch.randn(tokens, heads, dim).softmax(-1))
            decays = torch.randn(tokens, heads, *(dim,) * facts.channel_decay)
            g = leaf(torch.nn.functional.logsigmoid(decays) / 16)
            return BankInputs(q, k, g, leaf(torch.rand(tokens, heads)) if facts.delta_rule else None)

        self.shared, self.sparse = bank(), bank() if args.partitions else None
        self.v_THV = leaf(torch.randn(tokens, heads, dim))
        self.prob_TN = leaf(torch.randn(tokens, args.partitions).softmax(-1)) if args.partitions else None
        self.grad_o = torch.randn(tokens, heads, dim, dtype=dtype)
        self.picks = args.picks
        # Documents of equal length, packed into one sequence.
        self.offsets_D1 = torch.linspace(0, tokens, args.documents + 1).long()
        self.document_T = torch.repeat_interleave(torch.arange(args.documents), self.offsets_D1.diff())

    def routes(self) -> Routes | None:
        return None if self.prob_TN is None else route(self.prob_TN, self.picks, self.picks)

    def spans(self, resets: bool) -> Spans:
        """Return one span in which documents are resets, or a span for each document."""
        if resets:
            whole = torch.stack((self.offsets_D1[0], self.offsets_D1[-1]))
            return Spans(whole, torch.zeros_like(self.document_T), self.document_T)
        return Spans(self.offsets_D1, self.document_T)

    def chunked(self, form: str, resets: bool = True) -> Tensor:
        spans = self.spans(resets)
        packing = (spans.offsets_Y1, spans.span_T, spans.document_T)
        return sse_attention(self.shared, self.sparse, self.v_THV, self.routes(), *packing, form=form).o_THV

    def oracle(self) -> Tensor:
        return reference_sse(self.shared, self.sparse, self.v_THV, self.routes(), self.offsets_D1)[0]

    def seconds(self, function: Callable[[], Tensor], backward: bool) -> float:
        """Return the processor time, since on a shared machine wall-clock time includes other processes."""
        start = time.process_time()
        with torch.set_grad_enabled(backward):
            o = function()
        if backward:
            torch.autograd.grad(o, self.leaves, self.grad_o)
        return time.process_time() - start

    def num_chunks(self, resets: bool) -> tuple[int, int]:
        """Return the chunks of the torch form, and of the Triton kernels."""
        spans, routes = self.spans(resets), self.routes()
        picks = 0 if routes is None else self.picks
        segments = spans.segments() if routes is None else join_segments(routes.bank_TP, spans, routes.num_partitions)
        rows = len(self.v_THV) * (1 + picks)
        of_torch = cut(segments, rows, choose_chunk_size(rows, segments.num_segments), only_used=True)
        return len(of_torch.start_M), len(cut(segments, rows, CHUNK_SIZE).start_M)

    def kept_bytes(self, resets: bool) -> int:
        """Return the bytes that a forward pass keeps for backward, without the inputs."""
        known = {leaf.untyped_storage().data_ptr() for leaf in self.leaves}
        storages: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in known:
                storages[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            o = self.chunked("varlen", resets)
        assert o.requires_grad
        return sum(x.untyped_storage().nbytes() for x in storages.values())


def check(problem: Problem, form: str) -> None:
    """Exit where the chunked form is wrong, since then its speed means nothing."""
    with torch.no_grad():
        expected, actual = problem.oracle(), problem.chunked(form)
    error = ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    if not error < TOLERANCE:
        raise SystemExit(f"{form} differs from the oracle by {error:.1e} (RMS), allowed {TOLERANCE:.0e}")


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def measure(problem: Problem, recurrence: str, backward: bool, args: argparse.Namespace) -> list[float]:
    """Print a line for each form and return the ratios."""
    oracle_ms = 1e3 * statistics.median(problem.seconds(problem.oracle, backward) for _ in range(args.oracle_repeats))
    ratios = []
    for form in ("varlen", "mask"):
        check(problem, form)
        chunked = partial(problem.chunked, form)
        problem.seconds(chunked, backward)  # warms up
        times_ms = [1e3 * problem.seconds(chunked, backward) for _ in range(args.repeats)]
        p10, median, p90 = (statistics.quantiles(times_ms, n=10)[i] for i in (0, 4, 8))
        ratios.append(oracle_ms / median)
        step = "forward + backward" if backward else "forward"
        times = f"{median:.0f} ({p10:.0f}, {p90:.0f}) | {oracle_ms:.0f} | {ratios[-1]:.0f}"
        print(f"| {recurrence} | {form} | {step} | {times} |", flush=True)
    return ratios


def compare_packings(args: argparse.Namespace) -> None:
    """Print a line for each number of partitions and documents; exit with 1 where resets grow more than allowed."""
    print(
        "\n| recurrence | N | documents | ms: spans, resets | MiB kept: spans, resets | chunks: spans, resets", end=""
    )
    print(" | Triton's chunks: spans, resets |\n|---|---|---|---|---|---|---|")
    worst = 0.0
    for recurrence, args.partitions in product(RECURRENCES, (0, 4, 64)):
        problems = {}
        for args.documents in (1, 16, 128):
            problems[args.documents] = Problem(recurrence, args)
        times: dict[tuple[int, bool], list[float]] = {}
        # In turn, since other processes come and go.
        for repeat, (documents, problem), resets in product(range(args.repeats + 1), problems.items(), (False, True)):
            seconds = problem.seconds(partial(problem.chunked, "varlen", resets), backward=True)
            if repeat:  # the first one warms up
                times.setdefault((documents, resets), []).append(1e3 * seconds)
        costs: dict[tuple[int, bool], tuple[float, ...]] = {}
        for documents, problem in problems.items():
            for resets in (False, True):
                sizes = problem.kept_bytes(resets) / 2**20, *problem.num_chunks(resets)
                # The least of the times: on a shared machine others only add to it.
                costs[documents, resets] = (min(times[documents, resets]), *sizes)
            pairs = zip(costs[documents, False], costs[documents, True], strict=True)
            cells = " | ".join(f"{spans:,.0f}, {resets:,.0f}" for spans, resets in pairs)
            print(f"| {recurrence} | {args.partitions} | {documents} | {cells} |", flush=True)
            growth = [now / alone for now, alone in zip(costs[documents, True], costs[1, True], strict=True)]
            worst = max(worst, *growth)
    print(f"\nAgainst one document, resets cost at most {worst:.2f} times the time, bytes or chunks.")
    if worst > args.largest_growth:
        raise SystemExit(f"allowed {args.largest_growth:g}")


def compare_partitions(args: argparse.Namespace) -> None:
    """Print a line for each recurrence and number of partitions."""
    print("\n| recurrence | N | CPU ms: median (p10, p90) | ratio to N = 0 | chunks |\n|---|---|---|---|---|")
    for recurrence in RECURRENCES:
        problems = {}
        for args.partitions in (0, 4, 16, 64):
            problems[args.partitions] = Problem(recurrence, args)
            check(problems[args.partitions], "varlen")
        times: dict[int, list[float]] = {number: [] for number in problems}
        # In turn, since other processes come and go.
        for repeat, (number, problem) in product(range(args.repeats + 1), problems.items()):
            seconds = problem.seconds(partial(problem.chunked, "varlen"), backward=True)
            if repeat:  # the first one warms up
                times[number].append(1e3 * seconds)
        for number, problem in problems.items():
            p10, median, p90 = (statistics.quantiles(times[number], n=10)[i] for i in (0, 4, 8))
            ratio = statistics.median(x / one for x, one in zip(times[number], times[0], strict=True))
            chunks, _ = problem.num_chunks(resets=True)
            print(
                f"| {recurrence} | {number} | {median:.0f} ({p10:.0f}, {p90:.0f}) | {ratio:.2f} | {chunks} |",
                flush=True,
            )


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(f"commit {commit()}, torch {torch.__version__}, python {platform.python_version()}, {cpu_name()}")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(args).items()))
    if args.packing:
        return compare_packings(args)
    if args.growth:
        return compare_partitions(args)
    print("\n| recurrence | form | pass | chunked CPU ms: median (p10, p90) | oracle CPU ms: median | ratio |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for recurrence in RECURRENCES:
        problem = Problem(recurrence, args)
        for backward in (False, True):
            ratios += measure(problem, recurrence, backward, args)
    if min(ratios) < args.least_ratio:
        raise SystemExit(f"lowest ratio {min(ratios):.1f}, required {args.least_ratio:g}")


if __name__ == "__main__":
    main()
