"""Benchmark of conversions: peak memory relative to the weights, for a random model on the CPU. Needs Linux."""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_sse.convert import command
from megatron_sse.convert.request import Request
from megatron_sse.hf.dense_settings import model_to_dense
from megatron_sse.hf.folder import write_json, write_tensors
from megatron_sse.hf.name_map import DENSE_NAMES, model_links
from megatron_sse.pretrained.open import make_run_config

MIB = 1 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--most", type=float, default=0.0, help="exit with 1 from this share of the weights on")
    return parser.parse_args()


def make_model(folder: Path, args: argparse.Namespace) -> int:
    """Write a random Llama model and return the bytes of its weights."""
    heads = args.hidden // 64
    model = {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "vocab_size": args.vocabulary,
        "layers": "softmax",
        "softmax": {"num_heads": heads, "num_kv_heads": max(1, heads // 4)},
    }
    dtype = getattr(torch, args.dtype)
    config = make_run_config(model, 2048, "fp32", "model")
    parts = [part for link in model_links(config.model, DENSE_NAMES) for part in link.theirs]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for part in parts:
            yield part.name, torch.randn(part.shape).mul_(0.02).to(dtype)

    folder.mkdir()
    write_tensors(folder, tensors())
    write_json(folder / "config.json", model_to_dense(config.model, "llama", 2048))
    return sum(torch.Size(part.shape).numel() for part in parts) * dtype.itemsize


def measure(source: str, target: str, to: str, pattern: str | None, result: Path) -> None:
    """Convert in this process, and write the peak memory of converting and of comparing, in bytes above the start."""
    torch.set_num_threads(1)
    start = _reset_peak()
    peaks = {}
    compare = command._difference

    def difference(*models):  # type: ignore[no-untyped-def]
        peaks["converting"] = _peak() - start
        _reset_peak()
        return compare(*models)

    # The comparison comes after the conversion: measure the peak in between.
    command._difference = difference
    status = command.run(Request(source=source, target=target, to=to, pattern=pattern))
    peaks["comparing"] = _peak() - start
    result.write_text(json.dumps(peaks | {"status": status}))


def _reset_peak() -> int:
    """Reset the process's peak memory to its present memory, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> int:
    args = parse_arguments()
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        size = make_model(folder / "llama", args)
        largest = args.vocabulary * args.hidden * getattr(torch, args.dtype).itemsize
        print(f"weights {size / MIB:.0f} MiB ({args.dtype}), largest tensor {largest / MIB:.0f} MiB\n")
        print(
            "| conversion | converting, MiB | of the weights | comparing, MiB | of the weights |\n|---|---|---|---|---|"
        )
        for source, target, to, pattern in (
            ("llama", "ours", "ours", None),
            ("ours", "back", "llama", None),
            ("ours", "hf", "hf", None),
            ("llama", "upcycled", "ours", "2*sse, softmax"),
        ):
            result = folder / "result.json"
            arguments = (str(folder / source), str(folder / target), to, pattern, result)
            process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
            process.start()
            process.join()
            peaks = json.loads(result.read_text())
            assert peaks["status"] == 0
            shares = [f"{peaks[part] / MIB:.0f} | {peaks[part] / size:.2f}" for part in ("converting", "comparing")]
            print(f"| {source} to {target} | {' | '.join(shares)} |", flush=True)
            worst = max(worst, peaks["converting"] / size)
    return 1 if args.most and worst >= args.most else 0


if __name__ == "__main__":
    raise SystemExit(main())
