"""Benchmark of a training step against a plain PyTorch loop over the same mixers, weights and batches.

The plain loop is what one would write without Megatron-Core: residual layers of norms, mixers and products, the loss by
cross_entropy, clip_grad_norm_ and torch's AdamW, without the CPU stand-ins for CUDA. Both loops take the same steps in
turns, and their losses are compared.
"""

import argparse
import importlib.metadata
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from megatron_sse.config import RunConfig
from megatron_sse.data.batch import Batch
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.model import SSEMixer, build_model
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.device import Device, setup_device, without_stand_ins
from megatron_sse.parallel.groups import init_groups, init_process_group
from megatron_sse.tools.bench_recurrence import commit, cpu_name
from megatron_sse.training.loop import Run

WARM_UP = 3  # steps
# Largest difference of a step's losses, relative; sums of gradients round differently.
TOLERANCE = 1e-3


def describe_model(width: int, layers: str, sse: dict[str, int], **others: Any) -> dict[str, Any]:
    number = 6 if "*" in layers else 2
    model = {"num_layers": number, "hidden_size": width, "layers": layers, "sse": sse, "softmax": {"num_heads": 4}}
    return model | others


# Model, sequence length and sequences of a step.
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "width 32, 2 layers": (describe_model(32, "sse, softmax", {"num_heads": 2, "head_dim": 16}), 96, 4),
    "width 64, as configs/recall_mqar": (
        describe_model(64, "sse", {"num_heads": 2, "head_dim": 8, "num_partitions": 8}, input_convolution=4),
        *(96, 32),
    ),
    "width 128, as configs/quickstart": (
        describe_model(128, "5*sse, softmax", {"num_heads": 4, "head_dim": 32}),
        *(768, 4),
    ),
    "width 256": (describe_model(256, "5*sse, softmax", {"num_heads": 4, "head_dim": 64}), 768, 4),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=20, help="steps timed of each loop")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_config(case: str, folder: str) -> RunConfig:
    model, length, batch = CASES[case]
    data = {"mqar": {"pairs": length // 3, "keys": 256, "values": 64}}
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": 321, **model},
            "data": {"train": data, "sequence_length": length},
            "training": {
                "steps": 1000,
                "global_batch_size": batch,
                "micro_batch_size": batch,
                "precision": "fp32",
            },
            "optimizer": {"learning_rate": 1e-3},
            "monitor": {"folder": folder, "tensorboard": False},
        }
    )


class PlainLoop:
    """A training loop in plain PyTorch over a model's parameters and its mixers."""

    def __init__(self, model: LanguageModel, config: RunConfig) -> None:
        self.model, self.settings, self.one = model.train(), config.optimizer, torch.ones(())
        for module in model.modules():
            if isinstance(module, SSEMixer):
                module.metrics.reset(detailed=False)
        self.vocab_size = config.model.vocab_size
        self.parameters = list(model.parameters())
        decayed = [parameter for parameter in self.parameters if parameter.weight.decayed]
        others = [parameter for parameter in self.parameters if not parameter.weight.decayed]
        settings = self.settings
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            foreach=True,
        )

    def step(self, batch: Batch, rate: float) -> float:
        """Take a step and return its loss."""
        with without_stand_ins():
            self.optimizer.zero_grad()
            # Of the balance losses: their mean over tokens, as of the loss.
            batch.layout.layer_loss_scale = self.one
            loss = self.loss(batch)
            loss.backward()
            clip_grad_norm_(self.parameters, self.settings.clip_grad, foreach=True)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the counted tokens."""
        x_LBd = F.embedding(batch.tokens_BL.t(), self.model.embedding.word_embeddings.weight)
        for layer in self.model.decoder.layers:
            mixed, _ = layer.self_attention(
                rms_norm(x_LBd, layer.input_layernorm), None, packed_seq_params=batch.layout
            )
            x_LBd = x_LBd + mixed
            both = F.linear(rms_norm(x_LBd, layer.pre_mlp_layernorm), layer.mlp.linear_fc1.weight)
            gate, up = both.chunk(2, dim=-1)
            x_LBd = x_LBd + F.linear(F.silu(gate) * up, layer.mlp.linear_fc2.weight)
        x_LBd = rms_norm(x_LBd, self.model.decoder.final_layernorm)
        # Rows of the weight behind the vocabulary are padding.
        logits_LBv = F.linear(x_LBd, self.model.output_weight()[: self.vocab_size])
        loss = F.cross_entropy(logits_LBv.flatten(0, 1), batch.labels_BL.t().flatten(), reduction="none")
        return (loss * batch.loss_mask_BL.t().flatten()).sum() / batch.loss_tokens


def rms_norm(x: Tensor, module: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)


def compare(case: str, args: argparse.Namespace, device: Device, groups: ProcessGroupCollection) -> str:
    """Return a row of the table: milliseconds of both loops' steps, and the median of their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config := make_config(case, folder), groups, device, None)
        # A plain loop has nothing of the run's, and the same weights.
        [model] = build_model(config, groups, device)
        plain = PlainLoop(model, config)
        ours, theirs = (build_data_iterators(run.stage, groups, 0)[0] for _ in range(2))
        times: list[tuple[float, float]] = []
        for step in range(1, args.steps + WARM_UP + 1):
            start = time.process_time()
            result = run.advance(step, ours)
            middle = time.process_time()
            loss = plain.step(next(theirs), run.learning_rate(step))
            times.append((middle - start, time.process_time() - middle))
            if abs(loss - result.losses["loss"]) > TOLERANCE * loss:
                raise SystemExit(f"{case}, step {step}: losses {result.losses['loss']} and {loss} differ")
        run.monitor.close()
    rows = [(1e3 * own, 1e3 * other, own / other) for own, other in times[WARM_UP:]]
    own, other, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    return f"| {case} | {own:.1f} | {other:.1f} | {ratio:.2f} |"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = setup_device(0)
    init_process_group(device)
    groups = init_groups()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"commit {commit()}, {versions}, {cpu_name()}; load {load}; {args.steps} steps, {args.threads} thread(s)\n")
    print("| model | run: CPU ms a step | plain loop | ratio |\n|---|---|---|---|")
    for case in args.cases:
        print(compare(case, args, device, groups), flush=True)


if __name__ == "__main__":
    main()
