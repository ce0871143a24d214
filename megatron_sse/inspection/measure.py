"""Measures of every layer over all tokens of some texts, in memory that does not grow with the texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.errors import UserError
from megatron_sse.inference.run import feed
from megatron_sse.inspection.half_life import HalfLives, Spread, spread
from megatron_sse.inspection.rank import effective_rank
from megatron_sse.inspection.watch import WatchedCache
from megatron_sse.kernels import BankInputs, Routes
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.model.mixer import SSEMixer
from megatron_sse.parallel.collectives import sum_value

logger = logging.getLogger(__name__)

# Ranks are measured after 16, 64, 256, ... tokens.
_FIRST_MARK = 16


@dataclass(frozen=True)
class Use:
    """Use of a layer's partitions.

    write_share_N, read_share_N: share of all writes, and of all reads, that each partition gets.
    written, read: effective number of partitions, the exponential of the shares' entropy.
    top_probability: mean of the router's largest probability.
    """

    write_share_N: list[float]
    read_share_N: list[float]
    written: float
    read: float
    top_probability: float


@dataclass(frozen=True)
class Rank:
    """Effective ranks of the states after some tokens, means over heads and texts.

    tokens: mean over the texts. texts: number of texts that are this long. shared: None without a shared bank.
    """

    tokens: int
    texts: int
    shared: float | None
    partition_N: list[float]


@dataclass(frozen=True)
class Memory:
    """Half-lives over tokens, heads and channels.

    shared: in tokens. sparse_writes: of all partitions, in writes to the partition. sparse_tokens: the same in tokens,
    by the writes that each partition gets per token. None where nothing was written.
    """

    shared: Spread | None
    sparse_writes: Spread | None
    sparse_tokens: Spread | None
    partition_writes_N: list[Spread | None]
    partition_tokens_N: list[Spread | None]


@dataclass(frozen=True)
class Layer:
    """Measures of a layer; softmax layers have only number and kind.

    most: largest possible rank. growth: ranks as texts are read, the last at the end of the longest. end: ranks at the
    ends of all texts. use: None without partitions.
    """

    layer: int
    kind: str
    most: int | None = None
    use: Use | None = None
    growth: list[Rank] = field(default_factory=list)
    end: Rank | None = None
    half_life: Memory | None = None


class LayerSums:
    """Sums over the tokens of an SSE layer, filled as a watcher of its banks."""

    def __init__(self, mixer: SSEMixer, device: torch.device):
        self.number, num_partitions = mixer.layer_number, mixer.num_partitions
        self.num_partitions, self.most = num_partitions, min(mixer.key_dim, mixer.value_dim)
        self.has_shared, self.num_tokens = mixer.spec.has_shared, 0
        self.shared, self.sparse = HalfLives(1, device), HalfLives(num_partitions, device)
        self.writes_N = torch.zeros(num_partitions, dtype=torch.int64, device=device)
        self.reads_N = torch.zeros_like(self.writes_N)
        self.top = torch.zeros((), dtype=torch.float64, device=device)
        self.marks: dict[int, list[Tensor]] = {}
        self.ends: list[tuple[int, Tensor]] = []

    def see(self, shared: BankInputs, sparse: BankInputs | None, routes: Routes | None) -> None:
        _check_finite(shared.g)
        if self.has_shared:
            self.shared.add(shared.g, torch.zeros_like(shared.g.flatten(1)[:, :1], dtype=torch.int64))
        if sparse is None or routes is None:
            return
        _check_finite(sparse.g)
        self.num_tokens += len(routes.bank_TP)
        self.sparse.add(sparse.g, routes.written_TP)
        self.writes_N += routes.written_TP.flatten().bincount(minlength=self.num_partitions)
        self.reads_N += routes.read_TP.flatten().bincount(minlength=self.num_partitions)
        self.top += routes.prob_TN.amax(-1).double().sum()

    def note_rank(self, states_XAHKV: Tensor, tokens: int, is_mark: bool, is_end: bool) -> None:
        """Record the rank of the states after some tokens of a text: for `growth` if is_mark, for `end` if is_end."""
        _check_finite(states_XAHKV)
        rank_A = effective_rank(states_XAHKV)
        if is_mark:
            self.marks.setdefault(tokens, []).append(rank_A)
        if is_end:
            self.ends.append((tokens, rank_A))

    def layer(self, kind: str, group: dist.ProcessGroup) -> Layer:
        """Return the measures over the heads of all tensor ranks."""
        ranks = []
        for tokens, states in self.marks.items():
            ranks.append(self._rank([(tokens, rank_A) for rank_A in states], group))
        return Layer(
            layer=self.number,
            kind=kind,
            most=self.most,
            use=self._use() if self.num_partitions else None,
            growth=sorted(ranks, key=lambda rank: rank.tokens),
            end=self._rank(self.ends, group),
            half_life=self._memory(group),
        )

    def _use(self) -> Use:
        write_share_N, read_share_N = (count_N.double() / count_N.sum() for count_N in (self.writes_N, self.reads_N))
        written, read = (float(torch.special.entr(x).sum().exp()) for x in (write_share_N, read_share_N))
        top = float(self.top) / self.num_tokens
        return Use(write_share_N.tolist(), read_share_N.tolist(), written, read, top)

    def _rank(self, found: Sequence[tuple[int, Tensor]], group: dist.ProcessGroup) -> Rank:
        tokens = round(float(np.mean([tokens for tokens, _ in found])))
        # Every tensor rank has the same number of heads.
        mean_A = sum_value(torch.stack([rank_A for _, rank_A in found]).mean(0), group) / group.size()
        rank_A = mean_A.tolist()
        # The shared bank, where there is one, comes before the partitions.
        first = len(rank_A) - self.num_partitions
        return Rank(tokens, len(found), rank_A[0] if self.has_shared else None, rank_A[first:])

    def _memory(self, group: dist.ProcessGroup) -> Memory:
        shared_1b, sparse_Nb = (sum_value(x.counts_Nb, group).cpu().numpy() for x in (self.shared, self.sparse))
        # Writes per token of each partition turn half-lives in writes into half-lives in tokens.
        per_token_N = self.writes_N.cpu().numpy() / max(self.num_tokens, 1)
        one_N = np.ones(self.num_partitions)
        banks = [slice(number, number + 1) for number in range(self.num_partitions)]
        return Memory(
            shared=spread(shared_1b, np.ones(1)),
            sparse_writes=spread(sparse_Nb, one_N),
            sparse_tokens=spread(sparse_Nb, per_token_N),
            partition_writes_N=[spread(sparse_Nb[bank], one_N[bank]) for bank in banks],
            partition_tokens_N=[spread(sparse_Nb[bank], per_token_N[bank]) for bank in banks],
        )


def measure_layers(
    net: LanguageModel, kinds: Sequence[str], texts: Sequence[Sequence[int]], chunk: int, group: dist.ProcessGroup
) -> list[Layer]:
    """Return the measures of every layer; each text is read from empty states.

    Args:
        kinds: kinds of the layers, first to last.
        texts: token ids, at least one in each text.
        chunk: number of tokens that go through the model at once.
        group: tensor group.

    Raises UserError for a model whose numbers are not finite.
    """
    device = next(net.parameters()).device
    mixers = [layer.self_attention for layer in net.decoder.layers]
    sums = {mixer.layer_number: LayerSums(mixer, device) for mixer in mixers if isinstance(mixer, SSEMixer)}
    marks = rank_marks(max(map(len, texts)))
    for number, tokens in enumerate(texts, 1):
        cache = WatchedCache(net, 1, sums)
        # Chunks also end at the marks, where states are looked at.
        for start, end in pieces(len(tokens), marks, chunk):
            feed(net, cache, torch.tensor(tokens[start:end]), [0], [end - start])
            if end in marks or end == len(tokens):
                for layer, sum_ in sums.items():
                    sum_.note_rank(cache.banks(layer).states_XAHKV, end, end in marks, end == len(tokens))
            if end in marks and end > chunk:
                logger.info("text %d of %d: %d of %d tokens", number, len(texts), end, len(tokens))
    return [
        sums[number].layer(kind, group) if number in sums else Layer(number, kind)
        for number, kind in enumerate(kinds, 1)
    ]


def _check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise UserError("CHECKPOINT: the model has diverged: its decays or states are not finite")


def rank_marks(longest: int) -> list[int]:
    """Return the numbers of tokens after which ranks are measured, up to the length of the longest text."""
    marks, mark = [], _FIRST_MARK
    while mark < longest:
        marks.append(mark)
        mark *= 4
    return [*marks, longest]


def pieces(length: int, marks: Sequence[int], chunk: int) -> Iterator[tuple[int, int]]:
    """Yield first token and end of pieces of at most `chunk` tokens; pieces also end at every mark."""
    start = 0
    for end in [*(mark for mark in marks if mark < length), length]:
        while start < end:
            stop = min(start + chunk, end)
            yield start, stop
            start = stop
