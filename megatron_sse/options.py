"""The options of commands, declared once: a dataclass field with its type, default and help is an argument.

    @dataclass(frozen=True, kw_only=True)
    class Request(Command):
        \"\"\"Print a greeting. docs/greet.md explains the options.\"\"\"

        command, help = "greet", "print a greeting"

        name: str = positional("NAME", "who is greeted")
        times: int = option("N", "how often", default=1)
        loud: bool = option(help="in capitals")

`megatron-sse greet Ada --times 2` makes Request(name="Ada", times=2, loud=False). The docstring is the description in
--help, where defaults are added by themselves. Fields without positional() or option() are for code alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, ClassVar

_ARGUMENT = "argument"


@dataclasses.dataclass(frozen=True)
class _Argument:
    metavar: str | None
    help: str
    flag: str | None
    unset: str | None
    is_positional: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A request to a command; its docstring is the description of the command.

    command: the words after megatron-sse. help: its line in the list of commands. prints_result: the result goes to
    stdout, and so log lines to stderr.
    """

    command: ClassVar[str]
    help: ClassVar[str]
    prints_result: ClassVar[bool] = False


def positional(metavar: str, help: str, default: Any = dataclasses.MISSING) -> Any:
    """Declare a positional argument; of a field that is a sequence, all that follow."""
    return _field(_Argument(metavar, help, None, None, is_positional=True), default)


def option(
    metavar: str | None = None,
    help: str = "",
    default: Any = dataclasses.MISSING,
    *,
    flag: str | None = None,
    unset: str | None = None,
) -> Any:
    """Declare an option, required without a default. A bool is a switch, off by default; a sequence may be repeated.

    flag: its name, such as --prompt; by default that of the field. unset: what a default of None means, for --help.
    """
    return _field(_Argument(metavar, help, flag, unset, is_positional=False), default)


def _field(argument: _Argument, default: Any) -> Any:
    if argument.metavar is None and default is dataclasses.MISSING:
        default = False
    if argument.unset is not None and default is dataclasses.MISSING:
        default = None
    return dataclasses.field(default=default, metadata={_ARGUMENT: argument})


def make_parser(commands: Sequence[type[Command]], **settings: Any) -> argparse.ArgumentParser:
    """Return the parser of all commands; settings: of ArgumentParser. Its results go to read_request."""
    parser = argparse.ArgumentParser(**settings)
    # "data build" is the command build of the group data.
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for request in commands:
        group, _, name = request.command.rpartition(" ")
        if group not in groups:
            kinds = ", ".join(other.help for other in commands if other.command.startswith(f"{group} "))
            added = groups[""].add_parser(group, help=kinds)
            groups[group] = added.add_subparsers(required=True, metavar="COMMAND")
        assert request.__doc__ is not None
        added = groups[group].add_parser(name, help=request.help, description=" ".join(request.__doc__.split()))
        added.set_defaults(request=request)
        types = typing.get_type_hints(request)
        for field in dataclasses.fields(request):
            if _ARGUMENT in field.metadata:
                _add(added, field, types[field.name])
    return parser


def read_request(options: argparse.Namespace) -> Command:
    """Return the request that a parsed command line makes."""
    values = vars(options).copy()
    return values.pop("request")(**values)


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], annotation: Any) -> None:
    argument: _Argument = field.metadata[_ARGUMENT]
    kind, choices, is_many = _read_type(annotation)
    is_required = field.default is dataclasses.MISSING
    settings: dict[str, Any] = {"help": _help(argument, field.default).replace("%", "%%")}
    if kind is bool:
        settings["action"] = "store_true"
    else:
        settings |= {"type": kind, "metavar": argument.metavar} | ({"choices": choices} if choices else {})
        settings["default"] = None if is_required else field.default
    if argument.is_positional:
        if is_many:
            settings["nargs"] = "+" if is_required else "*"
        parser.add_argument(field.name, **settings)
        return
    if is_many:
        settings["action"] = "append"
    name = argument.flag or "--" + field.name.replace("_", "-")
    parser.add_argument(name, dest=field.name, required=is_required, **settings)


def _read_type(annotation: Any) -> tuple[Any, tuple[str, ...], bool]:
    """Return the type of one value, the values allowed (all where empty), and whether there may be several."""
    parts = [part for part in typing.get_args(annotation) if part not in (type(None), ...)]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return str, tuple(parts), False
    if origin is tuple:
        return parts[0], (), True
    # X | None
    return _read_type(parts[0]) if parts else (annotation, (), False)


def _help(argument: _Argument, default: Any) -> str:
    if argument.unset is not None:
        return f"{argument.help} (default: {argument.unset})"
    if default in (dataclasses.MISSING, None, False, ()):
        return argument.help
    return f"{argument.help} (default: {default})"
