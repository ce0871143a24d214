"""Layers that keep states, convolution tails, keys and values of earlier tokens, so that a sequence can continue.

Context ranks may share the new tokens of one sequence: each computes its part, and all keep the same.

A place is one row of the pool of X sequences. D counts the sequences that continue, in order, T
their new tokens one after the other, W the tokens before a token that its convolution looks at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from megatron_sse.kernels import BankInputs, BankOutputs, Routes, short_convolution, sse_attention
from megatron_sse.kernels.attention import MASK_ELEMENTS, attend_last
from megatron_sse.kernels.decode import decode_step
from megatron_sse.kernels.segments import Exchange
from megatron_sse.parallel.device import to_device
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.prefill import edges_behind, of_all_ranks, of_last_rank, tails
from megatron_sse.parallel.sharding import ContextShard

_MIN_ROWS = 64
# Of queries that share a mask of their windows: with fewer, more time goes to calls than to scores outside the windows.
_MIN_QUERIES = 128


@dataclass(kw_only=True, eq=False)
class CachedLayout(TokenLayout):
    """New tokens of some sequences in one row, each sequence a document; positions count its earlier tokens too.

    Attributes:
        places, past, counts: of each sequence, on the host: its place, its tokens before, its new tokens; on context
            ranks there is one sequence, and these are its tokens before all parts and those of this rank's part.
        place_D: int64, the places.
        layers: what each layer keeps, by layer number.
        any_position: nothing that layers do may depend on `past`, since a CUDA graph of it is replayed at later
            positions (one new token each); room for the new rows is made beforehand.
    """

    places: Sequence[int] = ()
    past: Sequence[int] = ()
    counts: Sequence[int] = ()
    place_D: Tensor = field(default_factory=torch.Tensor)
    layers: Mapping[int, Any] = field(default_factory=dict)
    any_position: bool = False
    has_layer_losses: ClassVar[bool] = False

    @classmethod
    def of(
        cls,
        places: Sequence[int],
        past: Sequence[int],
        counts: Sequence[int],
        layers: Mapping[int, Any],
        device: torch.device | str,
        shard: ContextShard,
    ) -> "CachedLayout":
        """Return the layout of new tokens, at least one for each sequence.

        shard: this rank's part of the new tokens; with several ranks there is one sequence.
        """
        assert shard.size == 1 or len(places) == 1
        starts_1T = np.zeros((1, sum(counts)), dtype=bool)
        starts_1T[0, np.cumsum([0, *counts[:-1]])] = True
        plain = TokenLayout.from_starts(starts_1T, device=device)
        values = {entry.name: getattr(plain, entry.name) for entry in fields(plain)}
        # Parts have equal lengths and follow each other in rank order.
        before = np.add(past, shard.rank * counts[0]) if shard.size > 1 else past
        values |= {"position_BL": plain.position_BL + to_device(np.repeat(before, counts), device), "shard": shard}
        place_D = to_device(np.asarray(places, dtype=np.int64), device)
        return cls(**values, places=places, past=past, counts=counts, place_D=place_D, layers=layers)

    @property
    def one_each(self) -> bool:
        """Whether every sequence has one new token."""
        return self.length == self.num_documents and self.shard.size == 1

    def attend_banks(self, layer_number: int, *inputs: Any, **options: Any) -> BankOutputs:
        """Continue from the states that the layer keeps."""
        return self.layers[layer_number].attend(*inputs, self, **options)

    def convolve(
        self,
        layer_number: int,
        name: str,
        x_LBc: Tensor,
        weight_cW: Tensor,
        group: ProcessGroup,
        tensor_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Convolve the new tokens behind those that the layer keeps."""
        assert tensor_group is None
        return self.layers[layer_number].tails[name].convolve(x_LBc[:, 0], weight_cW, self, group)[:, None]

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float | None,
        dropout: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        """Attend from the new tokens to those that the layer keeps and to themselves."""
        kept = self.layers[layer_number]
        assert kept.window == window and not dropout
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        return kept.attend(q, k, v, self, scale, group).flatten(1)[:, None]


class Tail:
    """The last tokens of each sequence, which a convolution looks back at. rows_XWc: zeros before the sequence."""

    def __init__(self, rows_XWc: Tensor):
        self.rows_XWc = rows_XWc

    def convolve(self, x_Tc: Tensor, weight_cW: Tensor, layout: CachedLayout, group: ProcessGroup) -> Tensor:
        """Apply kernels.short_convolution behind the tokens kept. group: the context ranks."""
        width, num_sequences = self.rows_XWc.shape[1], layout.num_documents
        tail_DWc, last_Wc = self.rows_XWc[layout.place_D], None
        if layout.shard.size > 1:
            before_Wc, last_Wc = tails(x_Tc, tail_DWc[0], group)
            tail_DWc = before_Wc[None]
        # Each sequence's new tokens stand behind its tail.
        before_D = torch.arange(num_sequences, device=x_Tc.device) * width
        back_W = torch.arange(width, device=x_Tc.device)
        # For two sequences with tails of 2 and the new tokens a b | c, x is - - a b - - c and row_T is 2 3 6.
        row_T = torch.arange(len(x_Tc), device=x_Tc.device) + before_D[layout.document_T] + width
        x = x_Tc.new_empty(len(x_Tc) + num_sequences * width, x_Tc.shape[1])
        x[row_T] = x_Tc
        x[(layout.offsets_D1[:-1] + before_D)[:, None] + back_W] = tail_DWc
        position = row_T.new_zeros(len(x))
        position[row_T] = layout.position_BL.flatten()
        out_Tc = short_convolution(x, weight_cW, position)[row_T]
        last_DWc = x[(layout.offsets_D1[1:] + before_D)[:, None] + back_W] if last_Wc is None else last_Wc[None]
        self.rows_XWc[layout.place_D] = last_DWc
        return out_Tc


