"""The folder of a run's checkpoints: iter_0000100/, ..., and a file `latest` that names the one to go on from.

A checkpoint is written as partial_iter_0000100 and renamed when it is complete and on the disk. One that goes is
renamed to removed_iter_0000100 first, one that is written anew to replaced_iter_0000100: no iter_* is ever half.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from megatron_sse.checkpoint.manifest import ManifestError, find_damage, read_manifest
from megatron_sse.checkpoint.names import ITERATION, LATEST, MANIFEST, PARTIAL, REMOVED, REPLACED, step_name
from megatron_sse.config import RunConfig
from megatron_sse.durable import fsync, write_durably
from megatron_sse.errors import UserError
from megatron_sse.run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the run keeps its checkpoints."""
    return Path(config.monitor.folder) / CHECKPOINTS


def step_folder(folder: Path, step: int) -> Path:
    """The checkpoint of the state after `step` steps."""
    return folder / step_name(step)


def partial_folder(folder: Path, step: int) -> Path:
    """The same while it is written."""
    return folder / f"{PARTIAL}{step_name(step)}"


def make_partial(folder: Path, step: int) -> None:
    """An empty folder to write a checkpoint to; what broken-off saves and removals left is deleted. Raises OSError."""
    for prefix in (PARTIAL, REMOVED):
        for left in folder.glob(f"{prefix}{ITERATION}*"):
            shutil.rmtree(left, ignore_errors=True)
    partial_folder(folder, step).mkdir(parents=True)


def promote(folder: Path, step: int) -> Path:
    """Give a complete partial folder its name and point `latest` to it. Raises OSError."""
    partial, final = partial_folder(folder, step), step_folder(folder, step)
    fsync(partial)
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    fsync(folder)
    write_durably(folder / LATEST, f"{final.name}\n".encode())
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def prune(folder: Path, keep_last: int, saved: Path) -> None:
    """Delete all but the newest `keep_last` checkpoints, and never the newest that is whole. Raises OSError.

    saved: has just been written, so that its hashes need not be computed again.
    """
    newest_first = list_checkpoints(folder)
    old = newest_first[keep_last:]
    if not old:
        return
    whole = next((path for path in newest_first if not find_all_damage(path, hashes=path != saved)), None)
    for path in old:
        if whole is not None and path != whole:
            removed = path.with_name(REMOVED + path.name)
            shutil.rmtree(removed, ignore_errors=True)
            shutil.rmtree(path.rename(removed))


def find_all_damage(checkpoint: Path, hashes: bool) -> list[str]:
    """What is wrong with a checkpoint's files, one line for each; hashes as in find_damage."""
    try:
        manifest = read_manifest(checkpoint)
    except ManifestError as error:
        return [str(error)]
    return find_damage(checkpoint, manifest, manifest.files, hashes)


def find_checkpoints(config: RunConfig) -> list[Path]:
    """Complete checkpoints that checkpoint.resume allows to go on from, the best first; none to start anew.

    auto: those of the run folder, that which `latest` names and then the newest. A path: a checkpoint, or a folder of
    checkpoints or run folder, of which the best is taken. Raises UserError where a path holds none.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        return []
    if resume == "auto":
        return _best_first(checkpoint_folder(config))
    return [named_checkpoint("checkpoint.resume", resume, "auto, none, or ")]


def check_named(config: RunConfig) -> None:
    """Look at what can be known of checkpoints before any process starts.

    Raises UserError where the run's folder cannot be written to, and where a checkpoint that the settings name is none
    or has a file that is damaged as far as its size says.
    """
    named = find_checkpoints(config) if config.checkpoint.resume not in ("auto", "none") else []
    weights = find_weights(config)
    for key, path in [("resume", path) for path in named] + ([("load_weights", weights)] if weights else []):
        damaged = find_all_damage(path, hashes=False)
        if damaged:
            raise UserError(f"checkpoint.{key}: got a damaged checkpoint: {damaged[0]}")
    check_writable(checkpoint_folder(config))


def find_weights(config: RunConfig) -> Path | None:
    """The checkpoint that checkpoint.load_weights names. Raises UserError where there is none."""
    given = config.checkpoint.load_weights
    return None if given is None else named_checkpoint("checkpoint.load_weights", given, "null or ")


def check_writable(folder: Path) -> None:
    """Make the folder of checkpoints. Raises UserError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"written")
            file.flush()
    except OSError as error:
        raise UserError(
            f"monitor.folder: got {folder.parent}, allowed a folder that can be written to ({error.strerror})"
        ) from None


def named_checkpoint(key: str, given: str, others: str = "") -> Path:
    """The checkpoint that a path means. Raises UserError, which names the setting `key` and what it allows."""
    path = Path(given)
    if (path / MANIFEST).is_file():
        return path
    if path.name.startswith(ITERATION) and path.is_dir():
        raise UserError(f"{key}: got {given}, which is no complete checkpoint: {path / MANIFEST}: no such file")
    found = _best_first(path) or _best_first(path / CHECKPOINTS)
    if not found:
        raise UserError(
            f"{key}: got {given}, allowed {others}the path of a checkpoint, of a folder of them or of a run"
        )
    return found[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return _newest_first(folder, f"{ITERATION}*")


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    steps = {path: path.name.rpartition("_")[2] for path in folder.glob(pattern)}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), reverse=True)


def _best_first(folder: Path) -> list[Path]:
    # Every process looks, the first speaks.
    warn = logger.warning if os.environ.get("RANK", "0") == "0" else logger.debug
    complete = []
    for path in _newest_first(folder, f"*{ITERATION}*"):
        # Left by a save that was broken off between two renames.
        replaced = path.name.startswith(REPLACED) and not (folder / path.name.removeprefix(REPLACED)).exists()
        if (path.name.startswith(ITERATION) or replaced) and (path / MANIFEST).is_file():
            complete.append(path)
        else:
            warn("%s is ignored: it is no complete checkpoint", path)
    pointer = folder / LATEST
    if not pointer.is_file():
        return complete
    named = folder / pointer.read_text(errors="replace").strip()
    if named not in complete:
        warn("%s is ignored: it names no complete checkpoint; taking the newest", pointer)
        return complete
    return [named, *(path for path in complete if path != named)]
