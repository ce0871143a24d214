"""Answers packed as documents into micro-batches, each with its advantage and its earlier log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_sse.data.batch import Batch, make_batch
from megatron_sse.data.dataset import Sample
from megatron_sse.data.iterators import rank_positions
from megatron_sse.data.packing import PieceTable, best_fit
from megatron_sse.parallel.device import to_device
from megatron_sse.parallel.prefix import SharedPrefixLayout
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.rl.advantages import Answer

Part = TypeVar("Part")


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


@dataclass(frozen=True)
class _Document:
    """Tokens `first` to `last` - 1 of an answer's prompt and the answer, from `place` of a sequence on.

    parent: the place of the document that it starts from; -1 for none.
    """

    answer: Answer
    place: int
    first: int
    last: int
    parent: int

    @property
    def end(self) -> int:
        """The place behind its last token."""
        return self.place + self.last - self.first


def pack(answers: Sequence[Answer], length: int, shares: bool = False) -> list[list[Answer]]:
    """Return the answers of each sequence of `length` tokens, by best fit.

    shares: whether answers to one prompt that follow each other in a sequence share it.
    """
    if not shares:
        return _fit(answers, [_count(answer) for answer in answers], length)
    families: list[list[Answer]] = []
    for _, each in groupby(answers, key=lambda answer: id(answer.prompt)):
        group = list(each)
        own = len(group[0].prompt) - 1
        # As many answers to a prompt as fit behind it.
        families += _fit(group, [_count(answer) - own for answer in group], length - own)
    rows = _fit(families, [_lay_out(family, True)[-1].end for family in families], length)
    return [[answer for family in row for answer in family] for row in rows]


def _count(answer: Answer) -> int:
    return len(answer.prompt) + len(answer.rollout.tokens)


def _fit(parts: Sequence[Part], sizes: Sequence[int], room: int) -> list[list[Part]]:
    """Return the parts in bins of `room` tokens, by best fit."""
    length_p = np.array(sizes, dtype=np.int64)
    zeros_p = np.zeros_like(length_p)
    sample_p = best_fit(PieceTable(np.arange(len(parts)), zeros_p, length_p, zeros_p), room).sample_p
    bins: list[list[Part]] = [[] for _ in range(int(sample_p.max()) + 1)] if len(parts) else []
    for part, number in zip(parts, sample_p.tolist(), strict=True):
        bins[number].append(part)
    return bins


def _lay_out(row: Sequence[Answer], shares: bool) -> list[_Document]:
    """Return the documents of a sequence.

    Where answers share their prompt, it is a document but for its last token, with which each of them starts: what
    follows this token differs.
    """
    documents: list[_Document] = []
    place = 0
    for _, each in groupby(row, key=lambda answer: id(answer.prompt if shares else answer)):
        family, parent = list(each), -1
        own = len(family[0].prompt) - 1 if len(family) > 1 else 0
        if own:
            documents.append(_Document(family[0], place, 0, own, -1))
            parent, place = place, place + own
        for answer in family:
            documents.append(_Document(answer, place, own, _count(answer), parent))
            place = documents[-1].end
    return documents


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
    shares: bool = False,
) -> list[PolicyBatch]:
    """Return this rank's micro-batches of `length` tokens a sequence, equally many on every data-parallel rank.

    What is missing for that is filled with empty sequences. dtype: of what is not a whole number. filler_MP: picks of
    tokens that have none, where those of the answers are replayed. shares: as for `pack`.
    """
    num_tokens = sum(len(answer.rollout.tokens) for row in rows for answer in row)
    per_round = micro_batch * data_size
    count = -(-len(rows) // per_round)
    padded = [*rows, *([[]] * (count * per_round - len(rows)))]
    positions = rank_positions(0, len(padded), micro_batch, data_rank, data_size)
    chosen = [[padded[position] for position in next(positions)] for _ in range(count)]
    return [_make_batch(each, length, num_tokens, shard, device, dtype, filler_MP, shares) for each in chosen]


def _make_batch(
    rows: Sequence[Sequence[Answer]],
    length: int,
    num_tokens: int,
    shard: ContextShard,
    device: torch.device | str,
    dtype: type,
    filler_MP: np.ndarray | None,
    shares: bool,
) -> PolicyBatch:
    old_BE1, advantage_BE1, weight_BE1, length_BE1 = np.zeros((4, len(rows), length + 1))
    answer_BE1 = np.zeros((len(rows), length + 1), dtype=np.int64)
    parent_BE = np.full((len(rows), length), -1)
    laid_out = [_lay_out(answers, shares) for answers in rows]
    samples = []
    number = 0
    for row, documents in enumerate(laid_out):
        tokens_E1 = np.zeros(length + 1, dtype=np.int64)
        starts_E1, counts_E1 = np.zeros((2, length + 1), dtype=bool)
        place = 0
        for document in documents:
            answer, place = document.answer, document.end
            drawn = answer.rollout.tokens
            tokens_E1[document.place : place] = [*answer.prompt, *drawn][document.first : document.last]
            starts_E1[document.place] = True
            parent_BE[row, document.place] = document.parent
            if document.last <= len(answer.prompt):
                continue
            begin, end = place - len(drawn), place
            counts_E1[begin:end] = True
            old_BE1[row, begin:end], advantage_BE1[row, begin:end] = answer.rollout.logp_T, answer.advantage
            weight_BE1[row, begin:end], length_BE1[row, begin:end] = answer.weight * num_tokens, len(drawn)
            answer_BE1[row, begin:end] = number
            number += 1
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
    if (parent_BE >= 0).any():
        values["layout"] = SharedPrefixLayout.of(plain.layout, parent_BE)
    if filler_MP is not None:
        values["picks_BLMP"] = to_device(_pack_picks(laid_out, length, filler_MP)[:, column_L], device)
    return PolicyBatch(**values, answer_BL=answer_BL, num_answers=max(1, number))


def _pack_picks(rows: Sequence[Sequence[_Document]], length: int, filler_MP: np.ndarray) -> np.ndarray:
    """Return the picks of the tokens of packed documents, int16 [B, E, M, P]."""
    picks_BEMP = np.broadcast_to(filler_MP, (len(rows), length, *filler_MP.shape)).copy()
    for row, documents in enumerate(rows):
        for document in documents:
            assert document.answer.rollout.picks_RMP is not None
            # The last token of an answer was not fed while generating.
            picks_RMP = document.answer.rollout.picks_RMP[document.first : document.last]
            picks_BEMP[row, document.place : document.place + len(picks_RMP)] = picks_RMP
    return picks_BEMP
