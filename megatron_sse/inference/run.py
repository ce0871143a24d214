"""A model fed with the new tokens of cached sequences: prompts in chunks of bounded size, then token by token."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_sse.inference.cache import Cache
from megatron_sse.inference.layers import CachedLayout
from megatron_sse.inference.request import ModelRequest
from megatron_sse.inference.sampling import Sampler
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.device import without_stand_ins
from megatron_sse.parallel.sharding import ALL_TOKENS, ContextShard

# Tokens of prompts at once, where code gives no other number.
DEFAULT_CHUNK = ModelRequest.chunk
# Feeds one token to each of some places of a cache: takes tokens and places, returns logits [D, v].
Step = Callable[[Sequence[int], Sequence[int]], Tensor]


@torch.no_grad()
def feed(
    model: LanguageModel,
    cache: Cache,
    tokens_T: Tensor,
    places: Sequence[int],
    counts: Sequence[int],
    shard: ContextShard = ALL_TOKENS,
) -> Tensor:
    """Run new tokens through the model; return the input of its output layer, [T, 1, d].

    tokens_T: int64, `counts` of each sequence in `places`, one after the other.
    shard: where context ranks share the new tokens of one sequence, this rank's part. All parts have the same length,
        and afterwards every rank's cache holds all of them.
    """
    layout = cache.layout(places, counts, shard)
    hidden_T1d = run_layers(model, tokens_T[None].to(cache.device), layout)
    cache.advance(layout)
    return hidden_T1d


def run_layers(model: LanguageModel, tokens_1T: Tensor, layout: CachedLayout) -> Tensor:
    """Return the input of the output layer, [T, 1, d], for tokens on the device; layers keep what they saw."""
    # The stand-ins would slow thousands of small calls down.
    with without_stand_ins():
        # Positions are those of the layout: the embedding has none of its own.
        return model.decoder(model.embedding(tokens_1T, None), None, packed_seq_params=layout)


def decode(model: LanguageModel, cache: Cache, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
    """Feed one token to each of the places; return logits [D, v]."""
    return logits_of(model, feed(model, cache, torch.tensor(tokens), places, [1] * len(places)))


@torch.no_grad()
def logits_of(model: LanguageModel, hidden_T1d: Tensor) -> Tensor:
    """Return fp32 logits [T, v] over the vocabulary of all tensor ranks, padding included."""
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    return model.output_layer(hidden_T1d, weight=weight, runtime_gather_output=True)[0][:, 0].float()


def prefill(
    model: LanguageModel,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    chunk: int = DEFAULT_CHUNK,
    shard: ContextShard = ALL_TOKENS,
    places: Sequence[int] | None = None,
) -> Tensor:
    """Feed every sequence its prompt, at most `chunk` tokens at a time; return logits after the last token, [D, v].

    prompts: token ids of each sequence of the cache, at least one. shard: of this rank among the context ranks, which
        share all but the last tokens of each prompt; they compute those all alike, as they do what is generated.
    places: of the sequences that the prompts are for; by default all of the cache, in order.
    """
    assert all(map(len, prompts))
    place_of = range(len(prompts)) if places is None else places
    if shard.size > 1:
        prompts = [
            _prefill_shared(model, cache, place, prompt, chunk, shard)
            for place, prompt in zip(place_of, prompts, strict=True)
        ]
    last = [torch.empty(0)] * len(prompts)
    for pieces in cut([len(prompt) for prompt in prompts], chunk):
        numbers, starts, counts = zip(*pieces, strict=True)
        tokens = [torch.as_tensor(prompts[number][start : start + count]) for number, start, count in pieces]
        hidden_T1d = feed(model, cache, torch.cat(tokens), [place_of[number] for number in numbers], counts)
        ended = [start + count == len(prompts[number]) for number, start, count in pieces]
        # The row of each prompt's last token, where the prompt ends in this chunk.
        rows = torch.tensor(counts).cumsum(0)[torch.tensor(ended)] - 1
        if len(rows):
            logits = logits_of(model, hidden_T1d[rows.to(hidden_T1d.device)])
            for number, row in zip((n for n, e in zip(numbers, ended, strict=True) if e), logits, strict=True):
                last[number] = row
    return torch.stack(last)


def _prefill_shared(
    model: LanguageModel, cache: Cache, place: int, prompt: Sequence[int], chunk: int, shard: ContextShard
) -> Sequence[int]:
    """Feed the context ranks equal parts of a prompt; return the rest of it, 1 to `shard.size` tokens."""
    # At least one token is left over, since its logits are wanted on every rank.
    shared = (len(prompt) - 1) // shard.size
    for first in range(0, shared, chunk):
        count = min(chunk, shared - first)
        start = first * shard.size + shard.rank * count
        feed(model, cache, torch.as_tensor(prompt[start : start + count]), [place], [count], shard)
    return prompt[shared * shard.size :]


def cut(lengths: Sequence[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield chunks of the sequences, one after the other: lists of (sequence, first token, number of tokens)."""
    pieces: list[tuple[int, int, int]] = []
    room = chunk
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            count = min(room, length - start)
            pieces.append((number, start, count))
            start, room = start + count, room - count
            if not room:
                yield pieces
                pieces, room = [], chunk
    if pieces:
        yield pieces


def generate(
    model: LanguageModel,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampler: Sampler,
    end: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    shard: ContextShard = ALL_TOKENS,
    step: Step | None = None,
) -> Iterator[list[int | None]]:
    """Continue every sequence of the cache; yield the tokens of each step, None for sequences that have ended.

    A sequence ends with the token `end` or after `num_tokens`; its last token stays pending in the cache, and comes
    before the prompt when the sequence is continued.

    Args:
        prompts: token ids, appended to what the cache holds; may be empty where tokens are pending.
        chunk, shard: as in prefill.
        step: how single tokens are fed; by default `decode`.
    """
    step = step or partial(decode, model, cache)
    fed = [[*pending, *prompt] for pending, prompt in zip(cache.pending, prompts, strict=True)]
    cache.pending = [[] for _ in prompts]
    logits_Dv = prefill(model, cache, fed, chunk, shard)
    places = list(range(len(prompts)))
    for number in range(num_tokens):
        picked = sampler.pick(logits_Dv, places)
        tokens: list[int | None] = [None] * len(prompts)
        for place, token in zip(places, picked, strict=True):
            tokens[place], cache.pending[place] = token, [token]
        places = [place for place in places if tokens[place] != end]
        yield tokens
        if not places or number + 1 == num_tokens:
            return
        logits_Dv = step([token for token in tokens if token is not None and token != end], places)
