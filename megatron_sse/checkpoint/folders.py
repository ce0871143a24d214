"""The folder of a run's checkpoints: iter_0000100/, ..., and a file `latest` that names the one to resume from.

A checkpoint is written as partial_UNIQUE_iter_0000100 and renamed when it is complete and on the disk. Before one is
deleted it is renamed to removed_iter_0000100, and before one is replaced to replaced_iter_0000100, so that no iter_* is
ever incomplete.
"""

import errno
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from megatron_sse.checkpoint.manifest import ManifestError, find_damage, read_manifest
from megatron_sse.checkpoint.names import ITERATION, LATEST, MANIFEST, PARTIAL, REMOVED, REPLACED, UNUSABLE, step_name
from megatron_sse.config import RunConfig
from megatron_sse.durable import UNIQUE, fsync, unique, write_durably
from megatron_sse.errors import SharedUserError, UserError, not_writable
from megatron_sse.lease import Lease
from megatron_sse.reading import read_bytes
from megatron_sse.run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)

_MAX_POINTER = 1 << 12
_LED_NOWHERE = "every step from it was skipped"
# Also the names that versions before the unique ones gave.
_LEFT_BEHIND = re.compile(rf"({PARTIAL}({UNIQUE}_)?|{REMOVED}){ITERATION}\d+|{LATEST}\.{UNIQUE}\.tmp|{LATEST}\.tmp")


def checkpoint_folder(config: RunConfig) -> Path:
    """Return the folder of the run's checkpoints."""
    return Path(config.monitor.folder) / CHECKPOINTS


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of the state after `step` steps."""
    return folder / step_name(step)


def make_partial(folder: Path, step: int) -> Path:
    """Make an empty folder of a unique name to write a checkpoint to, and return it. Raises OSError.

    What interrupted saves and removals left behind is deleted: their processes have ended, or have lost the lease on
    the run's folder to this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_left_overs(folder)
    partial = folder / f"{PARTIAL}{unique()}_{step_name(step)}"
    partial.mkdir()
    return partial


