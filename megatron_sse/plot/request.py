"""The arguments of `megatron-sse plot`."""

from dataclasses import dataclass

from megatron_sse.options import Command, option, positional


@dataclass(frozen=True, kw_only=True)
class Request(Command):
    """Draw loss, speed, memory, partition load and layouts of runs, from their TensorBoard events, as PNG files and one
    HTML page. docs/observe.md explains the pictures."""

    command, help = "plot", "draw runs side by side"

    runs: tuple[str, ...] = positional("RUN", "run folder (monitor.folder)")
    output: str = option("FOLDER", "folder to write to", default="plot")
