"""Hooks that record the outputs of a rank's modules and make its routers replay recorded picks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_sse.data.batch import Batch
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.model.projections import enter_heads
from megatron_sse.model.router import Router
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.linear_cross_entropy import TokenScores

EMBEDDING, OUTPUT = "embedding", "output"


def layer_row(number: int) -> str:
    """Return the name of a layer, counted from 1 over the whole model."""
    return f"layer {number}"


@dataclass(frozen=True)
class Piece:
    """The place of a part within a tensor over all tokens [samples, E, ...]: its samples [B] and columns [L]."""

    sample_B: Tensor
    column_L: Tensor

    def cut(self, whole: Tensor) -> Tensor:
        """Return this part of a tensor over all tokens."""
        return whole[self.sample_B[:, None], self.column_L]

    def put(self, whole: Tensor, value: Tensor) -> None:
        """Write this part into a tensor over all tokens."""
        whole[self.sample_B[:, None], self.column_L] = value


class Probe:
    """Hooks on a rank's model chunks.

    Attributes:
        outputs: by row and micro-batch, the place of the part and its values [B, L, ...] on the CPU. The rows are the
            embedding, the layers, and the output, whose values are the losses of the tokens.
        routers: the routers by layer number.
        picks, hidden: by layer number and micro-batch, the picks and the inputs of the routers.
    """

    def __init__(
        self, chunks: list[LanguageModel], batches: list[tuple[Tensor, Batch]], groups: ProcessGroupCollection
    ):
        self.outputs: dict[tuple[str, int], tuple[Piece, Tensor]] = {}
        self.picks: dict[tuple[int, int], tuple[Piece, Tensor]] = {}
        self.hidden: dict[tuple[int, int], tuple[Piece, Tensor]] = {}
        self.routers: dict[int, Router] = {}
        self.batches = batches
        # The layout tells a hook which micro-batch runs; layouts have no hash, so their ids are the keys.
        self.numbers = {id(batch.layout): number for number, (_, batch) in enumerate(batches)}
        self.tp_group = groups.tp
        self.running = 0
        for chunk in chunks:
            self._watch(chunk)

    def _watch(self, chunk: LanguageModel) -> None:
        chunk.register_forward_pre_hook(self._before_chunk, with_kwargs=True)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(self._after_embedding)
        if chunk.post_process:
            chunk.register_forward_hook(self._after_chunk)
        for layer in chunk.modules():
            if isinstance(layer, TransformerLayer):
                layer.register_forward_hook(self._after_layer, with_kwargs=True)
                for module in layer.modules():
                    if isinstance(module, Router):
                        self.routers[layer.layer_number] = module

    def _before_chunk(self, chunk: Any, args: Any, kwargs: Any) -> None:
        self.running = self.numbers[id(kwargs["packed_seq_params"])]

    def _after_embedding(self, module: Any, args: Any, output_LBd: Tensor) -> None:
        self._keep(EMBEDDING, self.running, output_LBd)

    def _after_layer(self, layer: Any, args: Any, kwargs: Any, output: tuple[Tensor, Any]) -> None:
        # Recomputed layers run again in the backward pass, by then of an earlier micro-batch than self.running.
        number = self.numbers[id(kwargs["packed_seq_params"])]
        self._keep(layer_row(layer.layer_number), number, output[0])

    def _after_chunk(self, module: Any, args: Any, scores_BL: TokenScores) -> None:
        self._keep(OUTPUT, self.running, scores_BL.loss.t())

    def _keep(self, row: str, number: int, output_LB: Tensor) -> None:
        piece = self.piece(number, len(output_LB))
        self.outputs[row, number] = piece, output_LB.detach().transpose(0, 1).cpu()

    def piece(self, number: int, length: int) -> Piece:
        """Return the place of this rank's part of a micro-batch, where its tensor has `length` tokens per sequence."""
        samples, batch = self.batches[number]
        column_L = batch.layout.column_L.cpu()
        if length < len(column_L):
            # Sequence parallelism: the context rank's tokens are split once more.
            column_L = column_L.chunk(self.tp_group.size())[self.tp_group.rank()]
        return Piece(samples, column_L)

    def record_routing(self) -> None:
        """Record the inputs and picks of the routers from now on."""
        for layer, router in self.routers.items():
            entered: list[Tensor] = []
            router.proj.register_forward_hook(lambda module, args, output, entered=entered: entered.append(args[0]))
            router.register_forward_hook(self._router_hook(layer, entered))

    def _router_hook(self, layer: int, entered: list[Tensor]) -> Any:
        def keep(module: Any, args: tuple[Tensor, Tensor, TokenLayout], output: Any) -> None:
            # The projection has just run on the same tokens.
            hidden_LBd, layout = entered.pop(), args[-1]
            number = self.numbers[id(layout)]
            piece = self.piece(number, layout.length)
            self.hidden[layer, number] = piece, hidden_LBd.detach().transpose(0, 1).cpu()
            picks_BLP = output[0].bank_TP.unflatten(0, (layout.batch_size, layout.length))
            self.picks[layer, number] = piece, picks_BLP.cpu()

        return keep

    def replay_routing(self, picks: dict[int, Tensor]) -> None:
        """Make the routers use these picks [samples, E, P], by layer number, from now on."""
        for layer, router in self.routers.items():
            router.replay = self._replay(picks[layer])

    def _replay(self, whole: Tensor) -> Any:
        def picks_TP(layout: TokenLayout) -> Tensor:
            piece = self.piece(self.numbers[id(layout)], layout.length)
            return piece.cut(whole).flatten(0, 1).to(layout.column_L.device)

        return picks_TP

    @torch.no_grad()
    def route_again(self, layer: int, hidden: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Yield the picks [B, L, P] that a layer's router makes itself from its part of `hidden` [samples, E, d]."""
        router = self.routers[layer]
        for number, (_, batch) in enumerate(self.batches):
            layout = batch.layout
            length = layout.length
            if router.sequence_parallel:
                length //= self.tp_group.size()
            hidden_LBd = self.piece(number, length).cut(hidden).transpose(0, 1).to(layout.column_L.device)
            own_LBrN = router.probabilities(hidden_LBd)
            [prob_LBrN] = enter_heads([own_LBrN], self.tp_group, router.sequence_parallel)
            routes, _ = router(own_LBrN, prob_LBrN, layout)
            picks_BLP = routes.bank_TP.unflatten(0, (layout.batch_size, layout.length))
            yield self.piece(number, layout.length), picks_BLP.cpu()
