"""The Python interface for notebooks and scripts, behind `import megatron_sse`; docs/python.md shows it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_sse.checkpoint.folders import checkpoint_folder, list_checkpoints
from megatron_sse.config import RunConfig, load_config
from megatron_sse.costs.gpus import GPUS, GPUS_PER_NODE, Gpu
from megatron_sse.errors import USER_ERROR_EXIT, UserError
from megatron_sse.inference.cache import Cache
from megatron_sse.inference.prompts import check_length, check_tokens, encode_prompts
from megatron_sse.inference.run import DEFAULT_CHUNK, cut, feed, generate, logits_of
from megatron_sse.inference.sampling import Sampler
from megatron_sse.inspection.measure import Layer, measure_layers
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import groups_of_one
from megatron_sse.planning.command import plan_run
from megatron_sse.planning.report import describe_layout
from megatron_sse.planning.search import Layout, longest_sequence
from megatron_sse.pretrained.chat import open_chat
from megatron_sse.pretrained.network import build_and_load, inference_config
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import Tokenizer, open_tokenizer
from megatron_sse.run_folder import METRICS

__all__ = ["LoadedModel", "RunPlan", "TrainedRun", "load", "load_config", "plan", "train"]


class LoadedModel:
    """A model in this process, on its GPU if there is one.

    Attributes:
        config: the settings that it was built with.
    """

    def __init__(self, path: str | Path, precision: Literal["fp32", "bf16"] | None):
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1:
            raise UserError(f"load: got {world_size} processes, allowed 1; `megatron-sse generate` splits a model")
        self._model = open_model("path", path)
        self.config: RunConfig = inference_config(self._model, precision)
        device = setup_device(0)
        self._groups = groups_of_one(device)
        self._net = build_and_load(self._model, self.config, self._groups, device)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, with encode(text). Raises UserError where its folder has none."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._model)
        return self._tokenizer

    def generate(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 100,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool = False,
        any_length: bool = False,
    ) -> list[str]:
        """Return the text that follows each prompt, as `megatron-sse generate` does.

        chat: each prompt is what a user says, and is rendered by the chat template kept with the model. any_length:
        let softmax layers have longer sequences than they were trained on. Raises UserError.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        named = [(f"prompt {number}", text) for number, text in enumerate(texts, 1)]
        rendered = open_chat(self._model, self.tokenizer) if chat else None
        fed = encode_prompts(named, self.tokenizer, continues=False, chat=rendered)
        vocab_size, model = self.config.model.vocab_size, self.config.model
        for (name, _), prompt in zip(named, fed, strict=True):
            check_tokens(name, prompt, vocab_size)
            if not any_length:
                number = len(prompt) + max_tokens
                check_length(model, self.config.data.sequence_length, number, f"{name}: got {number} tokens in all")
        streams = [self.tokenizer.stream() for _ in fed]
        written = [""] * len(fed)
        cache, end = Cache(self._net, len(fed)), (rendered or self.tokenizer).end
        for tokens in generate(self._net, cache, fed, max_tokens, Sampler(vocab_size, temperature, top_p, seed), end):
            for place, token in enumerate(tokens):
                if token is not None and token != end:
                    written[place] += streams[place](token)
        closing = "" if rendered is None else rendered.closing
        return [text.removesuffix(closing) for text in written]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits after each of the tokens of a sequence: [L, v], fp32, on the CPU. Raises UserError."""
        check_tokens("tokens", tokens, self.config.model.vocab_size)
        cache, found = Cache(self._net, 1), []
        for pieces in cut([len(tokens)], DEFAULT_CHUNK):
            for _, start, count in pieces:
                hidden_T1d = feed(self._net, cache, torch.as_tensor(tokens[start : start + count]), [0], [count])
                found.append(logits_of(self._net, hidden_T1d)[:, : self.config.model.vocab_size].cpu())
        return torch.cat(found)

    def states(self, text: str) -> list[Layer]:
        """Return what each layer does with a text: use of partitions, rank and half-life of its states.

        docs/states.md explains the numbers. Raises UserError.
        """
        [tokens] = encode_prompts([("text", text)], self.tokenizer, continues=False)
        check_tokens("text", tokens, self.config.model.vocab_size)
        return measure_layers(self._net, self.config.model.layer_kinds(), [tokens], DEFAULT_CHUNK, self._groups.tp)


def load(path: str | Path, precision: Literal["fp32", "bf16"] | None = None) -> LoadedModel:
    """Load the model of a run folder, a checkpoint or a Hugging Face folder into this process.

    precision: of weights and activations; by default the checkpoint's. Raises UserError.
    """
    return LoadedModel(path, precision)


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended. checkpoint: its newest one."""

    folder: Path
    checkpoint: Path

    def metrics(self) -> list[dict[str, float]]:
        """Return what was reported, a dictionary for each reported step, in the order of the steps."""
        return [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]


def train(config: RunConfig) -> TrainedRun:
    """Train a model as `megatron-sse train` does, in processes of its own, and print their lines.

    Where the run's folder has a checkpoint, the run resumes from it. Raises UserError for settings that do not fit this
    machine, RuntimeError where the run ended in another way; both with the last line that was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        status, last = _run_and_print(_command(file))
    if status == USER_ERROR_EXIT:
        raise UserError(last)
    if status:
        raise RuntimeError(f"the run ended with exit status {status}: {last}")
    return TrainedRun(Path(config.monitor.folder), list_checkpoints(checkpoint_folder(config))[0])


def _command(file: Path) -> list[str]:
    """Return the command that trains what a YAML file describes."""
    return [sys.executable, "-m", "megatron_sse", "train", str(file)]


def _run_and_print(command: list[str]) -> tuple[int, str]:
    """Run a command and print its lines as they come, also in a notebook; return its exit status and last line."""
    last = ""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last = line.rstrip("\n")
                print(last, flush=True)
        except KeyboardInterrupt:
            # A notebook interrupts only its own process.
            process.send_signal(signal.SIGINT)
            raise
    return process.returncode, last


@dataclass(frozen=True)
class RunPlan:
    """Memory, traffic and time of a run, as `megatron-sse plan` works them out; str() gives its report.

    layout: memory and bytes sent of each pipeline stage, and the parts of a step's time.
    """

    layout: Layout
    gpu: Gpu

    @property
    def fits(self) -> bool:
        """Whether every GPU has the memory, with a tenth left free."""
        return self.layout.fits(self.gpu)

    @property
    def peak_bytes(self) -> int:
        """Memory of the GPU that needs the most."""
        return self.layout.peak

    @property
    def step_seconds(self) -> float:
        """Time of a step at the ceilings of the GPUs: no run is faster."""
        return self.layout.time.total

    def __str__(self) -> str:
        sizes = self.layout.sizes
        longest = longest_sequence(sizes.config, sizes.data_size, self.gpu)
        return "\n".join(describe_layout(self.layout, self.gpu, longest))


def plan(config: RunConfig, gpus: int | None = None, gpu: str = "h100", gpus_per_node: int = GPUS_PER_NODE) -> RunPlan:
    """Work out what a run needs, from its settings alone.

    gpus: their number, by default as many as the layout needs. gpu: a name of costs.gpus.GPUS. Raises UserError where
    layout, batch and number do not divide.
    """
    if gpu not in GPUS:
        raise UserError(f"gpu: got {gpu}, allowed {', '.join(GPUS)}")
    return RunPlan(plan_run(config, gpus, GPUS[gpu], gpus_per_node), GPUS[gpu])
