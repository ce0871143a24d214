"""All that a model keeps of a batch of sequences, and the file that it can be saved to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sse.durable import output_file
from megatron_sse.errors import UserError
from megatron_sse.inference.layers import BankCache, CachedLayout, KeyValueCache, Tail
from megatron_sse.model.attention import SoftmaxAttention
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.model.mixer import SSEMixer
from megatron_sse.parallel.sharding import ALL_TOKENS, ContextShard

_FORMAT = 1


class Cache:
    """States, keys and values that the layers keep of X sequences.

    Attributes:
        layers: by layer number.
        lengths: the tokens of each sequence that the layers have seen.
        pending: of each sequence, tokens that belong to it and that the layers have not seen yet.
    """

    def __init__(self, model: LanguageModel, num_sequences: int):
        self.device = next(model.parameters()).device
        self.layers: dict[int, BankCache | KeyValueCache] = {}
        for layer in model.decoder.layers:
            mixer = layer.self_attention
            make = _make_key_value_cache if isinstance(mixer, SoftmaxAttention) else _make_bank_cache
            self.layers[mixer.layer_number] = make(mixer, num_sequences, self.device)
        self.lengths = [0] * num_sequences
        self.pending: list[list[int]] = [[] for _ in range(num_sequences)]

    def layout(self, places: Sequence[int], counts: Sequence[int], shard: ContextShard = ALL_TOKENS) -> CachedLayout:
        """Return the layout of new tokens: `counts` (at least 1) for each of the sequences in `places`.

        With several context ranks there is one sequence, and these are the tokens of this rank's part.
        """
        past = [self.lengths[place] for place in places]
        return CachedLayout.of(places, past, counts, self.layers, self.device, shard)

    def reserve(self, places: Sequence[int]) -> None:
        """Make room for one more token of each of the sequences in `places`."""
        for layer in self.layers.values():
            layer.reserve(1 + max(self.lengths[place] for place in places))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where in memory the layers keep what they keep; a CUDA graph holds as long as this stays the same."""
        return tuple(x.data_ptr() for layer in self.layers.values() for x in layer.tensors().values())

    def advance(self, layout: CachedLayout) -> None:
        """Count the new tokens, of all context ranks, as seen."""
        for place, count in zip(layout.places, layout.counts, strict=True):
            self.lengths[place] += count * layout.shard.size

    def clear(self, places: Sequence[int]) -> None:
        """Make sequences empty, so that others can take their places."""
        for layer in self.layers.values():
            for tensor in layer.tensors().values():
                tensor[list(places)] = 0
        for place in places:
            self.lengths[place], self.pending[place] = 0, []

    def copy(self, source: int, places: Sequence[int]) -> None:
        """Copy a sequence to other places."""
        for layer in self.layers.values():
            for tensor in layer.tensors().values():
                tensor[list(places)] = tensor[source].clone()
        for place in places:
            self.lengths[place], self.pending[place] = self.lengths[source], list(self.pending[source])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors().values())

    def save(self, path: str, settings: dict) -> None:
        """Write it to a file, which appears complete or not at all. settings: of the model. Raises UserError."""
        content = {
            "format": _FORMAT,
            "settings": json.dumps(settings, sort_keys=True),
            "lengths": self.lengths,
            "pending": self.pending,
            "layers": {number: layer.tensors() for number, layer in self.layers.items()},
        }
        try:
            with output_file(Path(path)) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--save-cache: {path} cannot be written ({' '.join(str(error).split())})") from None

    @classmethod
    def restore(cls, content: dict[str, Any], model: LanguageModel) -> "Cache":
        """Return the cache whose content read_cache returned."""
        cache = cls(model, 0)
        for number, layer in cache.layers.items():
            layer.set_tensors({name: tensor.to(cache.device) for name, tensor in content["layers"][number].items()})
        cache.lengths, cache.pending = content["lengths"], content["pending"]
        return cache


def read_cache(path: str, settings: dict) -> dict[str, Any]:
    """Return the content of a file that Cache.save wrote for a model of the same settings. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"--load-cache: {path} not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # What torch.load raises for a file that is none depends on its first bytes.
    except Exception as error:
        raise UserError(f"--load-cache: {path} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"--load-cache: got {path}, allowed a file that --save-cache wrote")
    if content["settings"] != json.dumps(settings, sort_keys=True):
        raise UserError(f"--load-cache: got {path}, which is of a model with other settings")
    return content


def _make_bank_cache(mixer: SSEMixer, num_sequences: int, device: torch.device) -> BankCache:
    dtype = torch.promote_types(mixer.config.params_dtype, torch.float32)
    shape = (num_sequences, 1 + mixer.num_partitions, mixer.num_value_heads, mixer.key_dim, mixer.value_dim)
    tails = _make_tails(mixer, num_sequences)
    if mixer.settings.short_convolution:
        tails["banks"] = _make_tail(mixer.conv_weight.flatten(0, -2), num_sequences)
    return BankCache(torch.zeros(shape, dtype=dtype, device=device), tails)


def _make_key_value_cache(attention: SoftmaxAttention, num_sequences: int, device: torch.device) -> KeyValueCache:
    window = attention.core_attention.window
    num_rows = 0 if window is None else window
    shape = (
        num_sequences,
        attention.num_query_groups_per_partition,
        num_rows,
        attention.hidden_size_per_attention_head,
    )
    keys = torch.zeros(shape, dtype=attention.config.params_dtype, device=device)
    return KeyValueCache(keys, window, _make_tails(attention, num_sequences))


def _make_tails(mixer: SSEMixer | SoftmaxAttention, num_sequences: int) -> dict[str, Tail]:
    """Return the empty state of the convolution in front of a mixer."""
    if mixer.input_convolution is None:
        return {}
    return {"input": _make_tail(mixer.input_convolution.conv_weight, num_sequences)}


def _make_tail(weight_cW: torch.Tensor, num_sequences: int) -> Tail:
    num_channels, width = weight_cW.shape
    return Tail(weight_cW.detach().new_zeros(num_sequences, width - 1, num_channels))
