"""Measures which softmax layers of a model are missed most when an SSE layer takes their place.

    python -m megatron_sse.tools.layer_sensitivity SRC --data PREFIX --keep 1 [model.sse.key=value ...]

SRC is a Hugging Face folder as for `megatron-sse convert --pattern`. One layer at a time is replaced, all others stay,
and the loss on the token file is measured before any training. The last line is a pattern for `convert` that keeps the
`--keep` layers whose replacement costs most. It is a guess: training may make up for one layer more easily than for
another. docs/distill.md shows an example. Exit status 0, or 2 for a wrong request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sse.convert.upcycle import upcycle_config, upcycle_recipes, upcycle_tensors
from megatron_sse.data.checks import TokenFile, check_token_file
from megatron_sse.errors import USER_ERROR_EXIT, UserError
from megatron_sse.evaluation.perplexity import measure_losses
from megatron_sse.evaluation.read import Reader
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import Model, open_model

SSE, SOFTMAX = "sse", "softmax"
# Sequences, and tokens of all of them, that are read at once.
_BATCH, _CHUNK = 8, 8192


@dataclass(frozen=True)
class Upcycled(Model):
    """A source with SSE layers in place of some of its layers, as `convert --pattern` makes it."""

    source: Model

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return upcycle_tensors(self.source, self.config, upcycle_recipes(self.source, self.config))


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the pattern; return the exit status (see the module)."""
    options = _parse(arguments)
    try:
        source = open_model("SRC", options.source)
        file = check_token_file("--data", options.data, source.config.model.vocab_size)
        num_layers = source.config.model.num_layers
        for name, most in (("keep", num_layers), ("length", 1 << 30), ("tokens", 1 << 40)):
            if not 1 <= getattr(options, name) <= most:
                raise UserError(f"--{name}: got {getattr(options, name)}, allowed 1 to {most}")
        losses = measure_layers(source, file, options.length, options.tokens, options.overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR_EXIT
    whole, *replaced = losses
    print(f"loss of {source.folder}, all layers softmax: {whole:.4f} nats per token\n")
    print("| layer replaced | loss | more |\n|---|---|---|")
    for number, loss in enumerate(replaced, 1):
        print(f"| {number} | {loss:.4f} | {loss - whole:.4f} |")
    print(f'\n--pattern "{keep_most(replaced, options.keep)}"')
    return 0


def measure_layers(source: Model, file: TokenFile, length: int, num_tokens: int, overrides: list[str]) -> list[float]:
    """Return the loss of the source, and with each layer replaced alone, in nats per token. Raises UserError."""
    num_layers = source.config.model.num_layers
    patterns = [[SSE if place == other else SOFTMAX for place in range(num_layers)] for other in range(num_layers)]
    configs = [upcycle_config(source, ", ".join(pattern), overrides) for pattern in patterns]
    models: list[Model] = [source]
    models += [Upcycled(source.kind, source.folder, config, source.weights, [], source) for config in configs]
    with inference_groups(1) as (groups, device), torch.no_grad():
        losses = []
        for model in models:
            config = inference_config(model, None)
            net = build_and_load(model, config, groups, device)
            reader = Reader(net, config.model.vocab_size, _BATCH, _CHUNK)
            losses.append(measure_losses(reader, file, length, num_tokens).loss)
    return losses


def keep_most(losses: list[float], keep: int) -> str:
    """Return the pattern that keeps the layers with the largest losses, the first of equal ones."""
    order = sorted(range(len(losses)), key=lambda layer: -losses[layer])
    kept = set(order[:keep])
    return ", ".join(SOFTMAX if layer in kept else SSE for layer in range(len(losses)))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="Hugging Face folder of a softmax model")
    parser.add_argument("--data", metavar="PREFIX", required=True, help="token file")
    parser.add_argument("--keep", type=int, required=True, help="number of softmax layers to keep")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a piece; default 2048")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="tokens of the file; default 65536")
    parser.add_argument("overrides", metavar="model.sse.key=value", nargs="*", help="settings of the SSE layers")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
