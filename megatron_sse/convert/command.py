"""`megatron-sse convert`: from Hugging Face folders to checkpoints of ours and back."""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_sse.checkpoint.full_weights import write_weights
from megatron_sse.config import RunConfig
from megatron_sse.config.load import COMMAND_LINE
from megatron_sse.convert.export import hf_settings, keep_from_source, write_beside
from megatron_sse.convert.request import Request
from megatron_sse.convert.upcycle import (
    Recipe,
    read_part,
    unused_names,
    upcycle_config,
    upcycle_recipes,
    upcycle_tensors,
)
from megatron_sse.durable import UNIQUE, fsync, unique
from megatron_sse.errors import UserError
from megatron_sse.hf.dense_settings import FAMILIES
from megatron_sse.hf.folder import write_json, write_tensors
from megatron_sse.hf.links import check_shapes, to_ours, to_theirs
from megatron_sse.hf.name_map import DENSE_NAMES, SSE_NAMES, model_links
from megatron_sse.lease import hold
from megatron_sse.pretrained.logits import check_can_compute, compute_logits
from megatron_sse.pretrained.open import HF, KINDS, OURS, Model, open_model

logger = logging.getLogger(__name__)

REPORT = "conversion.json"
# Number and length of the sequences whose logits are compared.
_COMPARED = (2, 128)


def run(request: Request) -> int:
    """Convert a model into a new folder, and compare both.

    Returns the exit status, 1 where the two models differ. Raises UserError.
    """
    model = open_model("SRC", request.source)
    kind = request.to or (HF if model.kind == OURS else OURS)
    _check_request(model, kind, request)
    folder = Path(request.target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"DST: got {folder}, which exists, allowed a new folder")
    check_can_compute(model)
    with hold(Path(os.path.abspath(folder)), "DST"):
        return _convert(model, folder, kind, request)


def _convert(model: Model, folder: Path, kind: str, request: Request) -> int:
    if request.pattern is not None:
        return _upcycle(model, folder, request.pattern, request.overrides)
    if kind == OURS:
        _to_ours(model, folder)
    else:
        _to_theirs(model, folder, kind)
    result = open_model("DST", folder)
    check_can_compute(result)
    return 0 if _compare(model, result, request.tolerance) else 1


def _check_request(model: Model, kind: str, request: Request) -> None:
    if kind not in KINDS:
        raise UserError(f"--to: got {kind}, allowed {', '.join(KINDS)}")
    if (model.kind == OURS) == (kind == OURS):
        allowed = OURS if model.kind != OURS else ", ".join(other for other in KINDS if other != OURS)
        raise UserError(f"--to: got {kind}, allowed {allowed}: {model.folder} is of kind {model.kind}")
    if request.pattern is None and request.overrides:
        raise UserError(f"{COMMAND_LINE}: got {request.overrides[0]}, allowed only with --pattern")
    if request.pattern is not None and kind != OURS:
        raise UserError(f"--pattern: got a conversion to {kind}, allowed to {OURS}")


def _to_ours(model: Model, folder: Path) -> None:
    sources = {link.ours: [part.name for part in link.theirs] for link in model.links}
    with _new_folder(folder) as partial:
        keep_from_source(model.folder, partial)
        _write_report(partial, model, OURS, sources)
        write_weights(partial, model.config, to_ours(model.links, model.weights))
    logger.info("%d tensors of %s (%s) are %d in %s", _num_parts(model), model.folder, model.kind, len(sources), folder)


def _to_theirs(model: Model, folder: Path, kind: str) -> None:
    settings = hf_settings(model.config, kind)
    links = model_links(model.config.model, DENSE_NAMES if kind in FAMILIES else SSE_NAMES)
    check_shapes({link.ours: tuple(link.shape()) for link in links}, model.weights, str(model.folder))
    sources = {part.name: [link.ours] for link in links for part in link.theirs}
    with _new_folder(folder) as partial:
        write_tensors(partial, to_theirs(links, model.weights))
        write_beside(model.folder, partial, settings, kind, _main_dtype(model.config))
        _write_report(partial, model, kind, sources)
    logger.info("%d tensors of %s are %d in %s (%s)", len(links), model.folder, len(sources), folder, kind)


