"""Verifying that a checkpoint is intact, by all ranks together before any of it is loaded."""

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sse.checkpoint.common import read_common
from megatron_sse.checkpoint.data import read_data
from megatron_sse.checkpoint.index import read_index
from megatron_sse.checkpoint.manifest import Manifest, ManifestError, find_damage, read_manifest
from megatron_sse.checkpoint.names import COMMON, DATA, INDEX, STORAGE_FORMAT, TOKENS
from megatron_sse.errors import SharedUserError, UserError
from megatron_sse.reading import NotFoundError, read_json, read_yaml
from megatron_sse.run_folder import CONFIG

logger = logging.getLogger(__name__)

# Files that Megatron-Core needs besides those that the index names.
_NEEDED = (INDEX, COMMON, STORAGE_FORMAT)


def first_intact(candidates: list[Path], hashes: bool, key: str = "checkpoint.resume") -> Path | None:
    """Return the first checkpoint that is intact; None where there are no candidates. Collective over all ranks.

    hashes: check those of all files, each read by one rank; otherwise those of small files, and only the sizes of
    larger ones. key: the setting that names them. Raises SharedUserError, with every damaged file, where none is
    intact.
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
        raise SharedUserError(f"{key}: no checkpoint is intact: {'; '.join(found)}")
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
    # Files are opened only once their hashes are known to match.
    return _join(mine) or _join(find_missing(path, manifest))


def _join(mine: list[str]) -> list[str]:
    """Return the lines of all ranks, each once, in the same order on every rank."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return sorted({line for lines in every for line in lines})


def find_missing(path: Path, manifest: Manifest, names: Container[str] | None = None) -> list[str]:
    """Return the files that are needed but not in the manifest, and those whose content is of no use, a line for each.

    A manifest may vouch for a file that was damaged before it was hashed, or made by somebody else. names: the files
    that may be opened, as their hashes are those of the manifest; None for all.
    """
    found: list[str] = []
    needed = {*_NEEDED}
    for name, read in _READ.items():
        if names is not None and name not in names:
            continue
        try:
            content = read(path)
        except NotFoundError:
            # Described below where it is needed.
            continue
        except UserError as error:
            found.append(str(error))
            continue
        if isinstance(content, Metadata):
            needed |= {where.relative_path for where in content.storage_data.values()}
    missing = sorted(needed - manifest.files.keys())
    return found + [f"{path / name}: not in the manifest" for name in missing]


@dataclass(frozen=True)
class StorageFormat:
    """Megatron-Core's description of a checkpoint's format."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: int = 1
    common_backend: Literal["torch"] = "torch"
    common_backend_version: int = 1


# What opens each file that a run reads besides the tensors, and checks its types.
_READ: dict[str, Callable[[Path], object]] = {
    INDEX: read_index,
    COMMON: read_common,
    DATA: read_data,
    CONFIG: lambda path: read_yaml(path / CONFIG, dict[str, Any]),
    STORAGE_FORMAT: lambda path: read_json(path / STORAGE_FORMAT, StorageFormat),
    TOKENS: lambda path: read_json(path / TOKENS, dict[str, Any]),
}
