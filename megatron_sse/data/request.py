"""The arguments of `megatron-sse data inspect`."""

from dataclasses import dataclass

from megatron_sse.errors import UserError
from megatron_sse.options import Command, option, positional


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """Check a token file and show its sizes, the lengths of its documents, and documents as text."""

    command, help = "data inspect", "show what is in a token file"

    prefix: str = positional("PREFIX", "path of the .bin and .idx file without the suffix")
    documents: int = option("N", "number of documents to show", default=1)
    first: int = option("K", "number of the first one, from 0", default=0)
    tokens: int = option("N", "tokens to show of each", default=500)

    def check(self) -> None:
        for name in ("documents", "first", "tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}: got {getattr(self, name)}, allowed 0 or more")
