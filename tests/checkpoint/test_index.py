"""Contents of an index or a manifest that are accepted or refused (F16)."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_sse.checkpoint.index import IndexRefusedError, read_index, tensors_of
from megatron_sse.checkpoint.manifest import ManifestError, read_manifest
from tests.checkpoint.test_folders import make_whole


class Call:
    """An object that unpickles to the result of a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def dotted_name() -> bytes:
    # In protocol 4, STACK_GLOBAL splits dotted names.
    module = b"\x8c" + bytes([len("torch")]) + b"torch"
    name = b"\x8c" + bytes([len("hub.load")]) + b"hub.load"
    return b"\x80\x04" + module + name + b"\x93."


REFUSED: dict[str, tuple[bytes, str]] = {
    "a call of the system": (pickle.dumps(Call(os.system, "true")), "asks for posix.system"),
    "eval": (pickle.dumps(Call(eval, "1")), "asks for builtins.eval"),
    "unpickling with torch": (pickle.dumps(Call(torch.load, "file")), "asks for torch.serialization.load"),
    "a dotted name": (dotted_name(), "asks for torch.hub.load"),
    "inside an index": (pickle.dumps(Metadata({}, storage_data={0: Call(os.getpid)})), "asks for posix.getpid"),
    "objects": (pickle.dumps(Metadata({"rng": BytesStorageMetadata()})), "asks for .*BytesStorageMetadata"),
    "something else": (pickle.dumps([1, 2]), "it is not an index of tensors"),
    "no pickle": (b"garbage", "cannot be read"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_index_of_tensors_is_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(IndexRefusedError, match=f"^{tmp_path}/.metadata: .*{message}"):
        read_index(tmp_path)


def test_an_empty_index_is_read(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({})))
    assert tensors_of(read_index(tmp_path)) == {}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 2}, "got format 2, allowed 1"),
    "no files": ({"files": None}, "cannot be read"),
    "a step that is none": ({"step": "one"}, "cannot be read"),
    "out of the folder": ({"files": {"../content": {"size": 1, "sha256": ""}}}, "cannot be read"),
    "another place": ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "cannot be read"),
    "the folder above": ({"files": {"..": {"size": 1, "sha256": ""}}}, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_manifests(name: str, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    checkpoint = make_whole(tmp_path, 2)
    assert read_manifest(checkpoint).step == 2
    values = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(values | changes))
    with pytest.raises(ManifestError, match=f"^{checkpoint}/manifest.json: {message}"):
        read_manifest(checkpoint)
