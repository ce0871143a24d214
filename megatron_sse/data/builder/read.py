"""Reading the records of a unit, one after the other."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from megatron_sse.data.builder.inputs import LINES, ROWS, Unit
from megatron_sse.data.builder.tally import BINARY, BLANK, BROKEN, INVALID, Place, Tally
from megatron_sse.errors import UserError

# A record of a JSONL file or a table, or the texts of a document.
Record = dict[str, Any] | list[str]
_BINARY_BYTES = 8192
_BATCH_ROWS = 64
_REPORT_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_unit(
    unit: Unit, columns: Sequence[str], tally: Tally, report: Callable[[int], None]
) -> Iterator[tuple[Place, Record]]:
    """Return the places and records that can be read; `tally` counts the others. Raises UserError.

    columns: those of Parquet files to read. report: is called with the bytes read since the last call.
    """
    if unit.kind == ROWS:
        return _read_rows(unit, columns, tally, report)
    if unit.kind == LINES:
        return _read_lines(unit, tally, report)
    return _read_texts(unit, tally, report)


def _read_texts(unit: Unit, tally: Tally, report: Callable[[int], None]) -> Iterator[tuple[Place, list[str]]]:
    for paths in unit.documents:
        texts = []
        for path in paths:
            with open(path, "rb") as file:
                content = file.read()
            report(len(content))
            if b"\0" in content[:_BINARY_BYTES]:
                tally.add(BINARY, Place(path), "binary")
                continue
            text = decode(content, Place(path), tally)
            if text is not None:
                # So that the next file of the document starts on a new line.
                texts.append(text + "\n" if len(paths) > 1 and text and not text.endswith("\n") else text)
        if texts:
            yield Place(paths[0]), texts


def decode(content: bytes, place: Place, tally: Tally) -> str | None:
    """Return the text of UTF-8; None, counted in `tally`, where it is not valid."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        tally.add(INVALID, place, f"invalid UTF-8 at byte {error.start} ({content[error.start : error.start + 4]!r})")
        return None


def _read_lines(unit: Unit, tally: Tally, report: Callable[[int], None]) -> Iterator[tuple[Place, dict[str, Any]]]:
    with open(unit.path, "rb") as file:
        lines = _zipped_lines(file, unit, report) if unit.path.endswith(".gz") else _plain_lines(file, unit, report)
        for place, line in lines:
            if not line.strip():
                tally.add(BLANK, place, "blank line")
                continue
            text = decode(line, place, tally)
            if text is None:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                tally.add(BROKEN, place, f"broken JSON ({error})")
                continue
            if isinstance(record, dict):
                yield place, record
            else:
                tally.add(BROKEN, place, f"a JSON {type(record).__name__}, must be an object")


def _plain_lines(file: BinaryIO, unit: Unit, report: Callable[[int], None]) -> Iterator[tuple[Place, bytes]]:
    """Yield the lines that start inside the unit's bytes; the last may end after them."""
    if unit.begin:
        # Skip the rest of the line that holds the byte before the unit: an earlier unit reads it. It may be longer than
        # this unit. A unit that starts right after a line end skips only that line end.
        file.seek(unit.begin - 1)
        while file.tell() < unit.end and not file.readline(_REPORT_BYTES).endswith(b"\n"):
            pass
    reported = unit.begin
    while (start := file.tell()) < unit.end and (line := file.readline()):
        yield Place(unit.path, offset=start), line.removeprefix(_BOM) if start == 0 else line
        if (read := min(file.tell(), unit.end)) - reported >= _REPORT_BYTES:
            report(read - reported)
            reported = read
    report(unit.end - reported)


def _zipped_lines(file: BinaryIO, unit: Unit, report: Callable[[int], None]) -> Iterator[tuple[Place, bytes]]:
    row = reported = 0
    try:
        with gzip.open(file) as lines:
            for row, line in enumerate(lines, 1):
                yield Place(unit.path, row), line.removeprefix(_BOM) if row == 1 else line
                if (read := file.tell()) - reported >= _REPORT_BYTES:
                    report(read - reported)
                    reported = read
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{unit.path}:{row + 1}: damaged gzip file ({error}); get it again") from None
    report(unit.size - reported)


def _read_rows(
    unit: Unit, columns: Sequence[str], tally: Tally, report: Callable[[int], None]
) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    reported = rows = 0
    with parquet.ParquetFile(unit.path) as file:
        names = [name for name in columns if name in file.schema_arrow.names]
        groups = range(unit.begin, unit.end)
        num_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        first = sum(file.metadata.row_group(group).num_rows for group in range(unit.begin))
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(groups), columns=names, use_threads=False):
                # pyarrow does not check that text is UTF-8: take it as bytes and decode it ourselves.
                values = [_text_as_bytes(column) for column in batch.columns]
                for index in range(batch.num_rows):
                    place = Place(unit.path, first + rows + index + 1)
                    try:
                        yield place, {name: value[index].as_py() for name, value in zip(names, values, strict=True)}
                    except UnicodeDecodeError as error:
                        tally.add(INVALID, place, f"invalid UTF-8 ({error.reason})")
                rows += batch.num_rows
                read = unit.size * rows // num_rows
                report(read - reported)
                reported = read
        except (arrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{unit.path}:{first + rows + 1}: damaged Parquet file ({reason}); get it again") from None


def _text_as_bytes(column: Any) -> Any:
    import pyarrow as arrow

    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_string(column.type):
        return column.cast(arrow.binary())
    return column.cast(arrow.large_binary()) if arrow.types.is_large_string(column.type) else column
