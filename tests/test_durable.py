"""Files that commands write: complete or not at all, only in place of regular files, and with the mode of the umask."""

import os
import stat
import threading
from pathlib import Path

import pytest

from megatron_sse.durable import create_file, output_file, write_durably
from megatron_sse.errors import UserError
from megatron_sse.inference.request import Request as Generate
from megatron_sse.score.request import Request as Score


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path, content: bytes) -> None:
    with output_file(path) as file:
        file.write(content)


@pytest.mark.parametrize("mask", [0o027, 0o077])
def test_the_umask_decides(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "out", b"new")
        write_durably(tmp_path / "latest", b"new")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "out") == mode_of(tmp_path / "latest") == 0o666 & ~mask
    # A file that was there keeps its mode.
    (tmp_path / "out").chmod(0o604)
    write(tmp_path / "out", b"newer")
    assert mode_of(tmp_path / "out") == 0o604 and (tmp_path / "out").read_bytes() == b"newer"


def test_a_file_keeps_its_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), output_file(tmp_path / "out") as file:
        file.write(b"half")
        file.flush()
        assert (tmp_path / "out").read_bytes() == b"old"
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_bytes() == b"old"


def test_devices_pipes_and_links_stay_what_they_are(tmp_path: Path) -> None:
    write(Path("/dev/null"), b"lost")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write(tmp_path / "pipe", b"through")
    reader.join()
    assert read == [b"through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to("other")
    write(tmp_path / "dangling", b"new")
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "other").read_bytes() == b"new"
    with pytest.raises(IsADirectoryError):
        write(tmp_path, b"new")


def test_nothing_is_written_through_a_link_that_somebody_laid(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("latest", "latest.tmp"):
        (tmp_path / name).symlink_to("mine")
    write_durably(tmp_path / "latest", b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine" and not (tmp_path / "latest").is_symlink()
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "latest.tmp")


def test_the_folder_of_an_output_is_looked_for_before_anything_is_computed(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing" / "file")
    for key, request in (
        ("--save-cache", Generate(checkpoint="x", save_cache=missing)),
        ("--output", Score(checkpoint="x", input="x", output=missing)),
    ):
        with pytest.raises(UserError, match=f"^{key}: the folder {tmp_path}/missing was not found; make it"):
            request.check()
    Generate(checkpoint="x", save_cache=str(tmp_path / "file")).check()
