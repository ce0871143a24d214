"""Benchmark of generation: time and memory per token at several context lengths, and over one very long prompt."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_sse.config import RunConfig
from megatron_sse.inference.cache import Cache
from megatron_sse.inference.run import feed, logits_of, prefill
from megatron_sse.model import build_model
from megatron_sse.model.attention import TorchAttention
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.device import Device
from megatron_sse.pretrained.network import inference_groups
from megatron_sse.pretrained.open import make_run_config
from megatron_sse.tools.bench_recurrence import commit, cpu_name

SOFTMAX = {"num_heads": 4, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "sse (gla)": {"layers": "sse"},
    "sse (gdn)": {"layers": "sse", "sse": {"recurrence": "gdn"}},
    "gla": {"layers": "gla"},
    "5:1, window 512": {"layers": "5*sse, softmax", "softmax": SOFTMAX | {"window": 512}},
    "5:1": {"layers": "5*sse, softmax", "softmax": SOFTMAX},
    "softmax": {"layers": "softmax", "softmax": SOFTMAX},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[1024, 8192, 65536], help="context lengths in tokens, ascending"
    )
    parser.add_argument("--steps", type=int, default=200, help="tokens timed at each context")
    parser.add_argument("--prompt", type=int, default=1 << 20, help="tokens of the long prompt; 0 for none")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=16, help="size of keys and of values, per head")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    return parser.parse_args()


def make_config(name: str, args: argparse.Namespace) -> RunConfig:
    sse = {"num_heads": args.heads, "head_dim": args.dim, "short_convolution": 4}
    settings = MODELS[name]
    model = {"num_layers": args.layers, "hidden_size": args.hidden, "vocab_size": 257, **settings}
    model["sse"] = sse | settings.get("sse", {})
    return make_run_config(model, 2048, "fp32", "bench_generation")


def clock(device: Device) -> Callable[[], float]:
    """Return a clock: processor time on a CPU, since on a shared machine wall-clock time includes other processes."""
    if device.type == "cpu":
        return time.process_time

    def read() -> float:
        device.synchronize()
        return time.perf_counter()

    return read


def time_tokens(net: LanguageModel, device: Device, args: argparse.Namespace) -> list[dict[str, float]]:
    """Return a row for each context length: milliseconds per token and size of the cache.

    The contexts take turns token by token, so that whatever slows the machine down slows all of them alike.
    """
    tokens = torch.randint(257, (args.contexts[-1],), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    caches = []
    for context in args.contexts:
        caches.append(Cache(net, 1))
        prefill(net, caches[-1], [tokens[:context].tolist()], args.chunk)
    read = clock(device)
    times: list[list[float]] = [[] for _ in caches]
    for step in range(args.steps + 10):
        for cache, spent in zip(caches, times, strict=True):
            start = read()
            logits_of(net, feed(net, cache, tokens[step : step + 1], [0], [1]))
            spent.append(1e3 * (read() - start))
    rows: list[dict[str, float]] = []
    for context, cache, spent in zip(args.contexts, caches, times, strict=True):
        cuts = statistics.quantiles(spent[10:], n=10)  # the first ten warm up
        row = {"context": context, "ms": cuts[4], "p10": cuts[0], "p90": cuts[8], "cache_bytes": cache.num_bytes}
        rows.append(row | {"ratio": cuts[4] / rows[0]["ms"] if rows else 1.0})
    return rows


def time_prompt(net: LanguageModel, device: Device, args: argparse.Namespace) -> list[dict[str, float]]:
    """Return rows of time and peak memory while reading one long prompt: at 1/8, 1/4, 1/2 and all of it."""
    generator = torch.Generator("cpu").manual_seed(0)
    cache, read = Cache(net, 1), clock(device)
    rows: list[dict[str, float]] = []
    start = read()
    marks = [args.prompt >> halvings for halvings in (3, 2, 1, 0)]
    for mark in marks:
        part = torch.randint(257, (mark - cache.lengths[0],), generator=generator, device="cpu").tolist()
        logits = prefill(net, cache, [part], args.chunk)
        # Wrong results are not timed.
        assert logits.isfinite().all()
        seconds = read() - start
        row = {"tokens": mark, "seconds": seconds, "peak_bytes": device.peak_memory_bytes()}
        rows.append(row | {"cache_bytes": cache.num_bytes})
    return rows


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    about = {
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }
    print(json.dumps(about))
    results: dict[str, Any] = {"about": about, "tokens": {}, "prompt": {}}
    with inference_groups() as (groups, device):
        print(f"{device.description}\n")
        nets = {}
        for name in args.models:
            [nets[name]] = build_model(make_config(name, args), groups, device, core_attention=TorchAttention)
            nets[name].eval()
        if args.prompt:
            # Measured first, since the process's peak memory never falls.
            print("| model | tokens of the prompt | s | peak memory MB | cache MB |\n|---|---|---|---|---|")
            name = args.models[0]
            results["prompt"][name] = rows = time_prompt(nets[name], device, args)
            for row in rows:
                sizes = f"{row['peak_bytes'] / 1e6:.0f} | {row['cache_bytes'] / 1e6:.3f}"
                print(f"| {name} | {row['tokens']} | {row['seconds']:.0f} | {sizes} |")
        print(
            "\n| model | context | ms a token: median (p10, p90) | over the first | cache MB |\n|---|---|---|---|---|"
        )
        for name, net in nets.items():
            results["tokens"][name] = rows = time_tokens(net, device, args)
            for row in rows:
                spent = f"{row['ms']:.2f} ({row['p10']:.2f}, {row['p90']:.2f}) | {row['ratio']:.2f}"
                print(f"| {name} | {row['context']} | {spent} | {row['cache_bytes'] / 1e6:.3f} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
