"""The folder of a run's checkpoints: iter_0000100/, ..., and a file `latest` that names the one to resume from.

A checkpoint is written as partial_iter_0000100 and renamed when it is complete and on the disk. Before one is deleted
it is renamed to removed_iter_0000100, and before one is replaced to replaced_iter_0000100, so that no iter_* is ever
incomplete.
"""

import errno
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
    """Return the folder of the run's checkpoints."""
    return Path(config.monitor.folder) / CHECKPOINTS


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of the state after `step` steps."""
    return folder / step_name(step)


def partial_folder(folder: Path, step: int) -> Path:
    """Return the folder of that checkpoint while it is written."""
    return folder / f"{PARTIAL}{step_name(step)}"


def make_partial(folder: Path, step: int) -> None:
    """Make an empty folder to write a checkpoint to. Raises OSError.

    What interrupted saves and removals left behind is deleted.
    """
    clear_left_overs(folder)
    partial_folder(folder, step).mkdir(parents=True)


def find_left_overs(folder: Path) -> list[Path]:
    """Return what interrupted saves and removals left behind, which the next save deletes."""
    return [path for prefix in (PARTIAL, REMOVED) for path in folder.glob(f"{prefix}{ITERATION}*")]


def clear_left_overs(folder: Path) -> bool:
    """Delete what interrupted saves and removals left behind; return whether there was anything."""
    left = find_left_overs(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return bool(left)


def promote(folder: Path, step: int) -> Path:
    """Rename a complete partial folder to its final name and point `latest` to it. Raises OSError."""
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
    """Delete all but the newest `keep_last` checkpoints, and never the newest that is intact. Raises OSError.

    saved: a checkpoint that has just been written, whose hashes need not be checked.
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
    """Return what is wrong with a checkpoint's files, one line for each; hashes as in find_damage."""
    try:
        manifest = read_manifest(checkpoint)
    except ManifestError as error:
        return [str(error)]
    return find_damage(checkpoint, manifest, manifest.files, hashes)


def find_checkpoints(config: RunConfig) -> list[Path]:
    """Return the complete checkpoints that checkpoint.resume allows, the best first; an empty list to start anew.

    auto: those of the run folder, the one that `latest` names and then the newest first. A path: the checkpoint that it
    names, or the best of the folder of checkpoints or run folder. Raises UserError where a path holds none.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        return []
    if resume == "auto":
        return _best_first(checkpoint_folder(config))
    return [named_checkpoint("checkpoint.resume", resume, "auto, none, or ")]


def check_named(config: RunConfig) -> None:
    """Check the checkpoints that the settings name before any process starts.

    Raises UserError where the run's folder cannot be written to, where a path holds no checkpoint, and where a file of
    one has the wrong size (or, if it is small, the wrong hash).
    """
    named = find_checkpoints(config) if config.checkpoint.resume not in ("auto", "none") else []
    weights = find_weights(config)
    for key, path in [("resume", path) for path in named] + ([("load_weights", weights)] if weights else []):
        damaged = find_all_damage(path, hashes=False)
        if damaged:
            raise UserError(f"checkpoint.{key}: got a damaged checkpoint: {damaged[0]}")
    check_writable(checkpoint_folder(config))


def find_weights(config: RunConfig) -> Path | None:
    """Return the checkpoint that checkpoint.load_weights names, or None. Raises UserError where the path holds none."""
    given = config.checkpoint.load_weights
    return None if given is None else named_checkpoint("checkpoint.load_weights", given, "null or ")


def check_writable(folder: Path) -> None:
    """Make the folder of checkpoints, and write to it. Raises UserError where that fails.

    Where there is no space, what interrupted saves left behind is deleted first.
    """
    try:
        try:
            _write_something(folder)
        except OSError as error:
            # Other ranks come later than rank 0 or the launcher, and might delete what is being written.
            is_first = os.environ.get("RANK", "0") == "0"
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (is_first and clear_left_overs(folder)):
                raise
            _write_something(folder)
    except OSError as error:
        raise UserError(
            f"monitor.folder: got {folder.parent}, allowed a folder that can be written to ({error.strerror})"
        ) from None


def _write_something(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"written")
        file.flush()


def named_checkpoint(key: str, given: str, others: str = "") -> Path:
    """Return the checkpoint that a path names, or the best of a folder of checkpoints or run folder.

    key: the setting that gives the path. others: what the setting allows besides a path, for the message. Raises
    UserError.
    """
    path = Path(given)
    if (path / MANIFEST).is_file():
        return path
    if path.name.startswith(ITERATION) and path.is_dir():
        raise UserError(f"{key}: {given} is not a complete checkpoint: {path / MANIFEST} not found")
    found = _best_first(path) or _best_first(path / CHECKPOINTS)
    if not found:
        wrong = "holds no checkpoint" if path.exists() else "not found"
        raise UserError(
            f"{key}: {given} {wrong}; give {others}the path of a checkpoint, of a folder of them or of a run"
        )
    return found[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return _newest_first(folder, f"{ITERATION}*")


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    steps = {path: path.name.rpartition("_")[2] for path in folder.glob(pattern)}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), reverse=True)


def _best_first(folder: Path) -> list[Path]:
    # Every process comes through here; only rank 0 warns.
    warn = logger.warning if os.environ.get("RANK", "0") == "0" else logger.debug
    complete = []
    for path in _newest_first(folder, f"*{ITERATION}*"):
        # A replaced_* without its iter_* is complete: a save was interrupted between its two renames.
        replaced = path.name.startswith(REPLACED) and not (folder / path.name.removeprefix(REPLACED)).exists()
        if (path.name.startswith(ITERATION) or replaced) and (path / MANIFEST).is_file():
            complete.append(path)
        else:
            warn("%s is ignored: it is not a complete checkpoint", path)
    pointer = folder / LATEST
    if not pointer.is_file():
        return complete
    named = folder / pointer.read_text(errors="replace").strip()
    if named not in complete:
        warn("%s is ignored: it names no complete checkpoint; using the newest", pointer)
        return complete
    return [named, *(path for path in complete if path != named)]
