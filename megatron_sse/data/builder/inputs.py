"""The input files, cut into units of work that do not depend on the number of workers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_sse.data.builder.tally import HIDDEN
from megatron_sse.errors import UserError
from megatron_sse.installed import require

LINES, ROWS, TEXTS = "lines", "rows", "texts"
_SUFFIXES = {LINES: (".jsonl", ".jsonl.gz"), ROWS: (".parquet",)}
# Added to the size of each file when units are cut: opening a file takes time even if it has only a few bytes.
_FILE_BYTES = 1 << 12


@dataclass(frozen=True)
class Unit:
    """A piece of the work: the input of one part.

    kind: lines (those that start at bytes begin to end - 1 of a JSONL file), rows (row groups begin to end - 1 of a
    Parquet file) or texts. size: bytes to read. documents: for texts, the files of each document.
    """

    kind: str
    size: int
    path: str = ""
    begin: int = 0
    end: int = 0
    documents: tuple[tuple[str, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Unit:
        return cls(**{**values, "documents": tuple(map(tuple, values["documents"]))})


@dataclass
class Inputs:
    """All input of a build.

    Attributes:
        files: path, size and time of the last change (ns) of all files, in the order of their documents.
        units: the work.
        left_out: how many names in folders were skipped, by kind.
    """

    files: list[tuple[str, int, int]] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(unit.size for unit in self.units)

    def add(self, path: Path) -> int:
        """Add a file to `files` and return its size. Raises UserError where it cannot be read."""
        try:
            with path.open("rb"):
                status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        self.files.append((str(path), status.st_size, status.st_mtime_ns))
        return status.st_size

    def check_unchanged(self, building: Path) -> None:
        """Raise UserError where a file has changed since the build in `building` started."""
        for path, size, changed in self.files:
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"{path}: can no longer be read ({error.strerror})") from None
            if (status.st_size, status.st_mtime_ns) != (size, changed):
                raise UserError(f"{path}: changed while it was read; delete {building} and start over")


def find_inputs(given: Sequence[str], format: str, columns: Sequence[str], output: Path, unit_bytes: int) -> Inputs:
    """Find all files under the given paths, and cut them into units. Raises UserError.

    columns: a Parquet file needs at least one of these. output: must not be inside a folder that is read.
    """
    inputs = Inputs()
    for name in given:
        path = Path(name)
        if path.is_dir():
            if output.is_relative_to(os.path.abspath(path)):
                raise UserError(f"--output: {output} is inside {path}, which is read; give a path elsewhere")
            _add_folder(inputs, path, format, columns, unit_bytes)
        elif path.is_file():
            _add_file(inputs, path, _kind_of(path, format), columns, unit_bytes)
        else:
            raise UserError(f"INPUT: {name} not found; give files or folders")
    if not inputs.units:
        raise UserError(f"INPUT: nothing to read in {', '.join(given)}")
    return inputs


def _kind_of(path: Path, format: str) -> str:
    by_name = next((kind for kind, suffixes in _SUFFIXES.items() if path.name.endswith(suffixes)), TEXTS)
    if format == "folder":
        raise UserError(f"INPUT: {path} is a file, but --format is folder; give the folder")
    if format == "chat" and by_name == TEXTS:
        raise UserError(f"INPUT: {path} is not a .jsonl, .jsonl.gz or .parquet file, which --format chat needs")
    return {"jsonl": LINES, "parquet": ROWS, "text": TEXTS}.get(format, by_name)


def _add_folder(inputs: Inputs, folder: Path, format: str, columns: Sequence[str], unit_bytes: int) -> None:
    if format == "auto":
        tables = next((p for kind in (LINES, ROWS) for p in folder.iterdir() if p.name.endswith(_SUFFIXES[kind])), None)
        if tables is not None:
            raise UserError(
                f"INPUT: {folder} holds {tables.name}; give --format jsonl or parquet to read all such files in it, "
                "or --format folder to read it as source files"
            )
    if format in ("auto", "folder"):
        _add_texts(inputs, _folder_documents(inputs, folder), unit_bytes)
    elif format == "text":
        _add_texts(inputs, ((path,) for path in _walk(inputs, folder)), unit_bytes)
    else:
        suffixes = {"jsonl": _SUFFIXES[LINES], "parquet": _SUFFIXES[ROWS]}.get(format, sum(_SUFFIXES.values(), ()))
        for path in _walk(inputs, folder):
            if path.name.endswith(suffixes):
                _add_file(inputs, path, _kind_of(path, format), columns, unit_bytes)
            else:
                _leave_out(inputs, f"file that is not {' or '.join(suffixes)}")


def _leave_out(inputs: Inputs, kind: str) -> None:
    inputs.left_out[kind] = inputs.left_out.get(kind, 0) + 1


def _listed(inputs: Inputs, folder: Path) -> list[Path]:
    """List files and folders in a folder, in the order of their names' bytes; hidden names and links are skipped."""
    kept = []
    for path in sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name)):
        if path.name.startswith(".") or path.is_symlink() or not (path.is_file() or path.is_dir()):
            _leave_out(inputs, HIDDEN)
        else:
            kept.append(path)
    return kept


