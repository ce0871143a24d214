"""Verifying that a checkpoint is intact, by all ranks together before any of it is loaded."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sse.checkpoint.index import IndexRefusedError, read_index
from megatron_sse.checkpoint.manifest import Manifest, ManifestError, find_damage, read_manifest
from megatron_sse.checkpoint.names import COMMON, INDEX, STORAGE_FORMAT
from megatron_sse.errors import SharedUserError

logger = logging.getLogger(__name__)

# Files that Megatron-Core needs besides those that the index names.
_NEEDED = (INDEX, COMMON, STORAGE_FORMAT)


def first_intact(candidates: list[Path], hashes: bool) -> Path | None:
    """Return the first checkpoint that is intact; None where there are no candidates. Collective over all ranks.

    hashes: check those of all files, each read by one rank; otherwise those of small files, and only the sizes of
    larger ones. Raises SharedUserError, with every damaged file, where none is intact.
    """
    # The folder may change while the ranks list it, so all use rank 0's list.
    listed = [candidates]
    dist.broadcast_object_list(listed)
    found: list[str] = []
    for path in listed[0]:
        damaged = find_damage_together(path, hashes)
        if not damaged:
            return path
        if dist.get_rank() == 0:
            for line in damaged:
                logger.error("damaged checkpoint: %s", line)
            if path != listed[0][-1]:
                logger.warning("%s is damaged: falling back to the checkpoint before it", path)
        found += damaged
    if listed[0]:
        raise SharedUserError(f"checkpoint.resume: no checkpoint is intact: {'; '.join(found)}")
    return None


def find_damage_together(path: Path, hashes: bool) -> list[str]:
    """Return what is wrong with a checkpoint, one line for each file; the same on every rank.

    Collective over all ranks.
    """
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        mine = [str(error)]
    else:
        # Files are dealt out in the order of their sizes, so that the ranks have about the same to read.
        names = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
        mine = find_damage(path, manifest, names[dist.get_rank() :: dist.get_world_size()], hashes)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    damaged = sorted({line for lines in every for line in lines})
    # The index is opened only once its hash is known to match.
    return damaged or find_missing(path, manifest)


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error's message; those of torch.load are long."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].split(". ")[0]


def find_missing(path: Path, manifest: Manifest) -> list[str]:
    """Return the files that are needed but not in the manifest, or a pickle that asks for more than values."""
    try:
        needed = {*_NEEDED, *(where.relative_path for where in read_index(path).storage_data.values())}
        torch.load(path / COMMON, weights_only=True)
    except IndexRefusedError as error:
        return [str(error)]
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        return [f"{path / COMMON}: refused, {first_line(error)}"]
    return [f"{path / name}: not in the manifest" for name in sorted(needed - manifest.files.keys())]
