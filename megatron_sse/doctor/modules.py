"""Modules, attention and CUDA settings that a run uses on this machine's GPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import torch

from megatron_sse.config import RunConfig
from megatron_sse.doctor.finding import GOOD, OPEN, Finding
from megatron_sse.model.backend import attention_obstacle, describe_weight_gradients, find_installed
from megatron_sse.parallel.device import CONNECTIONS, needs_one_connection


def check_modules() -> Iterator[Finding]:
    """Name the modules for GPUs that are installed. A run starts without them, with plain ones in their place."""
    installed = find_installed()
    if installed.transformer_engine:
        version = importlib.metadata.version("transformer-engine")
        yield Finding(GOOD, "Transformer Engine", f"{version}: linear layers, norms and attention")
    else:
        present = importlib.util.find_spec("transformer_engine") is not None
        state = "installed, but cannot be imported" if present else "not installed"
        advice = "./run.sh compiles it, and .venv/transformer_engine.log says what failed"
        yield Finding(OPEN, "Transformer Engine", f"{state}: plain modules take its place, slower; {advice}")
    gradients = describe_weight_gradients(installed)
    advice = "" if installed.apex else "; docs/gpu.md tells how to build Apex"
    yield Finding(GOOD if installed.apex else OPEN, "weight gradients", gradients + advice)


def check_attention(config: RunConfig) -> Iterator[Finding]:
    """Name the attention of softmax layers on this machine's GPUs."""
    if "softmax" not in config.model.layer_kinds():
        return
    installed = find_installed()
    obstacle: str | None = "Transformer Engine cannot be imported"
    if installed.transformer_engine:
        obstacle = attention_obstacle(config, torch.cuda.get_device_capability(0), installed.flash_attention)
    if obstacle is None:
        yield Finding(GOOD, "attention", "Transformer Engine")
    else:
        yield Finding(OPEN, "attention", f"plain torch, slower: {obstacle}")


def check_connections(config: RunConfig) -> Iterator[Finding]:
    """Compare CUDA_DEVICE_MAX_CONNECTIONS, where it is set, with what the run would set."""
    given = os.environ.get(CONNECTIONS)
    if given is None:
        return
    wanted = needs_one_connection(config.parallel.tensor)
    if wanted == (given == "1"):
        yield Finding(GOOD, "CUDA connections", f"{CONNECTIONS} is {given}")
    elif wanted:
        text = f"{CONNECTIONS} is {given}; unset it: with 1 the tensor group's communication overlaps with computation"
        yield Finding(OPEN, "CUDA connections", text)
    else:
        text = f"{CONNECTIONS} is 1, which holds up overlapped communication; unset it"
        yield Finding(OPEN, "CUDA connections", text)
