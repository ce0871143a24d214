"""Benchmark of rl.share_prefixes: tokens that training computes for a step, and its time, with and without.

    .venv/bin/python -m megatron_sse.tools.bench_prefixes CONFIG [section.key=value ...] [--prompt 512] [--answer 64]
        [--samples 8] [--prompts 2] [--repeats 5]

CONFIG is a configuration with rl. Its model, with random weights, trains on made-up answers of the given lengths,
forward and backward without the optimizer, one sequence at a time. A sequence has room for a prompt with all answers to
it, and without rl.share_prefixes is filled by complete documents. Both ways take turns, and time is the processor's,
since on a shared machine wall-clock time includes other processes.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial

import numpy as np
import torch

from megatron_sse.config import RLConfig, load_config
from megatron_sse.data.problems import Problem
from megatron_sse.model import build_model
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.pretrained.network import inference_groups
from megatron_sse.rl.advantages import Answer, Group, weigh
from megatron_sse.rl.objective import PolicyObjective
from megatron_sse.rl.packing import PolicyBatch, make_batches, pack
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.rollouts import Rollout
from megatron_sse.tools.bench_recurrence import commit, cpu_name


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_answers(args: argparse.Namespace, rl: RLConfig, vocab_size: int) -> list[Answer]:
    """Return answers with random tokens, of which the first one of each group is right."""
    draw = np.random.default_rng(0)
    groups = []
    for _ in range(args.prompts):
        prompt = Prompt(Problem("", None, "", ""), draw.integers(0, vocab_size, args.prompt).tolist(), None)
        rollouts = [
            Rollout(draw.integers(0, vocab_size, args.answer).tolist(), np.full(args.answer, -np.log(vocab_size)), True)
            for _ in range(args.samples)
        ]
        groups.append(Group(prompt, rollouts, [1.0] + [0.0] * (args.samples - 1)))
    return weigh(groups, rl)


def seconds(net: LanguageModel, objective: PolicyObjective, batches: list[PolicyBatch]) -> float:
    """Return the processor's time for the gradients of a step."""
    started = time.process_time()
    for batch in batches:
        objective.loss(objective.forward(net, batch, True), batch).loss.backward()
    return time.process_time() - started


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    config = load_config(args.config, args.overrides)
    rl, document = config.rl, args.prompt + args.answer
    if rl is None:
        raise SystemExit(f"CONFIG: got {args.config}, which has no rl section; give one that has")
    # Rounded up to complete documents, so that plain packing has no padding.
    length = -(-(args.prompt + args.samples * (args.answer + 1)) // document) * document
    print(json.dumps({"commit": commit(), "torch": torch.__version__, "cpu": cpu_name(), "settings": vars(args)}))
    with inference_groups() as (groups, device):
        [net] = build_model(config, groups, device)
        answers = make_answers(args, rl, config.model.vocab_size)
        runs = []
        for shares in (False, True):
            rows = pack(answers, length, shares)
            made = make_batches(rows, length, 1, 0, 1, ContextShard(), device.type, shares=shares)
            runs.append((length * len(rows), partial(seconds, net, PolicyObjective(rl, groups.cp), made)))
        # The first of each warms up.
        times = [[run() for _, run in runs] for _ in range(args.repeats + 1)][1:]
    plain, shared = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(one / other for one, other in times)
    tokens = [count for count, _ in runs]
    spread = f"median {statistics.median(ratios):.2f}, least {ratios[0]:.2f}, greatest {ratios[-1]:.2f}"
    print(f"tokens computed: {tokens[0]:,} without, {tokens[1]:,} with, ratio {tokens[0] / tokens[1]:.2f}")
    print(f"CPU seconds: {plain:.2f} without, {shared:.2f} with, ratios of {args.repeats} turns: {spread}")
    print(f"load: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
