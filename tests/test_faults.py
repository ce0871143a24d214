"""Faults in numbers and in input (F19 to F31), each with its required outcome.

F1 to F18: tests/checkpoint; F20: tests/monitor/test_spikes.py.
"""

import json
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sse import cli
from tests import numeric_faults as numeric
from tests.training.support import small_run

Change = Callable[[Path], None]
Fault = Callable[[Path, pytest.CaptureFixture[str]], None]


def nothing(folder: Path) -> None:
    pass


def in_settings(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / "run.yaml").read_text()
        assert text.count(old) == 1
        (folder / "run.yaml").write_text(text.replace(old, new))

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def shorten(name: str, num_bytes: int) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-num_bytes])

    return change


def put(name: str, offset: int, kind: str, value: int) -> Change:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        struct.pack_into(kind, content, offset, value)
        (folder / name).write_bytes(content)

    return change


def another_vocabulary(folder: Path) -> None:
    values = {"tokenizer": "bytes", "vocab_size": 70, "documents": 60, "tokens": 300, "bytes": 240}
    (folder / "train.json").write_text(json.dumps(values | {"unigram_bits_per_byte": 4.5}))


def refused(change: Change, overrides: str, message: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check for exit status 2 and one line, before a process, a process group or a folder exists."""
    (folder / "run.yaml").write_text(small_run(folder).to_yaml())
    change(folder)
    assert cli.main(["train", str(folder / "run.yaml"), *overrides.format(folder=folder).split()]) == 2
    output, errors = capfd.readouterr()
    assert re.fullmatch(message.format(folder=re.escape(str(folder))) + "\n", errors), errors
    assert output == "" and not dist.is_initialized() and not (folder / "run/config.yaml").exists()


FAULTS: dict[str, Fault] = {
    "F19 loss not finite": partial(numeric.skipped_on_all_ranks, {}, "loss"),
    "F19 loss not finite, optimizer distributed": partial(numeric.skipped_on_all_ranks, numeric.DISTRIBUTED, "loss"),
    "F19 loss not finite, pipeline": partial(numeric.skipped_on_all_ranks, numeric.PIPELINE, "loss"),
    "F19 loss not finite, tensor": partial(numeric.skipped_on_all_ranks, numeric.TENSOR, "loss"),
    "F19 gradient not finite": partial(numeric.skipped_on_all_ranks, {}, "gradient"),
    "F19 gradient not finite, optimizer distributed": partial(
        numeric.skipped_on_all_ranks, numeric.DISTRIBUTED, "gradient"
    ),
    "F19 gradient not finite, pipeline": partial(numeric.skipped_on_all_ranks, numeric.PIPELINE, "gradient"),
    "F19 gradient not finite, tensor": partial(numeric.skipped_on_all_ranks, numeric.TENSOR, "gradient"),
    "F19 too many in a row": numeric.stopped_after_too_many,
    "F21 only masked tokens on a data rank": numeric.masked_data_rank,
    "F21 only masked tokens on a context rank": numeric.masked_context_rank,
    "F21 all tokens masked": numeric.stopped_when_all_is_masked,
    "gradient not finite on one data replica": partial(numeric.one_replica_not_finite, {}),
    "gradient not finite on one context replica": partial(numeric.one_replica_not_finite, numeric.CONTEXT),
    "bit of a weight on one data replica": partial(numeric.replicas_compared, {}),
    "bit of a weight on one context replica": partial(numeric.replicas_compared, numeric.CONTEXT),
    # The other replica's part is sent over it: behind the step, or in the next forward pass, before it has been read.
    "bit of a weight with the distributed optimizer": partial(
        numeric.replicas_compared, numeric.DISTRIBUTED, steps=(4,)
    ),
    "bit of a weight that is gathered again": partial(numeric.replicas_compared, numeric.OVERLAPPED, steps=()),
    "F22 hand-off broken": numeric.broken_hand_off_seen,
    "F23 unknown key": partial(
        refused,
        in_settings("  num_layers: 2", "  num_layer: 2"),
        "",
        r"{folder}/run.yaml:2: model.num_layer: got an unknown key, .*; did you mean model.num_layers\?",
    ),
    "F24 wrong type": partial(
        refused,
        in_settings("  steps: 8", "  steps: ten"),
        "",
        r"{folder}/run.yaml:\d+: training.steps: got 'ten', allowed an integer",
    ),
    "F25 duplicate key": partial(
        refused,
        in_settings("  vocab_size: 64", "  vocab_size: 64\n  num_layers: 6"),
        "",
        r"{folder}/run.yaml:6: model.num_layers: given twice, first in line 2",
    ),
    "F26 heads by tensor": partial(
        refused,
        nothing,
        "parallel.tensor=3",
        r"{folder}/run.yaml:\d+: model.sse.num_heads: got 2, allowed a multiple of parallel.tensor 3",
    ),
    "F26 layers by pipeline": partial(
        refused,
        nothing,
        "parallel.pipeline=3",
        "command line: parallel.pipeline: got 3, allowed a divisor of model.num_layers 2",
    ),
    "F26 length by context": partial(
        refused,
        nothing,
        "parallel.context=3",
        r"{folder}/run.yaml:\d+: data.sequence_length: got 16, allowed a multiple of 3: parallel.context 3",
    ),
    "F26 batch by copies": partial(
        refused,
        nothing,
        "parallel.data=3",
        r"{folder}/run.yaml:\d+: training.global_batch_size: got 4, allowed a multiple of 3 .micro-batch 1 x 3 .*",
    ),
    "F27 no settings": partial(refused, remove("run.yaml"), "", "{folder}/run.yaml: not found"),
    "F27 no index": partial(refused, remove("train.idx"), "", "data.train: {folder}/train.idx not found; give .*"),
    "F27 no tokens": partial(refused, remove("train.bin"), "", "data.train: {folder}/train.bin not found; give .*"),
    "F27 no checkpoint": partial(
        refused,
        nothing,
        "checkpoint.resume={folder}/other",
        "checkpoint.resume: {folder}/other not found; give auto, none, or the path of a checkpoint, .*",
    ),
    "F28 wrong magic": partial(
        refused, put("train.idx", 0, "<B", 0), "", "{folder}/train.idx: not an index of a Megatron token file.*"
    ),
    "F29 truncated index": partial(
        refused, shorten("train.idx", 8), "", r"{folder}/train.idx: \d+ bytes, its header says \d+; truncated, .*"
    ),
    "F29 truncated tokens": partial(
        refused, shorten("train.bin", 6), "", r"{folder}/train.bin: \d+ bytes, its index says \d+; the file is .*"
    ),
    "F30 token id out of range": partial(
        refused,
        put("train.bin", 20, "<H", 64),
        "",
        "data.train: {folder}/train.bin holds token id 64 at token 10, allowed are 0 to model.vocab_size - 1 = 63; .*",
    ),
    "F31 another tokenizer's vocabulary": partial(
        refused,
        another_vocabulary,
        "",
        r"model.vocab_size: 64 given, but {folder}/train.json says 70 .tokenizer bytes.; set model.vocab_size: 70",
    ),
    "F31 vocabulary of a built corpus": partial(
        refused,
        nothing,
        "data.corpus=python_stdlib",
        r"{folder}/run.yaml:\d+: model.vocab_size: got 64, allowed 257 .* with data.corpus",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    FAULTS[name](tmp_path, capfd)


def test_all_are_there() -> None:
    assert {name.split()[0] for name in FAULTS} >= {f"F{number}" for number in range(19, 32)} - {"F20"}


def test_the_page_of_faults() -> None:
    """Each fault has a number of its own, without gaps, and names tests that exist."""
    root = Path(__file__).resolve().parents[1]
    rows = re.findall(r"^\| (F\d.*?) \|(.*)\|$", (root / "docs/faults.md").read_text(), re.MULTILINE)
    numbers = [number for number, _ in rows]
    assert len(set(numbers)) == len(numbers)
    named: set[int] = set()
    for number, text in rows:
        first, *last = map(int, re.findall(r"F(\d+)", number))
        named |= set(range(first, (last or [first])[0] + 1))
        tests = re.findall(r"`(tests/[^`]+)`", text.rpartition("|")[2])
        assert tests and all((root / test).exists() for test in tests), number
    assert named == set(range(1, 1 + max(named)))
