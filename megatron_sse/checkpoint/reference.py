"""The model that a run is measured against, a reference or a teacher: it stays the same when the run is resumed."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from megatron_sse.checkpoint.data import SavedReference, read_data
from megatron_sse.checkpoint.folders import step_folder
from megatron_sse.checkpoint.manifest import read_manifest
from megatron_sse.checkpoint.names import MANIFEST
from megatron_sse.config import RunConfig
from megatron_sse.data.fingerprint import add_file
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)


def keep_reference(config: RunConfig, key: str, newest: Path, resume: Path | None, use: str) -> Path:
    """Return the folder of the model that a run is measured against: `newest`, or on resume the one that it was.

    key: the setting that names it. newest: the newest checkpoint there by now, or a Hugging Face folder. resume: the
    checkpoint that the run resumes from. use: the setting that it is for. Raises UserError where it is gone or another,
    unless checkpoint.changed_data is accept.
    """
    saved = None if resume is None else read_data(resume)
    if saved is None or saved.reference is None:
        return newest
    then = saved.reference
    for path in (newest, step_folder(newest.parent, then.step)):
        if path.is_dir() and describe_reference(path) == then:
            return path
    if config.checkpoint.changed_data == "accept":
        logger.warning("%s: measured from %s from here on, and before from another model", use, newest)
        return newest
    raise UserError(
        f"{key}: got {newest}, and {use} has been measured from another model since the run began (after {then.step} "
        f"steps, hash {then.hash[:12]}); put it back, or set checkpoint.changed_data: accept to measure from this one"
    )


def describe_reference(folder: Path) -> SavedReference:
    """Return what a run's checkpoints say of the model that it is measured against. Raises UserError.

    The manifest of a checkpoint has the hashes of its files. Other folders are hashed as token files are.
    """
    if (folder / MANIFEST).is_file():
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        return SavedReference(read_manifest(folder).step, digest)
    whole = hashlib.sha256()
    for path in sorted((*folder.glob("config.json"), *folder.glob("*.safetensors"))):
        add_file(whole, path.name, path)
    return SavedReference(0, whole.hexdigest())
