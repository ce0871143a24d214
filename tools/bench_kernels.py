"""Benchmark of SSE attention on a GPU: time and peak memory beside other implementations, in one run.

    python -m megatron_sse.tools.bench_kernels [--fla DIR] [--shapes 16x128,8x256] [--tokens 4096,...] [--output X.md]

--fla: a checkout of flash-linear-attention with the SSE authors' layers (its pull request 882); without one, only an
installed flash-linear-attention's kernels for one state are measured. A wrong result is not timed.
"""

import argparse
import importlib.util
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from megatron_sse.kernels import BankInputs, route, sse_attention
from megatron_sse.recurrence import RECURRENCES
from megatron_sse.tools.bench_recurrence import commit

# Largest relative RMS error against fp64 with which a bf16 result is still timed.
TOLERANCE = 2e-2
CHECKED_TOKENS = 512


@dataclass(frozen=True)
class Shape:
    """Sizes of one sequence and layer; picks: number of partitions written and read per token."""

    tokens: int
    heads: int
    dim: int
    partitions: int
    picks: int
    recurrence: str


class Problem:
    """Random inputs of a layer's attention: bf16, gates and router fp32. `leaves` take gradients."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.shape, facts = shape, RECURRENCES[shape.recurrence]
        self.leaves: list[Tensor] = []
        size = (shape.tokens, shape.heads, shape.dim)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        def leaf(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            self.leaves.append(x.to(dtype).requires_grad_())
            return self.leaves[-1]

        def bank() -> BankInputs:
            q, k = leaf(normal(*size)), leaf(normal(*size).softmax(-1))
            gates = torch.promote_types(dtype, torch.float32)
            g = leaf(logsigmoid(normal(*(size if facts.channel_decay else size[:2]))) / 16, gates)
            return BankInputs(q, k, g, leaf(normal(*size[:2]).sigmoid(), gates) if facts.delta_rule else None)

        self.shared, self.sparse, self.v_THV = bank(), bank(), leaf(normal(*size))
        self.logit_TN = leaf(normal(shape.tokens, shape.partitions), torch.promote_types(dtype, torch.float32))
        self.grad_o = normal(*size).to(dtype)
        self.offsets_D1 = torch.tensor([0, shape.tokens], device=device)
        self.document_T = torch.zeros(shape.tokens, dtype=torch.int64, device=device)

    def ours(self, form: str) -> Tensor:
        routes = route(self.logit_TN.softmax(-1), self.shape.picks, self.shape.picks)
        packing = (self.offsets_D1, self.document_T)
        return sse_attention(self.shared, self.sparse, self.v_THV, routes, *packing, form=form).o_THV

    def authors(self, layer: torch.nn.Module) -> Tensor:
        """Return the output of the authors' attention, without their layer's projections."""
        pairs = [x for pair in zip(self.shared.tensors, self.sparse.tensors, strict=True) for x in pair]
        inputs = (*pairs[:4], self.v_THV, *pairs[4:], self.logit_TN)
        return layer.sse_linear_attention_varlen(*(x[None] for x in inputs))[0][0]  # type: ignore[operator]

    def one_state(self, function: Callable) -> Tensor:
        """Return the output of the shared bank alone, whose time is the unit for the others."""
        bank = self.shared
        arguments = [x[None] for x in (bank.q_THK, bank.k_THK, self.v_THV, bank.g)]
        if bank.beta_TH is not None:
            return function(*arguments, beta=bank.beta_TH[None], use_qk_l2norm_in_kernel=True)[0][0]
        return function(*arguments)[0][0]

    def softmax(self, backend: SDPBackend) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (self.shared.q_THK, self.shared.k_THK, self.v_THV))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


def contenders(shape: Shape, device: str) -> dict[str, Callable[[Problem], Tensor]]:
    """Return the implementations that can be measured here, by name."""
    found: dict[str, Callable[[Problem], Tensor]] = {
        f"ours, {form}": partial(Problem.ours, form=form) for form in ("varlen", "mask")
    }
    if device != "cuda":
        return found
    if importlib.util.find_spec("fla") is not None:
        module, name = {
            "gla": ("fla.ops.gla", "chunk_gla"),
            "gdn": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        }[shape.recurrence]
        function = getattr(importlib.import_module(module), name)
        found[f"fla {name}, one state"] = partial(Problem.one_state, function=function)
        found |= _authors(shape)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        found[f"softmax, {backend.name.split('_')[0].lower()}"] = partial(Problem.softmax, backend=backend)
    return found


def _authors(shape: Shape) -> dict[str, Callable[[Problem], Tensor]]:
    try:
        layers = importlib.import_module("fla.layers.sse")
    except ImportError:
        return {}
    layer = {"gla": layers.SSEGLA, "gdn": layers.SSEGDN}[shape.recurrence](
        hidden_size=shape.heads * shape.dim,
        head_dim=shape.dim,
        num_heads=shape.heads,
        num_sparse_partition=shape.partitions,
        num_writer=shape.picks,
        num_reader=shape.picks,
    )
    return {"authors, varlen": partial(Problem.authors, layer=layer.cuda().bfloat16())}


def error_of(form: str, shape: Shape, device: str) -> float:
    """Return the worst RMS error of the output and the gradients against fp64 on the same inputs."""
    # fp64 is slow and large, so the check uses the start of the sequence.
    short = Shape(min(shape.tokens, CHECKED_TOKENS), *list(vars(shape).values())[1:])
    problem, exact = Problem(short, device), Problem(short, device, torch.float64)
    for rounded, x in zip(problem.leaves, exact.leaves, strict=True):
        x.data = rounded.data.double()
    results = []
    for each in (problem, exact):
        o = each.ours(form)
        results.append((o, *torch.autograd.grad(o, each.leaves, problem.grad_o.to(o.dtype))))
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(*results, strict=True)]
    return max(x.item() for x in errors)


def measure(run: Callable[[Problem], Tensor], problem: Problem, backward: bool) -> tuple[list[float], float]:
    """Return median, p10 and p90 of the time in ms, and the peak memory in GiB on top of the inputs."""
    from triton.testing import do_bench

    def step() -> None:
        with torch.set_grad_enabled(backward):
            o = run(problem)
        if backward:
            torch.autograd.grad(o, problem.leaves, problem.grad_o, allow_unused=True)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return do_bench(step, warmup=50, rep=400, quantiles=[0.5, 0.1, 0.9]), peak


def rows_of(shape: Shape, device: str) -> list[str]:
    """Return a table row per implementation and pass; ratios are to one state of flash-linear-attention."""
    for form in ("varlen", "mask"):
        error = error_of(form, shape, device)
        if not error < TOLERANCE:
            return [f"| {shape} | ours, {form} | not timed: error {error:.1e}, allowed {TOLERANCE:.0e} |||||"]
    rows = []
    problem = Problem(shape, device)
    for backward in (False, True):
        unit = math.nan
        timed: dict[str, str | tuple[float, ...]] = {}
        for name, run in contenders(shape, device).items():
            if device != "cuda":
                timed[name] = "| not timed: no GPU ||||"
                continue
            try:
                (median, p10, p90), peak = measure(run, problem, backward)
            except (RuntimeError, AssertionError, TypeError) as error:
                timed[name] = f"| failed: {str(error).splitlines()[0][:80]} ||||"
                continue
            # Ratios are to this implementation, which is measured with the others.
            unit = median if "one state" in name else unit
            timed[name] = (median, p10, p90, peak)
        for name, x in timed.items():
            cells = x
            if not isinstance(x, str):
                cells = f"| {x[0]:.3f} | {x[1]:.3f} | {x[2]:.3f} | {x[0] / unit:.2f} | {x[3]:.2f} |"
            sizes = f"{shape.recurrence} H{shape.heads} D{shape.dim} n{shape.partitions}k{shape.picks} {shape.tokens:,}"
            rows.append(f"| {sizes} | {'forward + backward' if backward else 'forward'} | {name} {cells}")
            print(rows[-1], flush=True)
    return rows


def roofline(shape: Shape) -> list[str]:
    """Return a table of our kernels: time in a step, bytes, FLOP, and the larger share of the two ceilings."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_sse.kernels.triton.work import gdn_work, gla_work

    problem, repeats = Problem(shape, "cuda"), 10

    def step() -> None:
        torch.autograd.grad(problem.ours("varlen"), problem.leaves, problem.grad_o)

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total * 1e-6 / repeats for event in profiled.key_averages()}
    sizes = (shape.tokens * (1 + shape.picks), shape.heads, shape.dim, shape.dim, torch.bfloat16)
    work = gla_work(sizes[0], shape.heads, *sizes[1:]) if shape.recurrence == "gla" else gdn_work(*sizes)
    bytes_per_second, flops_per_second = _ceilings()
    rows = [
        "",
        f"{shape}; copy {bytes_per_second / 1e12:.2f} TB/s, bf16 product {flops_per_second / 1e12:.0f} TFLOP/s",
        "",
        "| kernel | ms | GB | GFLOP | share of the ceiling |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        moved, computed = work.get(name, (0, 0))
        share = max(moved / bytes_per_second, computed / flops_per_second) / seconds if seconds else 0.0
        rows.append(f"| {name[:60]} | {1e3 * seconds:.3f} | {moved / 1e9:.2f} | {computed / 1e9:.0f} | {share:.0%} |")
    return rows


def _ceilings() -> tuple[float, float]:
    """Measure bytes per second of a copy (read plus written) and FLOP per second of a large bf16 product."""
    from triton.testing import do_bench

    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    product_ms = do_bench(lambda: a @ b, return_mode="median")
    return 2 * source.nbytes / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3


def host_time(shape: Shape, repeats: int = 20) -> list[str]:
    """Return lines with the time in which the host queues a layer's attention, next to that with the GPU's work."""
    problem, lines = Problem(shape, "cuda"), []
    for name, run in (
        ("forward", lambda: problem.ours("varlen")),
        ("forward + backward", lambda: torch.autograd.grad(problem.ours("varlen"), problem.leaves, problem.grad_o)),
    ):
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize()
        done = time.perf_counter() - begin
        lines.append(f"{shape}, {name}: host {1e6 * queued / repeats:.0f} us, GPU {1e6 * done / repeats:.0f} us")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fla", type=Path)
    parser.add_argument("--recurrences", default="gla,gdn")
    parser.add_argument("--shapes", default="16x128,8x256", help="heads x dim")
    parser.add_argument("--tokens", default="4096,16384,65536,131072")
    parser.add_argument("--banks", default="4x1,4x2,16x1,16x2", help="partitions x picks")
    parser.add_argument("--roofline", action="store_true", help="also compare the time of each kernel with its ceiling")
    parser.add_argument("--host-time", action="store_true", help="only the time in which the host queues the launches")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.fla is not None:
        sys.path.insert(0, str(options.fla))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    lines = [f"commit {commit()}, torch {torch.__version__}, python {platform.python_version()}, {name}", ""]
    lines += ["| sizes | pass | what | ms | p10 | p90 | per state | GiB |", "|---|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for recurrence in options.recurrences.split(","):
        for heads, dim in (map(int, x.split("x")) for x in options.shapes.split(",")):
            for partitions, picks in (map(int, x.split("x")) for x in options.banks.split(",")):
                for tokens in map(int, options.tokens.split(",")):
                    shape = Shape(tokens, heads, dim, partitions, picks, recurrence)
                    if options.host_time:
                        print(*host_time(shape), sep="\n", flush=True)
                    else:
                        lines += rows_of(shape, device)
            if options.roofline and device == "cuda":
                tokens, (partitions, picks) = max(map(int, options.tokens.split(","))), (4, 1)
                lines += roofline(Shape(tokens, heads, dim, partitions, picks, recurrence))
                print("\n".join(lines[-12:]), flush=True)
    if options.output is not None:
        options.output.write_text("# SSE attention on a GPU\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
