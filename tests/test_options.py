"""Commands whose options are declared as fields of a dataclass."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from megatron_sse.cli import COMMANDS, find_run, main
from megatron_sse.options import Command, option, parse, positional


@dataclass(frozen=True, kw_only=True)
class Draw(Command):
    """Draw shapes, 100 % by hand."""

    command, help = "pen draw", "draw shapes"

    shape: str = positional("SHAPE", "what to draw")
    settings: tuple[str, ...] = positional("key=value", "more", default=())
    times: int = option("N", "how often", default=1)
    size: float | None = option("X", "in mm", unset="that of the paper")
    colour: Literal["red", "blue"] = option(help="of the pen", default="red")
    labels: tuple[str, ...] = option("TEXT", "may be repeated", default=(), flag="--label")
    is_quick: bool = option(help="without care", flag="--quick")
    target: str = option("FILE", "to write to")
    seed: int = 7


def read(*arguments: str) -> Command:
    return parse([Draw], ["pen", "draw", *arguments], "name", "description", "1")


def test_completion_in_the_shell(tmp_path: Path) -> None:
    """What argcomplete's shell function asks for: commands, and the options of one."""
    for line, expected in (
        ("megatron-sse pl", {"plan", "plot"}),
        ("megatron-sse generate x --temp", {"--temperature"}),
    ):
        found = tmp_path / "found"
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        environment = os.environ | asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(found)}
        subprocess.run([sys.executable, "-m", "megatron_sse"], env=environment, check=True)
        assert {name.strip() for name in found.read_text().split("\n")} == expected


def test_fields_become_arguments() -> None:
    assert read("circle", "--target", "a") == Draw(shape="circle", target="a")
    given = "circle a=1 --times 3 --size 2.5 --colour blue --label x --label y --quick --target b c=2 d=3"
    assert read(*given.split()) == Draw(
        shape="circle",
        settings=("a=1", "c=2", "d=3"),
        times=3,
        size=2.5,
        colour="blue",
        labels=("x", "y"),
        is_quick=True,
        target="b",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("circle", "the following arguments are required: --target"),
        ("circle --target a --colour green", "argument --colour: invalid choice"),
        ("circle --target a --times x", "argument --times: invalid int value"),
        ("circle --target a --seed 3", "unrecognized arguments: --seed 3"),
    ],
)
def test_wrong_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(*arguments.split())
    assert message in capsys.readouterr().err


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "Draw shapes, 100 % by hand.",
        "--times N how often (default: 1)",
        "--size X in mm (default: that of the paper)",
        "--colour {red,blue} of the pen (default: red)",
        "--quick without care --target FILE to write to",
    ):
        assert text in shown


@pytest.mark.parametrize("request_class", COMMANDS, ids=lambda request_class: request_class.command)
def test_every_command_has_help_and_runs(request_class: type[Command], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*request_class.command.split(), "--help"])
    assert f"usage: megatron-sse {request_class.command} " in capsys.readouterr().out
    assert callable(find_run(request_class))
