"""Answers packed as documents into micro-batches, each with its advantage and its earlier log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sse.data.batch import Batch, make_batch
from megatron_sse.data.dataset import Sample
from megatron_sse.data.iterators import rank_positions
from megatron_sse.data.packing import PieceTable, best_fit
from megatron_sse.parallel.device import to_device
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.rl.advantages import Answer


@dataclass(kw_only=True)
class PolicyBatch(Batch):
    """A micro-batch of answers. What is per token is of its label, [B, L], and of use where the loss mask is 1.

    Attributes:
        old_BL: fp32, log-probability when the answer was generated.
        advantage_BL, weight_BL: fp32, see Answer; the weights are times the counted tokens of the step, by which
            Megatron-Core divides gradients.
        length_BL: fp32, tokens of the label's answer.
        answer_BL: int64, the number of the label's answer in the micro-batch, the same on all context ranks.
        num_answers: numbers of answers in the micro-batch.
        reference_BL: fp32, log-probability by the reference; None without a KL term.
        picks_BLMP: int16, of the token itself: the partitions to pick (see rl/routing.py); None for the best ones.
    """

    old_BL: Tensor
    advantage_BL: Tensor
    weight_BL: Tensor
    length_BL: Tensor
    answer_BL: Tensor
    num_answers: int
    reference_BL: Tensor | None = None
    picks_BLMP: Tensor | None = None


def pack(answers: Sequence[Answer], length: int) -> list[list[Answer]]:
    """Return the answers of each sequence of `length` tokens, by best fit."""
    length_p = np.array([len(answer.prompt) + len(answer.rollout.tokens) for answer in answers], dtype=np.int64)
    zeros_p = np.zeros_like(length_p)
    sample_p = best_fit(PieceTable(np.arange(len(answers)), zeros_p, length_p, zeros_p), length).sample_p
    rows: list[list[Answer]] = [[] for _ in range(int(sample_p.max()) + 1)] if len(answers) else []
    for answer, row in zip(answers, sample_p.tolist(), strict=True):
        rows[row].append(answer)
    return rows


def make_batches(
    rows: Sequence[Sequence[Answer]],
    length: int,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    shard: ContextShard,
    device: torch.device | str,
    dtype: type = np.float32,
    filler_MP: np.ndarray | None = None,
) -> list[PolicyBatch]:
    """Return this rank's micro-batches of `length` tokens a sequence, equally many on every data-parallel rank.

    What is missing for that is filled with empty sequences. dtype: of what is not a whole number. filler_MP: picks of
    tokens that have none, where those of the answers are replayed.
    """
    num_tokens = sum(len(answer.rollout.tokens) for row in rows for answer in row)
    per_round = micro_batch * data_size
    count = -(-len(rows) // per_round)
    padded = [*rows, *([[]] * (count * per_round - len(rows)))]
    positions = rank_positions(0, len(padded), micro_batch, data_rank, data_size)
    chosen = [[padded[position] for position in next(positions)] for _ in range(count)]
    return [_make_batch(each, length, num_tokens, shard, device, dtype, filler_MP) for each in chosen]


def _make_batch(
    rows: Sequence[Sequence[Answer]],
    length: int,
    num_tokens: int,
    shard: ContextShard,
    device: torch.device | str,
    dtype: type,
    filler_MP: np.ndarray | None,
) -> PolicyBatch:
    old_BE1, advantage_BE1, weight_BE1, length_BE1 = np.zeros((4, len(rows), length + 1))
    answer_BE1 = np.zeros((len(rows), length + 1), dtype=np.int64)
    samples = []
    number = 0
    for row, answers in enumerate(rows):
        tokens_E1 = np.zeros(length + 1, dtype=np.int64)
        starts_E1, counts_E1 = np.zeros((2, length + 1), dtype=bool)
        place = 0
        for answer in answers:
            drawn = answer.rollout.tokens
            begin, end = place + len(answer.prompt), place + len(answer.prompt) + len(drawn)
            tokens_E1[place:begin], tokens_E1[begin:end] = answer.prompt, drawn
            starts_E1[place] = True
            counts_E1[begin:end] = True
            old_BE1[row, begin:end], advantage_BE1[row, begin:end] = answer.rollout.logp_T, answer.advantage
            weight_BE1[row, begin:end], length_BE1[row, begin:end] = answer.weight * num_tokens, len(drawn)
            answer_BE1[row, begin:end] = number
            place, number = end, number + 1
        starts_E1[place : place + 1] = True
        samples.append(Sample(tokens_E1, starts_E1, counts_E1, min(place, length)))
    plain = make_batch(samples, True, device, shard)
    column_L = shard.columns(length)
    per_token = ("old_BL", "advantage_BL", "weight_BL", "length_BL")
    fields = (
        # Labels are one place ahead of their tokens; cut like them.
        to_device(part_BE1[:, 1:][:, column_L].astype(dtype), device)
        for part_BE1 in (old_BE1, advantage_BE1, weight_BE1, length_BE1)
    )
    answer_BL = to_device(answer_BE1[:, 1:][:, column_L], device)
    values: dict[str, Any] = {**vars(plain), **dict(zip(per_token, fields, strict=True))}
    if filler_MP is not None:
        values["picks_BLMP"] = to_device(_pack_picks(rows, length, filler_MP)[:, column_L], device)
    return PolicyBatch(**values, answer_BL=answer_BL, num_answers=max(1, number))


def _pack_picks(rows: Sequence[Sequence[Answer]], length: int, filler_MP: np.ndarray) -> np.ndarray:
    """Return the picks of the tokens of packed answers, int16 [B, E, M, P]."""
    picks_BEMP = np.broadcast_to(filler_MP, (len(rows), length, *filler_MP.shape)).copy()
    for row, answers in enumerate(rows):
        place = 0
        for answer in answers:
            picks_RMP = answer.rollout.picks_RMP
            assert picks_RMP is not None
            # The last token of an answer was not fed while generating.
            picks_BEMP[row, place : place + len(picks_RMP)] = picks_RMP
            place += len(answer.prompt) + len(answer.rollout.tokens)
    return picks_BEMP
