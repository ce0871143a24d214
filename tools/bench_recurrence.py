"""Benchmark of the chunked recurrences against the token-by-token oracle, on random packed documents."""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_sse.kernels import BankInputs, Routes, route, sse_attention
from megatron_sse.kernels.reference import reference_sse
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

        self.shared, self.sparse = bank(), bank()
        self.v_THV = leaf(torch.randn(tokens, heads, dim))
        self.prob_TN = leaf(torch.randn(tokens, args.partitions).softmax(-1))
        self.grad_o = torch.randn(tokens, heads, dim, dtype=dtype)
        self.picks = args.picks
        # Documents of equal length, packed into one sequence.
        self.offsets_D1 = torch.linspace(0, tokens, args.documents + 1).long()
        self.document_T = torch.repeat_interleave(torch.arange(args.documents), self.offsets_D1.diff())

    def routes(self) -> Routes:
        return route(self.prob_TN, self.picks, self.picks)

    def chunked(self, form: str) -> Tensor:
        packing = (self.offsets_D1, self.document_T)
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


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(f"commit {commit()}, torch {torch.__version__}, python {platform.python_version()}, {cpu_name()}")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(args).items()))
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