def _walk(inputs: Inputs, folder: Path) -> Iterator[Path]:
    try:
        listed = _listed(inputs, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    for path in listed:
        if path.is_dir():
            yield from _walk(inputs, path)
        else:
            yield path


def _folder_documents(inputs: Inputs, folder: Path) -> Iterator[tuple[Path, ...]]:
    """Yield the files of each document: a sub-folder with all files below it, or a file beside the sub-folders."""
    for path in _listed(inputs, folder):
        if files := tuple(_walk(inputs, path)) if path.is_dir() else (path,):
            yield files
        else:
            _leave_out(inputs, "folder without files")


def _add_file(inputs: Inputs, path: Path, kind: str, columns: Sequence[str], unit_bytes: int) -> None:
    if kind == TEXTS:
        _add_texts(inputs, [(path,)], unit_bytes)
        return
    size = inputs.add(path)
    if kind == ROWS:
        inputs.units += _row_units(path, size, columns, unit_bytes)
        return
    # A compressed file can only be read from its start, so it is one unit.
    step = max(size, 1) if path.name.endswith(".gz") else unit_bytes
    for begin in range(0, size, step):
        end = min(begin + step, size)
        inputs.units.append(Unit(LINES, end - begin, str(path), begin, end))


def _row_units(path: Path, size: int, columns: Sequence[str], unit_bytes: int) -> Iterator[Unit]:
    require("pyarrow", str(path), "data")
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            metadata, names = file.metadata, file.schema_arrow.names
    # pyarrow's errors have no common base class.
    except Exception as error:
        raise UserError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:120]})") from None
    if not set(columns) & set(names):
        raise UserError(f"--field: {path} has columns {', '.join(names)}, needed {' or '.join(columns)}")
    # Row groups know their uncompressed sizes; units get their share of the file's size on disk, for the progress bar.
    total = max(sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), 1)
    begin = pending = 0
    for group in range(metadata.num_row_groups):
        pending += metadata.row_group(group).total_byte_size
        if pending >= unit_bytes or group == metadata.num_row_groups - 1:
            yield Unit(ROWS, size * pending // total, str(path), begin, group + 1)
            begin, pending = group + 1, 0


def _add_texts(inputs: Inputs, documents: Iterable[tuple[Path, ...]], unit_bytes: int) -> None:
    pending: list[tuple[str, ...]] = []
    size = weight = 0

    def cut() -> None:
        nonlocal pending, size, weight
        if pending:
            inputs.units.append(Unit(TEXTS, size, documents=tuple(pending)))
        pending, size, weight = [], 0, 0

    for document in documents:
        sizes = [inputs.add(path) for path in document]
        pending.append(tuple(map(str, document)))
        size, weight = size + sum(sizes), weight + sum(sizes) + _FILE_BYTES * len(sizes)
        if weight >= unit_bytes:
            cut()
    cut()
