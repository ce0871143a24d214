"""Benchmark of reinforcement learning's generation: tokens per second of a processor, beside transformers' generate().

    .venv/bin/python -m megatron_sse.tools.bench_rollouts EXPORT [--batches 1 16 64 256] [--tokens 64] [--repeats 5]

EXPORT is a folder that `megatron-sse convert` wrote. Both sample from all of the vocabulary, answers to one prompt of
six tokens, all --tokens long. They take turns, and time is the processor's, since on a shared machine wall-clock time
includes other processes.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from megatron_sse.data.problems import Problem
from megatron_sse.inference.sampling import KeyedSampler, make_key
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import open_model
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.rollouts import generate
from megatron_sse.tools.bench_recurrence import commit, cpu_name

PROMPT = [1, 2, 3, 4, 5, 6]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="answers at the same time")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def ours(net: LanguageModel, vocab_size: int, batch: int, tokens: int) -> int:
    """Generate as a run of reinforcement learning does; return the number of tokens."""
    prompt = Prompt(Problem("", None, "", ""), PROMPT, None)
    keys = [[make_key(0, sample) for sample in range(batch)]]
    [group] = generate(net, [prompt], keys, tokens, KeyedSampler(vocab_size), batch)
    return sum(len(rollout.tokens) for rollout in group)


def theirs(network: Any, batch: int, tokens: int) -> int:
    """Generate with transformers; return the number of tokens."""
    prompts_BL = torch.tensor([PROMPT] * batch)
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    with torch.no_grad():
        found_BL = network.generate(prompts_BL, attention_mask=torch.ones_like(prompts_BL), **settings)
    return found_BL[:, len(PROMPT) :].numel()


def tokens_per_second(run: Callable[[], int]) -> float:
    """Return the tokens that a call generates per second of the processor."""
    started = time.process_time()
    tokens = run()
    return tokens / (time.process_time() - started)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    about = {"commit": commit(), "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(about | {"cpu": cpu_name(), "settings": vars(args)}))
    model = open_model("EXPORT", args.export)
    network = transformers.AutoModelForCausalLM.from_pretrained(args.export, trust_remote_code=True).eval()
    print("| answers at once | ours, tokens/CPU s | transformers | ours / transformers, median (least, most) | load |")
    print("|---|---|---|---|---|")
    with inference_groups() as (groups, device):
        config = inference_config(model, None)
        net = build_and_load(model, config, groups, device)
        for batch in args.batches:
            rates: list[tuple[float, float]] = []
            for _ in range(args.repeats + 1):
                mine = tokens_per_second(partial(ours, net, config.model.vocab_size, batch, args.tokens))
                other = tokens_per_second(partial(theirs, network, batch, args.tokens))
                rates.append((mine, other))
            # The first warms up.
            mine, other = (statistics.median(column) for column in zip(*rates[1:], strict=True))
            ratios = sorted(mine / other for mine, other in rates[1:])
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})"
            load = f"{os.getloadavg()[0]:.1f}"
            print(f"| {batch} | {mine:,.0f} | {other:,.0f} | {ratio} | {load} |", flush=True)


if __name__ == "__main__":
    main()
