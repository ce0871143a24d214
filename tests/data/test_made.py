"""What is made of a large token file: once, found again, never of another content, and never in the way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_sse.config import DataConfig
from megatron_sse.data import checks, made, packing
from megatron_sse.data.checks import TokenFile, check_token_file
from megatron_sse.data.packing import Packed, pack
from megatron_sse.errors import UserError
from tests.data.files import random_documents, write_tokens
from tests.workers import run_workers

DOCUMENTS = random_documents(60, longest=11)


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a token file that counts as large."""
    monkeypatch.setattr(made, "LARGE_INDEX", 0)
    write_tokens(str(tmp_path / "train"), DOCUMENTS)
    return str(tmp_path / "train")


def settings() -> DataConfig:
    return DataConfig(train="unused", sequence_length=8, packing="best_fit")


def samples_of(file: TokenFile) -> list[Any]:
    packed = pack(settings(), file.offsets_D1, file.made)
    return [packed.account, *(packed.pieces(number) for number in range(packed.account.samples))]


def fail(*args: Any) -> Any:
    raise AssertionError("made again")


def test_found_again_as_it_was_made(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = check_token_file("data.train", prefix, 64)
    samples = samples_of(file)
    assert samples == [*samples_of(TokenFile(prefix, file.index, np.array(file.offsets_D1), None))]
    monkeypatch.setattr(checks, "_make_index", fail)
    monkeypatch.setattr(packing, "best_fit", fail)
    again = check_token_file("data.train", prefix, 64)
    assert isinstance(again.offsets_D1, np.memmap) and again.index.dtype == file.index.dtype
    assert np.array_equal(again.offsets_D1, np.cumsum([0, *map(len, DOCUMENTS)]))
    assert samples_of(again) == samples
    packed = pack(settings(), again.offsets_D1, again.made)
    assert isinstance(packed, Packed) and isinstance(packed.begin_p, np.memmap)
    # The ids were read once, and are refused as before where they do not fit another vocabulary.
    with pytest.raises(UserError, match="holds token id 63 at token"):
        check_token_file("data.train", prefix, 63)


def test_another_content_is_another_file(prefix: str) -> None:
    check_token_file("data.train", prefix, 64)
    [before] = Path(prefix + ".made").iterdir()
    write_tokens(prefix, DOCUMENTS[:30])
    file = check_token_file("data.train", prefix, 64)
    assert len(file.offsets_D1) == 31
    [after] = Path(prefix + ".made").iterdir()
    assert after != before


def test_what_others_keep_there_stays(prefix: str) -> None:
    own = Path(prefix + ".made") / "notes"
    own.mkdir(parents=True)
    (own / "text").write_text("mine")
    kept = Path(prefix + ".kept")
    kept.write_text("mine as well")
    check_token_file("data.train", prefix, 64)
    [folder] = set(Path(prefix + ".made").iterdir()) - {own}
    # A lock that is a link to another file must not empty it.
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(kept)
    (folder / "index" / made.FACTS).unlink()
    check_token_file("data.train", prefix, 64)
    assert (own / "text").read_text() == "mine" and kept.read_text() == "mine as well"


@pytest.mark.parametrize("damage", ["facts", "array", "missing"])
def test_what_is_damaged_is_made_again(prefix: str, damage: str) -> None:
    check_token_file("data.train", prefix, 64)
    [folder] = Path(prefix + ".made").glob("*/index")
    if damage == "facts":
        (folder / made.FACTS).write_text("{")
    elif damage == "array":
        (folder / "offsets.npy").write_bytes((folder / "offsets.npy").read_bytes()[:-8])
    else:
        (folder / "offsets.npy").unlink()
    assert len(check_token_file("data.train", prefix, 64).offsets_D1) == 61
    assert len(np.load(folder / "offsets.npy")) == 61


def test_without_a_place_to_keep_it_a_run_goes_on(prefix: str) -> None:
    Path(prefix + ".made").write_text("in the way")
    file = check_token_file("data.train", prefix, 64)
    assert len(file.offsets_D1) == 61 and len(samples_of(file)) > 10


def test_nothing_is_kept_of_small_files(tmp_path: Path) -> None:
    write_tokens(str(tmp_path / "train"), DOCUMENTS)
    assert check_token_file("data.train", str(tmp_path / "train"), 64).made.path is None
    assert not (tmp_path / "train.made").exists()


def open_at_once(prefix: str) -> tuple[int, int]:
    """Open a file on all ranks at once, five times; return documents, and how often this rank made it."""
    count = 0

    def make(prefix: str, make: Any = checks._make_index) -> Any:
        nonlocal count
        count += 1
        return make(prefix)

    found = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "LARGE_INDEX", 0)
        patch.setattr(checks, "_make_index", make)
        for number in range(5):
            dist.barrier()
            file = check_token_file("data.train", f"{prefix}{number}", 64)
            found += len(file.offsets_D1) - 1
    return found, count


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    for number in range(5):
        write_tokens(str(tmp_path / f"train{number}"), DOCUMENTS)
    found = run_workers(2, open_at_once, str(tmp_path / "train"))
    assert [documents for documents, _ in found] == [5 * 60] * 2
    assert sum(count for _, count in found) == 5
    assert not list(tmp_path.rglob("*.tmp"))
