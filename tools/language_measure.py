"""Measures the last checkpoint of a run of language modelling:

    python -m megatron_sse.tools.language_measure RUN OUTPUT --test PREFIX --tokens 262144

The loss on the run's validation file is for the choice of its learning rate; all else is measured on the test file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from megatron_sse.checkpoint.folders import list_checkpoints
from megatron_sse.data.checks import TokenFile, check_token_file
from megatron_sse.evaluation.perplexity import cut_documents, measure_losses, validation_files
from megatron_sse.evaluation.read import Reader
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import open_model
from megatron_sse.run_folder import CHECKPOINTS

# A pair of tokens that occurs at most so often in the training file is not known by heart.
RARE = 10
# What the label's pair (the token before it, the label) is: rare in training and in its piece before; rare and new in
# its piece; any other. Recall has to find the earlier place, and its loss is that of recall tokens.
RECALL, NEW, OTHER = KINDS = ("recall", "new", "other")
# Lengths of the pieces of the test file, in those that the model was trained on.
LONGER = (1, 4, 16)
# Sequences, and tokens of all of them, that are read at once.
_BATCH, _CHUNK = 8, 8192


def measure_run(folder: Path, test: str, num_tokens: int) -> dict[str, Any]:
    """Return what is known of a run: losses in nats per token, by position, kind of token, distance and length."""
    with inference_groups(1) as (groups, device):
        model = open_model("RUN", list_checkpoints(folder / CHECKPOINTS)[0])
        config = inference_config(model, None)
        net = build_and_load(model, config, groups, device)
        reader = Reader(net, config.model.vocab_size, _BATCH, _CHUNK)
        length, vocab_size = config.data.sequence_length, config.model.vocab_size
        [validation] = validation_files(config, None)
        file = check_token_file("--test", test, vocab_size)
        [training] = [check_token_file("data.train", str(source.prefix), vocab_size) for source in config.data.train]
        with torch.no_grad():
            return {
                "validation": measure_losses(reader, validation, length, num_tokens).loss,
                "kinds": measure_kinds(reader, file, length, num_tokens, Pairs(training, vocab_size)),
                "lengths": [asdict(measure_losses(reader, file, factor * length, num_tokens)) for factor in LONGER],
            }


class Pairs:
    """How often each pair of tokens occurs in a file, one after the other."""

    def __init__(self, file: TokenFile, vocab_size: int) -> None:
        tokens_T = np.memmap(file.prefix + ".bin", dtype=file.index.dtype, mode="r").astype(np.int64)
        self.vocab_size = vocab_size
        self.pair_x, self.count_x = np.unique(self.code(tokens_T), return_counts=True)

    def code(self, tokens_T: np.ndarray) -> np.ndarray:
        """Return a number for each pair of the sequence, one fewer than tokens."""
        return tokens_T[:-1] * self.vocab_size + tokens_T[1:]

    def is_rare(self, pair_T: np.ndarray) -> np.ndarray:
        """Return which pairs occur at most RARE times."""
        place_T = np.searchsorted(self.pair_x, pair_T).clip(max=len(self.pair_x) - 1)
        return np.where(self.pair_x[place_T] == pair_T, self.count_x[place_T], 0) <= RARE


def distances(pair_T: np.ndarray) -> np.ndarray:
    """Return how many tokens before each pair the same pair was last seen; 0 where it was not."""
    last: dict[int, int] = {}
    distance_T = np.zeros(len(pair_T), dtype=np.int64)
    for place, pair in enumerate(pair_T.tolist()):
        distance_T[place] = place - last.get(pair, place)
        last[pair] = place
    return distance_T


def measure_kinds(reader: Reader, file: TokenFile, length: int, num_tokens: int, pairs: Pairs) -> dict[str, Any]:
    """Return for each kind its number of tokens and mean loss, and for recall the same by powers of two of the
    distance to the place where the pair was last."""
    pieces, counted = cut_documents(file, length, num_tokens)
    codes = [pairs.code(tokens) for tokens in pieces]
    distance_by_piece = [distances(code) for code in codes]
    kind_by_piece = [
        np.where(pairs.is_rare(code), np.where(distance > 0, KINDS.index(RECALL), KINDS.index(NEW)), KINDS.index(OTHER))
        for code, distance in zip(codes, distance_by_piece, strict=True)
    ]
    begin_p1 = np.cumsum([0, *map(len, codes)])
    label_T, distance_T, kind_T = (
        np.concatenate(parts) for parts in ([tokens[1:] for tokens in pieces], distance_by_piece, kind_by_piece)
    )
    loss_T = np.full(len(label_T), np.nan)
    for sequence_w, place_w, logits_wv in reader.logits([tokens[:-1] for tokens in pieces], counted):
        place_w = begin_p1[sequence_w] + place_w
        label_w = torch.from_numpy(label_T[place_w]).to(logits_wv.device)
        loss_T[place_w] = cross_entropy(logits_wv, label_w, reduction="none").double().cpu().numpy()

    def mean_of(which_T: np.ndarray) -> dict[str, Any]:
        # Labels that a loss mask leaves out have no loss.
        kept_x = loss_T[which_T & ~np.isnan(loss_T)]
        return {"tokens": len(kept_x), "loss": float(kept_x.mean()) if len(kept_x) else None}

    recall_T = kind_T == KINDS.index(RECALL)
    power_T = np.floor(np.log2(np.maximum(distance_T, 1))).astype(np.int64)
    by_distance = [
        {"first": 1 << k} | mean_of(recall_T & (power_T == k))
        for k in np.unique(power_T[recall_T & ~np.isnan(loss_T)]).tolist()
    ]
    return {kind: mean_of(kind_T == number) for number, kind in enumerate(KINDS)} | {"by_distance": by_distance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="JSON file to write")
    parser.add_argument("--test", metavar="PREFIX", required=True, help="token file to measure on")
    parser.add_argument("--tokens", type=int, required=True, help="number of tokens of the file")
    options = parser.parse_args()
    measured = measure_run(options.run, options.test, options.tokens)
    options.output.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
