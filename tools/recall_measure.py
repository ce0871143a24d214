"""Measures the checkpoints of a recall run: `python -m megatron_sse.tools.recall_measure RUN OUTPUT`.

Besides accuracy and loss, it measures how often a question reads a partition that its pair was written to, how many
tokens each partition gets, and the effective rank of the states, all on samples that are not trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sse.checkpoint.folders import list_checkpoints
from megatron_sse.checkpoint.names import ITERATION
from megatron_sse.config import ModelConfig, MQARTask
from megatron_sse.data.tasks.mqar import Recall, make_recall
from megatron_sse.evaluation.recall import sample_generator
from megatron_sse.inference.cache import Cache
from megatron_sse.inference.layers import BankCache
from megatron_sse.inference.run import feed, logits_of
from megatron_sse.inspection.rank import effective_rank
from megatron_sse.kernels import Routes
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.model.router import Router
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import open_model
from megatron_sse.run_folder import CHECKPOINTS

SEED = 0
BATCH = 32


def measure_run(folder: Path, samples: int) -> list[dict[str, Any]]:
    """Return a point for each checkpoint of a run, by step."""
    points = []
    with inference_groups(1) as (groups, device):
        for checkpoint in reversed(list_checkpoints(folder / CHECKPOINTS)):
            model = open_model("RUN", checkpoint)
            config = inference_config(model, None)
            net = build_and_load(model, config, groups, device)
            task = next(source.mqar for source in config.data.train if source.mqar is not None)
            recalls = make_samples(task, config.data.sequence_length, samples)
            step = int(checkpoint.name.removeprefix(ITERATION))
            points.append({"step": step} | look(net, config.model, recalls))
    return points


def make_samples(task: MQARTask, length: int, samples: int) -> list[Recall]:
    """Return the samples that `megatron-sse evaluate` uses with this seed."""
    return [make_recall(sample_generator(SEED, length, task.pairs, number), task, length) for number in range(samples)]


@torch.no_grad()
def look(net: LanguageModel, model: ModelConfig, recalls: list[Recall]) -> dict[str, Any]:
    """Return accuracy and loss (nats) of the answers, and a record of each SSE layer (see _describe)."""
    losses: list[Tensor] = []
    right: list[Tensor] = []
    picks: dict[int, list[Routes]] = {}
    states: dict[int, list[Tensor]] = {}
    hooks = []
    for layer in net.decoder.layers:
        if isinstance(router := getattr(layer.self_attention, "router", None), Router):
            kept = picks.setdefault(layer.self_attention.layer_number, [])
            # `kept=kept` binds this layer's list; a plain closure would see the last one.
            hooks.append(router.register_forward_hook(lambda _, args, out, kept=kept: kept.append(out[0])))
    for first in range(0, len(recalls), BATCH):
        group = recalls[first : first + BATCH]
        cache, lengths = Cache(net, len(group)), [len(recall.tokens_E) for recall in group]
        tokens_T = torch.from_numpy(np.concatenate([recall.tokens_E for recall in group]))
        hidden_T1d = feed(net, cache, tokens_T, range(len(group)), lengths)
        row_w, answer_w = (torch.from_numpy(x).to(hidden_T1d.device) for x in _questions(group))
        logits_wv = logits_of(net, hidden_T1d[row_w])[:, : model.vocab_size]
        losses.append(torch.nn.functional.cross_entropy(logits_wv, answer_w, reduction="none"))
        right.append(logits_wv.argmax(-1) == answer_w)
        for number, kind in cache.layers.items():
            if isinstance(kind, BankCache):
                states.setdefault(number, []).append(kind.states_XAHKV)
    for hook in hooks:
        hook.remove()
    # A convolution of width w sees w - 1 tokens back, so w - 1 tokens after the key still see it.
    num_behind = max(1, model.input_convolution - 1)
    layers = [
        _describe(number, recalls, picks.get(number), torch.cat(kept), num_behind) for number, kept in states.items()
    ]
    accuracy, loss = (float(torch.cat(values).double().mean()) for values in (right, losses))
    return {"accuracy": accuracy, "loss": loss, "layers": layers}


def _questions(recalls: list[Recall]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the questions among the tokens of all sequences, and their answers."""
    length = len(recalls[0].tokens_E)
    rows = [number * length + recall.place_p for number, recall in enumerate(recalls)]
    return np.concatenate(rows), np.concatenate([recall.answer_p for recall in recalls])


def _describe(
    number: int, recalls: list[Recall], routes: list[Routes] | None, states_XAHKV: Tensor, num_behind: int
) -> dict[str, Any]:
    """Return the record of an SSE layer; the shared bank comes first in rank_B."""
    record: dict[str, Any] = {"layer": number, "rank_B": effective_rank(states_XAHKV).tolist()}
    if routes is not None:
        write_TP = torch.cat([part.written_TP for part in routes]).cpu().numpy()
        read_TP = torch.cat([part.read_TP for part in routes]).cpu().numpy()
        count_N = np.bincount(write_TP.flatten(), minlength=routes[0].num_partitions)
        record |= {"share_N": (count_N / count_N.sum()).tolist()} | match(write_TP, read_TP, recalls, num_behind)
    return record


def match(write_TP: np.ndarray, read_TP: np.ndarray, recalls: list[Recall], num_behind: int) -> dict[str, Any]:
    """Return the shares of questions that read a partition that their pair was written to.

    Args:
        write_TP, read_TP: partitions that each token writes to and reads, sequence after sequence.
        num_behind: number of tokens after the key that still see it through the convolution in front of the mixer.

    Returns:
        match_key: share by the partitions of the key's token. match_behind: shares by those of the value's token, and
        of each later token that still sees the key; these can hold the pair. match_chance: share for questions paired
        with random values, which is high where a router sends everything to one partition.
    """
    row_w, _ = _questions(recalls)
    # A pair is a key and, right after it, its value; distance_p counts from the value.
    key_w = row_w - np.concatenate([recall.distance_p for recall in recalls]) - 1
    read_wP = read_TP[row_w]

    def share(wrote_wP: np.ndarray, seen_w: np.ndarray | bool = True) -> float:
        return float(((wrote_wP[:, :, None] == read_wP[:, None, :]).any((1, 2)) & seen_w).mean())

    # Rolling pairs every question with some other question's value.
    shifts = np.random.default_rng(SEED).integers(1, len(row_w), size=16)
    chance = float(np.mean([share(np.roll(write_TP[key_w + 1], shift, 0)) for shift in shifts]))
    rows = [np.minimum(key_w + behind, row_w) for behind in range(1, num_behind + 1)]
    return {
        "match_key": share(write_TP[key_w]),
        # A write at the question itself does not hold the pair.
        "match_behind": [share(write_TP[row], row < row_w) for row in rows],
        "match_chance": chance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=100, help="number of sequences; default 100")
    options = parser.parse_args()
    options.output.write_text(json.dumps(measure_run(options.run, options.samples), indent=1) + "\n")


if __name__ == "__main__":
    main()
