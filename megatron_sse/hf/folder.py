"""Hugging Face model folders: config.json and safetensors files, read and written a part at a time."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sse import reading
from megatron_sse.errors import UserError
from megatron_sse.installed import require

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
FILE_BYTES = 1 << 32
# Room for the header of a file, and the number of tensors that always fits.
_HEADER_BYTES, _MAX_TENSORS = 1 << 16, 250

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class HFWeights:
    """The tensors of a folder's safetensors files. Raises UserError for files that are missing or damaged."""

    def __init__(self, folder: Path):
        require("safetensors", str(folder))
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._headers: dict[str, tuple[torch.Size, torch.dtype]] = {}
        listed = self._listed()
        for path in sorted(set(listed.values())):
            for name, (shape, dtype) in _read_header(path).items():
                self._files[name], self._headers[name] = path, (shape, dtype)
        if not self._headers:
            raise UserError(f"{folder}: its files of weights hold no tensor")
        for name, path in listed.items():
            if name and self._files.get(name) != path:
                raise UserError(f"{folder / INDEX}: lists {name} in {path.name}, which does not hold it")

    def _listed(self) -> dict[str, Path]:
        """Return the file of every tensor by the index; without an index the only file, under an empty name."""
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise UserError(f"{self.folder}: no {SINGLE} and no {INDEX}; other formats of weights are not read")
            return {"": self.folder / SINGLE}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(Path(str(f)).name == f for f in weight_map.values()):
            raise UserError(f"{index}: its weight_map does not name files of the folder")
        return {name: self.folder / file for name, file in weight_map.items()}

    def keys(self) -> Iterable[str]:
        return self._headers.keys()

    def shape(self, name: str) -> torch.Size:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._headers[name][1]

    def get(self, name: str) -> Tensor:
        from safetensors import safe_open

        # Opened anew each time: pages of a file that stays open count as memory of the process.
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name).clone()


def _read_header(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    # Path.is_file fails where the name is too long.
    if not os.path.isfile(path):
        raise UserError(f"{path}: not found; {INDEX} names it")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: (torch.Size(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({' '.join(str(error).split())})") from None
    for name, (_, dtype) in header.items():
        if dtype not in _DTYPES:
            raise UserError(f"{path}: {name} has type {dtype}, allowed {', '.join(_DTYPES)}")
    return {name: (shape, _DTYPES[dtype]) for name, (shape, dtype) in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError."""
    return reading.read_json(path, dict[str, Any])


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write safetensors files of not more than FILE_BYTES each, or one larger tensor, and their index.

    The tensors are taken and written one after the other. Raises OSError.
    """
    files: list[_File] = []
    for name, tensor in tensors:
        if not files or files[-1].is_full(tensor.nbytes):
            if files:
                files[-1].close()
            files.append(_File(folder / f"part-{len(files)}.safetensors"))
        files[-1].add(name, tensor)
    files[-1].close()
    if len(files) == 1:
        files[0].path.rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        final = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.path.rename(final)
        weight_map |= dict.fromkeys(file.header, final.name)
    size = sum(file.size for file in files)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


class _File:
    """A safetensors file: tensors are written one after the other, then the header at its beginning."""

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self.header: dict[str, dict[str, Any]] = {}
        self._file = path.open("wb")
        self._file.seek(_HEADER_BYTES)

    def is_full(self, size: int) -> bool:
        """Check whether `size` more bytes belong into another file."""
        return bool(self.header) and (self.size + size > FILE_BYTES or len(self.header) == _MAX_TENSORS)

    def add(self, name: str, tensor: Tensor) -> None:
        begin, self.size = self.size, self.size + tensor.nbytes
        dtype = _NAMES[tensor.dtype]
        self.header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, self.size]}
        self._file.write(tensor.detach().contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        text = json.dumps({"__metadata__": {"format": "pt"}, **self.header}, separators=(",", ":")).encode()
        # The format allows blanks at the end of the header.
        text = text.ljust(_HEADER_BYTES - 8)
        assert len(text) == _HEADER_BYTES - 8
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.close()
