"""The arguments of `megatron-sse inspect`."""

from dataclasses import dataclass

from megatron_sse.options import Command, option, positional


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """Show a checkpoint's tensors, layout, sizes and hashes. Exit status 1 if a file is damaged."""

    command, help = "inspect", "show what is in a checkpoint"

    checkpoint: str = positional("DIR", "checkpoint, folder of checkpoints or run folder")
    tensors: bool = option(help="list every tensor")
    sizes: bool = option(help="check sizes, and hashes only of files below 1 MiB")
