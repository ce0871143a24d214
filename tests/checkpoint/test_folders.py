"""Which checkpoint a run resumes from, which are kept, and what prevents either."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.checkpoint import folders
from megatron_sse.checkpoint.folders import (
    check_named,
    find_checkpoints,
    find_weights,
    make_partial,
    promote,
    prune,
    step_folder,
)
from megatron_sse.checkpoint.manifest import Manifest, describe_files
from megatron_sse.errors import UserError
from megatron_sse.lease import hold
from megatron_sse.run_folder import LEASE
from tests.leases import elsewhere
from tests.training.support import small_run


def make_whole(folder: Path, step: int) -> Path:
    """Make a checkpoint folder that is complete except for real content."""
    partial, final = make_partial(folder, step), step_folder(folder, step)
    write_content(partial, step)
    promote(partial, final)
    return final


def write_content(folder: Path, step: int) -> None:
    (folder / "content").write_text(f"step {step}")
    Manifest(step, step, True, {}, {}, describe_files(folder, {})).write(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def name_of(step: int) -> str:
    return step_folder(Path(), step).name


# Complete checkpoints, incomplete ones, the pointer's content, and what is found.
FOUND: list[tuple[list[int], list[int], str | None, list[int]]] = [
    ([], [], None, []),
    ([5, 10], [], "iter_0000005\n", [5, 10]),
    ([5, 10], [], None, [10, 5]),
    ([5], [10], "iter_0000010\n", [5]),
    ([5], [], "\x00garbage", [5]),
    ([5], [], "", [5]),
    ([5], [], "../checkpoints\n", [5]),
    ([], [10], "iter_0000010\n", []),
    ([9999999, 10000000], [], None, [10000000, 9999999]),
]


@pytest.mark.parametrize(("complete", "half", "latest", "found"), FOUND, ids=str)
def test_auto_takes_what_latest_names_and_then_the_newest(
    tmp_path: Path, complete: list[int], half: list[int], latest: str | None, found: list[int]
) -> None:
    config = small_run(tmp_path)
    folder = folders.checkpoint_folder(config)
    for step in complete:
        make_whole(folder, step)
    for step in half:
        step_folder(folder, step).mkdir(parents=True)
    if latest is None:
        (folder / "latest").unlink(missing_ok=True)
    else:
        (folder / "latest").write_text(latest)
    assert find_checkpoints(config) == [step_folder(folder, step) for step in found]


def test_resume_can_be_turned_off_or_name_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "other/checkpoints"
    for step in (5, 10):
        make_whole(folder, step)
    (folder / "iter_0000020").mkdir()

    def find(resume: str) -> list[Path]:
        return find_checkpoints(small_run(tmp_path, checkpoint={"resume": resume}))

    assert find("none") == []
    assert find(str(folder / "iter_0000005")) == [folder / "iter_0000005"]
    assert find(str(folder)) == find(str(tmp_path / "other")) == [folder / "iter_0000010"]
    with pytest.raises(UserError, match="^checkpoint.resume: nowhere not found; give auto, none, or the path of a"):
        find("nowhere")
    with pytest.raises(UserError, match="^checkpoint.resume: .* is not a complete checkpoint: .* not found"):
        find(str(folder / "iter_0000020"))
    weights = small_run(tmp_path, checkpoint={"load_weights": str(tmp_path)})
    with pytest.raises(UserError, match="^checkpoint.load_weights: .* holds no checkpoint; give null or the"):
        find_weights(weights)


@pytest.mark.parametrize("key", ["resume", "load_weights"])
def test_a_damaged_checkpoint_that_is_named_is_found_before_processes_start(tmp_path: Path, key: str) -> None:
    checkpoint = make_whole(tmp_path / "other", 2)
    config = small_run(tmp_path, checkpoint={key: str(checkpoint)})
    check_named(config)
    (checkpoint / "content").unlink()
    with pytest.raises(UserError, match=f"^checkpoint.{key}: got a damaged checkpoint: .*/content: not found$"):
        check_named(config)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        saved = make_whole(tmp_path, step)
    prune(tmp_path, 2, saved)
    assert names(tmp_path) == [name_of(6), name_of(8), "latest"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_newest_intact_checkpoint_is_never_deleted(tmp_path: Path, keep_last: int) -> None:
    """The newest intact checkpoint is kept when all newer ones are damaged, one of them during its save (F35)."""
    for step in (2, 4, 6, 8):
        saved = make_whole(tmp_path, step)
    (step_folder(tmp_path, 6) / "content").write_text("step 7")
    (saved / "content").unlink()
    prune(tmp_path, keep_last, saved)
    kept = [name_of(step) for step in (4, 6, 8) if step != 6 or keep_last == 2]
    assert names(tmp_path) == [*kept, "latest"]
    # Without an intact checkpoint nothing is deleted.
    (step_folder(tmp_path, 4) / "content").unlink()
    prune(tmp_path, keep_last, saved)
    assert names(tmp_path) == [*kept, "latest"]


def test_a_save_interrupted_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path)
    folder = folders.checkpoint_folder(config)
    make_whole(folder, 2)
    make_whole(folder, 4)
    rename = Path.rename

    def stop_at_new(path: Path, target: Any) -> Any:
        if path.name.startswith("partial_"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop_at_new)
    with pytest.raises(KeyboardInterrupt):
        make_whole(folder, 4)
    monkeypatch.undo()
    assert find_checkpoints(config) == [folder / "replaced_iter_0000004", folder / "iter_0000002"]
    make_partial(folder, 6)
    assert find_checkpoints(config)[0] == folder / "replaced_iter_0000004"
    make_whole(folder, 4)
    assert names(folder) == [name_of(2), name_of(4), "latest"]


def test_left_overs_are_deleted_at_the_next_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What interrupted saves left behind is deleted, and nothing else, also not what a link leads to."""
    for name in ("partial_iter_0000001", "partial_0123456789abcdef_iter_0000002", "removed_iter_0000001", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "partial_iter_0000003").symlink_to(tmp_path / "mine")
    (tmp_path / "mine/notes").write_text("mine")
    (tmp_path / "partial_iter_0000004_of_mine").mkdir()
    (tmp_path / "latest.0123456789abcdef.tmp").write_text("iter")
    with caplog.at_level(logging.WARNING):
        make_whole(tmp_path, 2)
    assert names(tmp_path) == [name_of(2), "latest", "mine", "partial_iter_0000004_of_mine"]
    assert (tmp_path / "mine/notes").read_text() == "mine"