class LayerCache:
    """State and tails of a layer. tails: of its convolutions, "input" in front of the mixer, "banks" inside."""

    def __init__(self, tails: Mapping[str, Tail]):
        self.tails = tails

    def reserve(self, num_rows: int) -> None:
        """Make room for sequences of `num_rows` tokens; states have it."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by name."""
        return {name: tail.rows_XWc for name, tail in self.tails.items()}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what tensors() returned."""
        for name, tail in self.tails.items():
            tail.rows_XWc = tensors[name]


class BankCache(LayerCache):
    """The states of an SSE layer's banks. states_XAHKV: fp32, fp64 for fp64 models."""

    def __init__(self, states_XAHKV: Tensor, tails: Mapping[str, Tail]):
        super().__init__(tails)
        self.states_XAHKV = states_XAHKV

    def attend(
        self,
        shared: BankInputs,
        sparse: BankInputs | None,
        v_THV: Tensor,
        routes: Routes | None,
        layout: CachedLayout,
        *,
        exchange: Exchange,
        group: ProcessGroup,
        form: str,
        **options: Any,
    ) -> BankOutputs:
        """Do what kernels.sse_attention does, from the states kept to those after the new tokens.

        exchange: hands states on between context ranks. group: these ranks.
        """
        if layout.one_each:
            o_THV = decode_step(self.states_XAHKV, layout.place_D, shared, sparse, v_THV, routes, **options)
            return BankOutputs(o_THV, None, None)
        # More than one token: the chunked form, from the states kept. Each sequence is a span, as its state is wanted.
        initial_DAHKV, edges = self.states_XAHKV[layout.place_D], None
        if layout.shard.size > 1:
            edges = edges_behind(initial_DAHKV[0].flatten(0, 1), exchange, layout.shard.rank)
        banks = sse_attention(
            shared,
            sparse,
            v_THV,
            routes,
            layout.offsets_D1,
            layout.document_T,
            form=form,
            initial_YAHKV=initial_DAHKV if edges is None else None,
            edges=edges,
            **options,
        )
        assert banks.final_YAHKV is not None
        final_DAHKV = banks.final_YAHKV if edges is None else of_last_rank(banks.final_YAHKV, group)
        self.states_XAHKV[layout.place_D] = final_DAHKV
        return banks

    def tensors(self) -> dict[str, Tensor]:
        return {"states": self.states_XAHKV, **super().tensors()}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().set_tensors(tensors)
        self.states_XAHKV = tensors["states"]


