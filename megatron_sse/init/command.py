"""The command `megatron-sse init`."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from megatron_sse.durable import check_output, create_file
from megatron_sse.errors import UserError
from megatron_sse.init.request import Request

_SUFFIX = ".yaml"


def run(request: Request) -> int:
    """List the shipped configurations or write one; return the exit status. Raises UserError."""
    texts = read_shipped()
    if request.name is None:
        width = max(map(len, texts))
        for name, text in texts.items():
            print(f"{name:<{width}}  {describe(text)}")
        print("megatron-sse init NAME writes one to NAME.yaml")
        return 0
    if request.name not in texts:
        raise UserError(f"NAME: got {request.name}, allowed {', '.join(texts)}")
    path = Path(request.output or f"{request.name}{_SUFFIX}")
    check_output("--output", str(path))
    try:
        with create_file(path) as file:
            file.write(texts[request.name].encode())
    except FileExistsError:
        raise UserError(f"--output: {path} exists and is not overwritten; name another file") from None
    print(f"wrote {path}; train its model with: megatron-sse train {path}")
    return 0


def read_shipped() -> dict[str, str]:
    """Return the texts of the shipped configurations by name, in the order of their names."""
    files = [file for file in resources.files("megatron_sse.configs").iterdir() if file.name.endswith(_SUFFIX)]
    return {
        file.name.removesuffix(_SUFFIX): file.read_text(encoding="utf-8")
        for file in sorted(files, key=lambda file: file.name)
    }


def describe(text: str) -> str:
    """Return the first sentence of a configuration's first comment."""
    comment = " ".join(re.findall(r"^# ?(.*)", text.partition("\n\n")[0], re.MULTILINE))
    return comment.partition(". ")[0].removesuffix(".")
