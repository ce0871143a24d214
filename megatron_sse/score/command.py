"""`megatron-sse score`: a model's logits for given tokens."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from megatron_sse.durable import output_file
from megatron_sse.errors import UserError
from megatron_sse.installed import require
from megatron_sse.pretrained.logits import check_can_compute, compute_logits
from megatron_sse.pretrained.open import open_model
from megatron_sse.score.request import Request

logger = logging.getLogger(__name__)

TOKENS, LOGITS = "input_ids", "logits"


def run(request: Request) -> int:
    """Write the logits of the tokens in one safetensors file to another; returns the exit status. Raises UserError."""
    require("safetensors", "score")
    from safetensors.torch import save

    model = open_model("--checkpoint", request.checkpoint)
    check_can_compute(model)
    tokens_BL = _read_tokens(request.input, model.config.model.vocab_size)
    logits_BLv = compute_logits(model, tokens_BL)
    try:
        # Not safetensors' save_file, which replaces what is no file, and hides the file from others.
        with output_file(Path(request.output)) as file:
            file.write(save({LOGITS: logits_BLv.contiguous()}))
    except OSError as error:
        raise UserError(f"--output: {request.output} cannot be written ({error.strerror})") from None
    shape = " x ".join(map(str, logits_BLv.shape))
    logger.info("logits of %s (%s): %s, %s", model.folder, model.kind, shape, request.output)
    return 0


def _read_tokens(path: str, vocab_size: int) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"--input: {path}: not found")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--input: {path} cannot be read as safetensors ({' '.join(str(error).split())})") from None
    if TOKENS not in tensors:
        raise UserError(f"--input: {path} has {', '.join(tensors) or 'nothing'}, needed {TOKENS}")
    tokens_BL = tensors[TOKENS]
    if tokens_BL.dim() != 2 or not tokens_BL.numel() or tokens_BL.dtype not in (torch.int64, torch.int32, torch.int16):
        shape = list(tokens_BL.shape)
        raise UserError(f"--input: {path}: {TOKENS} is {tokens_BL.dtype} {shape}, allowed integers [B, L]")
    lowest, highest = tokens_BL.min().item(), tokens_BL.max().item()
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise UserError(f"--input: {path}: {TOKENS} holds {wrong}, allowed 0 to {vocab_size - 1}")
    return tokens_BL.long()