def _upcycle(model: Model, folder: Path, pattern: str, overrides: Sequence[str]) -> int:
    config = upcycle_config(model, pattern, overrides)
    recipes = upcycle_recipes(model, config)
    unused = unused_names(model, recipes)
    with _new_folder(folder) as partial:
        keep_from_source(model.folder, partial)
        _write_report(partial, model, OURS, {recipe.link.ours: list(recipe.sources) for recipe in recipes}, unused)
        write_weights(partial, config, upcycle_tensors(model, config, recipes))
    parts = [source for recipe in recipes for source in recipe.sources]
    drawn, zeros = sum(source.startswith("drawn") for source in parts), parts.count("zeros")
    taken = len(parts) - drawn - zeros
    logger.info("layers: %s", pattern)
    logger.info("%d parts of tensors from the source, %d zeros, %d drawn; %s lists all", taken, zeros, drawn, REPORT)
    if unused:
        logger.warning("%d tensors of the source are not used, the first is %s", len(unused), unused[0])
    result = open_model("DST", folder)
    differing = _find_changed(model, result, recipes)
    relative, largest = _difference(model, result)
    logger.info("logits differ by %.1e (largest %.1e): SSE layers are new and have to be trained", relative, largest)
    if differing:
        logger.error("%d parts differ from those of the source, the first is %s", len(differing), differing[0])
        return 1
    logger.info("read back: all %d parts from the source are bitwise the same", taken)
    return 0


def _find_changed(model: Model, result: Model, recipes: list[Recipe]) -> list[str]:
    """Return the parts that the result should have from the source but has not, or not bit by bit."""
    there = set(model.weights.keys())
    changed = []
    for link in (recipe.link for recipe in recipes):
        for part, tensor in zip(link.theirs, link.split(result.weights.get(link.ours)), strict=True):
            if part.name in there and not torch.equal(tensor, read_part(model, part)):
                changed.append(part.name)
    return changed


def _compare(model: Model, result: Model, tolerance: float) -> bool:
    """Check whether both models give the same logits, and report it."""
    relative, largest = _difference(model, result)
    same = relative <= tolerance
    verdict = "the same" if same else "NOT THE SAME"
    line = f"logits differ by {relative:.1e} (root mean square, relative; largest {largest:.1e}), allowed {tolerance:g}"
    logger.log(logging.INFO if same else logging.ERROR, "%s: %s", line, verdict)
    return same


def _difference(model: Model, result: Model) -> tuple[float, float]:
    """Return how much the logits of random tokens differ: the relative root mean square, and the largest."""
    num_sequences, length = _COMPARED
    length = min(length, model.config.data.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(model.config.model.vocab_size, (num_sequences, length), generator=generator)
    before: Tensor = compute_logits(model, tokens_BL)
    change = compute_logits(result, tokens_BL) - before
    return (change.norm() / before.norm().clamp(min=1e-30)).item(), change.abs().max().item()


def _num_parts(model: Model) -> int:
    return sum(len(link.theirs) for link in model.links)


def _main_dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def _write_report(
    folder: Path, model: Model, kind: str, sources: dict[str, list[str]], unused: Iterable[str] = ()
) -> None:
    """Write which tensors each tensor was made of."""
    report = {"source": str(model.folder), "from": model.kind, "to": kind, "tensors": sources, "unused": list(unused)}
    write_json(folder / REPORT, report)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to write to, which gets its name at the end of the block. Raises UserError if that fails.

    This process holds the lease on `folder`, so other folders named as this one are of conversions that were killed.
    """
    partial = folder.with_name(f"{folder.name}.partial_{unique()}")
    left_behind = re.compile(rf"{re.escape(folder.name)}\.partial_{UNIQUE}")
    try:
        for path in folder.parent.iterdir():
            if left_behind.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.iterdir():
                fsync(path)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"DST: {folder} cannot be written: {error.strerror or error}") from None