def find_left_overs(folder: Path) -> list[Path]:
    """Return what interrupted saves and removals left behind, which the next save deletes. Raises OSError."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _LEFT_BEHIND.fullmatch(path.name)]


def clear_left_overs(folder: Path) -> None:
    """Delete what interrupted saves and removals left behind; only for the holder of the lease. Raises OSError."""
    for path in find_left_overs(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def promote(partial: Path, final: Path, is_usable: bool = True) -> None:
    """Rename a complete partial folder to its final name and, if it is usable, point `latest` to it. Raises OSError."""
    folder = final.parent
    fsync(partial)
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    fsync(folder)
    if is_usable:
        write_durably(folder / LATEST, f"{final.name}\n".encode())
    shutil.rmtree(replaced, ignore_errors=True)


def prune(folder: Path, keep_last: int, saved: Path) -> None:
    """Delete all but the newest `keep_last` usable checkpoints, and never the newest that is intact. Raises OSError.

    Those that are not usable do not count; they are deleted with usable ones of their age. saved: a checkpoint that has
    just been written, whose hashes need not be checked.
    """
    newest_first = list_checkpoints(folder)
    usable = [path for path in newest_first if why_unusable(path) is None]
    kept = usable[:keep_last]
    old = [path for path in newest_first if path not in kept and (not kept or _step(path) < _step(kept[0]))]
    if not old:
        return
    whole = next((path for path in usable if not find_all_damage(path, hashes=path != saved)), None)
    for path in old:
        if whole is not None and path != whole:
            removed = path.with_name(REMOVED + path.name)
            shutil.rmtree(removed, ignore_errors=True)
            shutil.rmtree(path.rename(removed))


def why_unusable(checkpoint: Path) -> str | None:
    """Return why a run would get nowhere from a checkpoint, intact or not; None where nothing is known against it."""
    if (checkpoint / UNUSABLE).exists():
        return _LED_NOWHERE
    try:
        return None if read_manifest(checkpoint).finite else "its last step was skipped"
    except ManifestError:
        return None


def mark_unusable(checkpoint: Path) -> None:
    """Note in a checkpoint that it is of no use. Raises OSError."""
    write_durably(checkpoint / UNUSABLE, f"{_LED_NOWHERE}\n".encode())


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


def describe_resume(config: RunConfig) -> str:
    """Return a line that says where a run started by the same command resumes."""
    if config.checkpoint.resume != "auto":
        return f"checkpoints: {checkpoint_folder(config)} (checkpoint.resume=auto resumes from the newest)"
    try:
        found = _best_first(checkpoint_folder(config), quiet=True)
    except UserError as error:
        return str(error)
    if not found:
        return "there is no checkpoint"
    if _step(found[0]) >= config.training.steps:
        return f"checkpoint: {found[0]} ({describe_finished(config.training.steps)})"
    return f"checkpoint: {found[0]} (run the same command to resume from it)"


def describe_finished(steps: int) -> str:
    """Return what all commands say about a run that has taken its `steps` steps."""
    return f"all {steps} steps are done; raise training.steps to train longer"


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
    distill = config.training.distill
    if distill is not None and not Path(distill.teacher).is_dir():
        named_checkpoint("training.distill.teacher", distill.teacher)
    check_writable(checkpoint_folder(config))


def find_weights(config: RunConfig) -> Path | None:
    """Return the checkpoint that checkpoint.load_weights names, or None. Raises UserError where the path holds none."""
    given = config.checkpoint.load_weights
    return None if given is None else named_checkpoint("checkpoint.load_weights", given, "null or ")


def check_writable(folder: Path, lease: Lease | None = None) -> None:
    """Make the folder of checkpoints, and write to it. Raises UserError where that fails.

    Where there is no space, what interrupted saves left behind is deleted first by the holder of the lease on the run's
    folder. Without the lease it may be what a run that is alive is writing: then it only counts as space to come.
    """
    try:
        try:
            _write_something(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not find_left_overs(folder):
                raise
            if lease is not None:
                lease.check()
                clear_left_overs(folder)
                _write_something(folder)
    except OSError as error:
        raise not_writable("monitor.folder", folder.parent, error) from None


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
    # Numbers of other lengths are none of ours.
    named = [path for path in folder.glob(pattern) if re.search(r"_\d{7,18}$", path.name, re.ASCII)]
    return sorted(named, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _best_first(folder: Path, quiet: bool = False) -> list[Path]:
    """Return the complete, usable checkpoints, the best first.

    Raises SharedUserError where there are complete ones but none is usable.
    """
    # Every process comes through here; only rank 0 warns.
    warn = logger.warning if os.environ.get("RANK", "0") == "0" and not quiet else logger.debug
    complete: list[Path] = []
    unusable: dict[Path, str] = {}
    for path in _newest_first(folder, f"*{ITERATION}*"):
        # A replaced_* without its iter_* is complete: a save was interrupted between its two renames.
        replaced = path.name.startswith(REPLACED) and not (folder / path.name.removeprefix(REPLACED)).exists()
        if not (path.name.startswith(ITERATION) or replaced) or not (path / MANIFEST).is_file():
            warn("%s is ignored: it is not a complete checkpoint", path)
        elif reason := why_unusable(path):
            warn("%s is ignored: %s", path, reason)
            unusable[path] = reason
        else:
            complete.append(path)
    if unusable and not complete:
        found = "; ".join(f"{path}: {reason}" for path, reason in unusable.items())
        raise SharedUserError(f"no checkpoint is usable: {found}; name one by its path, or start anew")
    pointer = folder / LATEST
    if not pointer.is_file():
        return complete
    named = _pointed_to(pointer)
    if named not in complete:
        if named not in unusable:
            warn("%s is ignored: it names no complete checkpoint; using the newest", pointer)
        return complete
    return [named, *(path for path in complete if path != named)]


def _pointed_to(pointer: Path) -> Path | None:
    try:
        return pointer.parent / read_bytes(pointer, _MAX_POINTER).decode(errors="replace").strip()
    except UserError:
        return None
