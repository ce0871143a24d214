"""The cache of a megatron-sse model: transformers' Cache with states in place of keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers renamed the argument and the output in 5.24. Both names are accepted; CACHE is the installed version's.
CACHE_NAMES = ("past_key_values", "cache")
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)


class KeptByLayer:
    """The cache of one layer: a tuple of tensors [B, ...], empty before the first tokens. Only the layer reads it."""

    is_compileable = is_croppable = is_sliding = supports_early_init = False

    def __init__(self) -> None:
        self.tensors: tuple[Tensor | None, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to each tensor."""
        self.tensors = tuple(x if x is None else function(x) for x in self.tensors)


class MegatronSSECache(Cache):
    """Per layer the states, the last tokens that convolutions look back to, and keys and values of softmax layers.

    num_tokens: tokens so far, padding included.
    document_BR: int64, the document of each token and -1 for padding, as Tokens has it; None where neither occurred.
    """

    def __init__(self, num_layers: int):
        self.kept = [KeptByLayer() for _ in range(num_layers)]
        super().__init__(layers=self.kept)  # type: ignore[arg-type]
        self.num_tokens = 0
        self.document_BR: Tensor | None = None

    def store(self, kept: Sequence[tuple[Tensor | None, ...]], num_tokens: int, document_BR: Tensor | None) -> None:
        """Replace what is kept, by that of all tokens so far."""
        for layer, tensors in zip(self.kept, kept, strict=True):
            layer.tensors = tensors
        self.num_tokens, self.document_BR = num_tokens, document_BR

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.num_tokens > 0

    @property
    def batch_size(self) -> int:
        tensors = (x for layer in self.kept for x in layer.tensors if x is not None)
        return next((len(x) for x in tensors), -1)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.num_tokens > 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a MegatronSSECache is written by its model; there are no keys and values to add")

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError for tokens to remove: a state cannot forget them."""
        if tokens_to_remove:
            raise ValueError(
                "a MegatronSSECache cannot be cut: states do not forget single tokens. Keep a copy (copy.deepcopy) of "
                "the cache of the prefix, and continue from that"
            )

    def reset(self) -> None:
        """Forget all tokens."""
        self.store([()] * len(self.kept), 0, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences `beam_idx` of the batch, in this order."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` of the batch: numbers, or True for those to keep."""
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.kept:
            layer.map(function)
        self.document_BR = None if self.document_BR is None else function(self.document_BR)


def one_cache(past_key_values: MegatronSSECache | None, cache: MegatronSSECache | None) -> MegatronSSECache | None:
    """Return the cache by whichever name it was given. Raises ValueError where both were."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values, cache: got both, allowed one of them: they are two names for one argument")
    return cache if past_key_values is None else past_key_values