@pytest.mark.parametrize("link", ["latest.tmp", "latest"])
def test_the_pointer_is_not_written_through_a_link(tmp_path: Path, link: str) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / link).symlink_to(tmp_path / "mine")
    make_whole(tmp_path / "checkpoints", 2)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "checkpoints/latest").is_symlink()


NOT_WRITABLE = ["/proc/runs", "/dev/null/runs"]


@pytest.mark.parametrize("place", NOT_WRITABLE)
def test_a_folder_that_cannot_be_written_to_is_an_error_at_the_start(place: str) -> None:
    with pytest.raises(UserError, match=f"^monitor.folder: got {place}, allowed a folder that can be written to "):
        folders.check_writable(Path(place) / "checkpoints")


def test_only_the_holder_of_the_lease_makes_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To others, what is not complete may be what a run that is alive is writing."""
    folder = tmp_path / "run/checkpoints"
    left = folder / "partial_0123456789abcdef_iter_0000002"
    left.mkdir(parents=True)

    def is_full(folder: Path) -> None:
        if left.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders, "_write_something", is_full)
    folders.check_writable(folder)
    with hold(folder.parent, "monitor.folder", LEASE) as lease:
        theirs = elsewhere(folder.parent / LEASE)
        with pytest.raises(UserError, match="^monitor.folder: got .*was taken over by process 12 on node7"):
            folders.check_writable(folder, lease)
        assert left.exists()
        theirs.unlink()
        folders.check_writable(folder, lease)
        assert not left.exists()


def test_a_full_disk_without_left_overs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders, "_write_something", is_full)
    with pytest.raises(UserError, match=r"allowed a folder that can be written to \(No space left on device\)$"):
        folders.check_writable(tmp_path)