class KeyValueCache(LayerCache):
    """Keys (rotated) and values of a softmax layer: all of them, or with a window a ring of its last ones.

    key_XHRK, value_XHRK: the token at position p is in row p, with a window in row p mod R. The rows of a head lie
    together, as attention reads them.
    """

    def __init__(self, key_XHRK: Tensor, window: int | None, tails: Mapping[str, Tail]):
        super().__init__(tails)
        self.key_XHRK, self.value_XHRK, self.window = key_XHRK, torch.zeros_like(key_XHRK), window

    def attend(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        layout: CachedLayout,
        scale: float | None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Attend causally from the new tokens to those kept and to themselves, which are then kept; [T, heads, K].

        group: the context ranks; their parts' keys and values come to all.
        """
        if not layout.any_position:
            self.reserve(max(np.add(layout.past, np.multiply(layout.counts, layout.shard.size))))
        if layout.shard.size > 1:
            assert group is not None
            k_THK, v_THK = (of_all_ranks(x, group) for x in (k_THK, v_THK))
            first = layout.past[0] + layout.shard.rank * len(q_THK)
            return self._attend_one(q_THK, k_THK, v_THK, layout.places[0], layout.past[0], first, scale)
        if layout.one_each:
            return self._attend_step(q_THK, k_THK, v_THK, layout, scale)
        if layout.num_documents == 1:
            return self._attend_one(q_THK, k_THK, v_THK, layout.places[0], layout.past[0], layout.past[0], scale)
        parts = [x.split(list(layout.counts)) for x in (q_THK, k_THK, v_THK)]
        return torch.cat(
            [
                self._attend_one(q, k, v, place, past, past, scale)
                for q, k, v, place, past in zip(*parts, layout.places, layout.past, strict=True)
            ]
        )

    def _attend_step(
        self, q_DHK: Tensor, k_DHK: Tensor, v_DHK: Tensor, layout: CachedLayout, scale: float | None
    ) -> Tensor:
        """Attend from one token of each sequence that continues."""
        position_D, num_rows = layout.position_BL[0], self.key_XHRK.shape[2]
        row_D = position_D % num_rows
        self.key_XHRK[layout.place_D, :, row_D], self.value_XHRK[layout.place_D, :, row_D] = k_DHK, v_DHK
        # A full ring is seen completely, whatever its order: softmax attention does not depend on the order of rows.
        used = num_rows if layout.any_position else min(max(layout.past) + 1, num_rows)
        seen_DR = None
        if layout.any_position or min(layout.past) + 1 < used:
            seen_DR = torch.arange(used, device=q_DHK.device) <= position_D[:, None]
        keys, values = self.key_XHRK[:, :, :used], self.value_XHRK[:, :, :used]
        if list(layout.places) != list(range(len(keys))):
            keys, values = keys[layout.place_D], values[layout.place_D]
        seen = None if seen_DR is None else seen_DR[:, None, None]
        q = q_DHK[:, :, None]
        return scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)[:, :, 0]

    def _attend_one(
        self,
        q_LHK: Tensor,
        k_EHK: Tensor,
        v_EHK: Tensor,
        place: int,
        past: int,
        position: int,
        scale: float | None,
    ) -> Tensor:
        """Attend from some tokens of one sequence.

        past: position of the first key and value. position: that of the first query.
        """
        keys_HRK, values_HRK = self.key_XHRK[place], self.value_XHRK[place]
        new_HEK, new_values_HEK = k_EHK.transpose(0, 1), v_EHK.transpose(0, 1)
        length, num_rows = len(k_EHK), keys_HRK.shape[1]
        if self.window is None:
            first = 0
            keys_HRK[:, past : past + length], values_HRK[:, past : past + length] = new_HEK, new_values_HEK
            keys, values = keys_HRK, values_HRK
        else:
            first = max(0, past - self.window + 1)
            # Position p is in row p mod R, so the window before `past` may wrap around the end of the ring.
            kept = torch.arange(first, past, device=q_LHK.device) % num_rows
            keys, values = (
                torch.cat((keys_HRK[:, kept], new_HEK), 1),
                torch.cat((values_HRK[:, kept], new_values_HEK), 1),
            )
            last = torch.arange(past, past + length, device=q_LHK.device)[-num_rows:] % num_rows
            keys_HRK[:, last], values_HRK[:, last] = new_HEK[:, -num_rows:], new_values_HEK[:, -num_rows:]
        # From here on, positions count from the first row of keys and values.
        return _attend_last(q_LHK, keys, values, position - first, self.window, scale)

    def reserve(self, num_rows: int) -> None:
        """Make room for sequences of `num_rows` tokens, by half more, so that few copies are made. A ring has room."""
        have = self.key_XHRK.shape[2]
        if num_rows <= have or self.window is not None:
            return
        more = max(num_rows, have + have // 2, _MIN_ROWS) - have
        self.key_XHRK, self.value_XHRK = (
            torch.cat((x, x.new_zeros(*x.shape[:2], more, x.shape[3])), dim=2) for x in (self.key_XHRK, self.value_XHRK)
        )

    def tensors(self) -> dict[str, Tensor]:
        # In files the rows come before the heads, as earlier versions keep them.
        keys, values = self.key_XHRK.transpose(1, 2), self.value_XHRK.transpose(1, 2)
        return {"key": keys, "value": values, **super().tensors()}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().set_tensors(tensors)
        self.key_XHRK, self.value_XHRK = (tensors[name].transpose(1, 2).contiguous() for name in ("key", "value"))


def _attend_last(
    q_LHK: Tensor, k_HRK: Tensor, v_HRK: Tensor, position: int, window: int | None, scale: float | None
) -> Tensor:
    """Attend from the tokens at `position` and behind it, each to the rows up to its own, or to its window of them."""
    q, k, v = q_LHK.transpose(0, 1)[None], k_HRK[None], v_HRK[None]
    num_rows = position + len(q_LHK)
    if window is None or num_rows <= window:
        return attend_last(q, k[:, :, :num_rows], v[:, :, :num_rows], scale)[0].transpose(0, 1)
    outputs = []
    # Queries are taken in blocks, each with the rows that its windows hold: this bounds the masks.
    most = min(max(window, _MIN_QUERIES), max(1, MASK_ELEMENTS // window))
    for block in q.split(most, dim=2):
        end = position + block.shape[2]
        first = max(0, position - window + 1)
        query_L = torch.arange(position, end, device=q.device)
        distance_LR = query_L[:, None] - torch.arange(first, end, device=q.device)
        seen_LR = (distance_LR >= 0) & (distance_LR < window)
        rows = slice(first, end)
        out = scaled_dot_product_attention(
            block, k[:, :, rows], v[:, :, rows], attn_mask=seen_LR, scale=scale, enable_gqa=True
        )
        outputs.append(out)
        position = end
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
