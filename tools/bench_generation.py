"""Benchmark of generation: time and memory per token at several context lengths, and over one very long prompt.

With --llama it compares a model of softmax layers with transformers' Llama of the same sizes instead.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_sse.config import RunConfig
from megatron_sse.hf.dense_settings import model_to_dense
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
    parser.add_argument(
        "--llama", action="store_true", help="compare with Llama: prefill at --contexts, then decoding at --batches"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
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


def interleave(ours: Callable[[], object], theirs: Callable[[], object], device: Device, times: int) -> list[float]:
    """Call both in turns; return the median of the milliseconds of each, and of their ratios."""
    read, spent = clock(device), []
    for _ in range(times + 2):
        start = read()
        ours()
        middle = read()
        theirs()
        spent.append((1e3 * (middle - start), 1e3 * (read() - middle)))
    # The first two warm up.
    rows = [(own, other, own / other) for own, other in spent[2:]]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


@torch.no_grad()
def compare_with_llama(args: argparse.Namespace, groups: Any, device: Device) -> list[dict[str, Any]]:
    """Return rows of prefill and of a decode step, ours and transformers' Llama of the same sizes in turns."""
    # transformers is an extra.
    from transformers import LlamaConfig, LlamaForCausalLM

    model = {"num_layers": args.layers, "hidden_size": args.hidden, "vocab_size": 1024, "layers": "softmax"}
    model["softmax"] = {"num_heads": args.heads, "head_dim": args.dim}
    config = make_run_config(model, max(args.contexts), "fp32", "bench_generation")
    [net] = build_model(config, groups, device, core_attention=TorchAttention)
    settings = model_to_dense(config.model, "llama", max(args.contexts) + args.steps + 2)
    llama = LlamaForCausalLM(LlamaConfig(**settings)).eval().to(device.type)
    net.eval()
    numbers = [sum(parameter.numel() for parameter in each.parameters()) for each in (net, llama)]
    assert numbers[0] == numbers[1], numbers
    rows: list[dict[str, Any]] = []
    for context in args.contexts:
        tokens = torch.randint(1024, (1, context), device=device.type)
        prompt = tokens[0].tolist()
        measured = interleave(
            lambda prompt=prompt: prefill(net, Cache(net, 1), [prompt], args.chunk),  # type: ignore[misc]
            lambda tokens=tokens: llama(tokens, use_cache=True, logits_to_keep=1),  # type: ignore[misc]
            device,
            3,
        )
        rows.append({"what": f"prefill {context}", **dict(zip(("ours", "llama", "ratio"), measured, strict=True))})
    context = min(args.contexts)
    for batch in args.batches:
        tokens, places = torch.randint(1024, (batch, context), device=device.type), list(range(batch))
        cache, new_T = Cache(net, batch), tokens[:, 0]
        prefill(net, cache, tokens.tolist(), args.chunk)
        kept = llama(tokens, use_cache=True, logits_to_keep=1).past_key_values
        measured = interleave(
            lambda: logits_of(net, feed(net, cache, new_T, places, [1] * batch)),  # noqa: B023
            lambda: llama(new_T[:, None], past_key_values=kept, use_cache=True),  # noqa: B023
            device,
            args.steps,
        )
        what = f"decode {batch} at {context}"
        rows.append({"what": what, **dict(zip(("ours", "llama", "ratio"), measured, strict=True))})
    return rows


def measure_models(args: argparse.Namespace, groups: Any, device: Device, results: dict[str, Any]) -> None:
    """Measure and print the long prompt and the tokens of --models; add their rows to the results."""
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
    print("\n| model | context | ms a token: median (p10, p90) | over the first | cache MB |\n|---|---|---|---|---|")
    for name, net in nets.items():
        results["tokens"][name] = rows = time_tokens(net, device, args)
        for row in rows:
            spent = f"{row['ms']:.2f} ({row['p10']:.2f}, {row['p90']:.2f}) | {row['ratio']:.2f}"
            print(f"| {name} | {row['context']} | {spent} | {row['cache_bytes'] / 1e6:.3f} |", flush=True)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    about = {
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers") if args.llama else None,
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }
    print(json.dumps(about))
    results: dict[str, Any] = {"about": about, "tokens": {}, "prompt": {}}
    with inference_groups() as (groups, device):
        print(f"{device.description}\n")
        if args.llama:
            results["llama"] = compare_with_llama(args, groups, device)
            print("| what | ms, ours | ms, transformers' Llama | ratio |\n|---|---|---|---|")
            for row in results["llama"]:
                print(f"| {row['what']} | {row['ours']:.1f} | {row['llama']:.1f} | {row['ratio']:.2f} |")
        else:
            measure_models(args, groups, device, results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
