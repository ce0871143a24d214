"""The options of commands, each declared once: a field of a dataclass with its type, default and help.

    @dataclass(frozen=True, kw_only=True)
    class Request(Command):
        \"\"\"Print a greeting. docs/greet.md explains the options.\"\"\"

        command, help = "greet", "print a greeting"

        name: str = positional("NAME", "who is greeted")
        times: int = option("N", "how often", default=1)
        loud: bool = option(help="in capitals")

`megatron-sse greet Ada --times 2` becomes Request(name="Ada", times=2, loud=False). The docstring is the description in
--help, which also shows each default. Fields without positional() or option() can only be set by code.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Sequence
from typing import Any, ClassVar

_ARGUMENT = "argument"
# A variable that argcomplete's shell function sets.
_COMPLETION = "_ARGCOMPLETE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Base class of requests; the docstring of a request describes its command.

    command: the words after megatron-sse. help: its line in the list of commands.
    prints_result: whether the result goes to stdout, so that log lines go to stderr.
    """

    command: ClassVar[str]
    help: ClassVar[str]
    prints_result: ClassVar[bool] = False

    @property
    def num_processes(self) -> int:
        """Number of processes that run the command together: those of a launcher, or else those to start."""
        return 1

    @property
    def layout(self) -> str:
        """The options that ask for these processes, as they were given."""
        return ""

    def check(self) -> None:
        """Raise UserError for what is wrong, as far as it can be known before torch is loaded."""


@dataclasses.dataclass(frozen=True)
class _Argument:
    metavar: str | None
    help: str
    flag: str | None
    unset: str | None
    is_positional: bool


def positional(metavar: str, help: str, default: Any = dataclasses.MISSING) -> Any:
    """Declare a positional argument, which may be left out if it has a default. A tuple takes all that follow."""
    return _field(_Argument(metavar, help, None, None, is_positional=True), default)


def option(
    metavar: str | None = None,
    help: str = "",
    default: Any = dataclasses.MISSING,
    *,
    flag: str | None = None,
    unset: str | None = None,
) -> Any:
    """Declare an option. It is required if it has neither default nor `unset`; a bool is a switch, off by default.

    metavar: name of the value; None for switches and choices (Literal). flag: the option's name if it is not that of
    the field. unset: makes the default None, and is what --help shows for it.
    """
    return _field(_Argument(metavar, help, flag, unset, is_positional=False), default)


def _field(argument: _Argument, default: Any) -> Any:
    if default is dataclasses.MISSING and argument.unset is not None:
        default = None
    elif default is dataclasses.MISSING and argument.metavar is None:
        default = False
    return dataclasses.field(default=default, metadata={_ARGUMENT: argument})


def find_wrong_text(arguments: Sequence[str]) -> str | None:
    """Return one line for the first argument that is not text in UTF-8; None where all are."""
    for number, argument in enumerate(arguments):
        if "\0" not in argument and _is_utf8(argument):
            continue
        before = arguments[number - 1] if number else ""
        name = before if before.startswith("--") else f"argument {number + 1}"
        return f"{name}: got {argument!r}, allowed text in UTF-8"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse(
    commands: Sequence[type[Command]], arguments: Sequence[str] | None, name: str, description: str, version: str
) -> Command:
    """Return the request of a command line (sys.argv where `arguments` is None). Exits with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--version", action="version", version=version)
    _add_commands(parser, commands)
    if _COMPLETION in os.environ:
        # The shell asks what may come next; the package comes with the completion extra.
        import argcomplete

        argcomplete.autocomplete(parser)
    options, rest = parser.parse_known_args(arguments)
    values = vars(options)
    request: type[Command] = values.pop("request")
    # argparse takes no positional arguments after an option.
    takes_rest = [field.name for field in dataclasses.fields(request) if _is_rest(field)]
    if rest and (not takes_rest or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        values[takes_rest[-1]] = [*values.get(takes_rest[-1], ()), *rest]
    return request(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _is_rest(field: dataclasses.Field[Any]) -> bool:
    """Check whether a field takes any number of positional arguments, none included."""
    argument = field.metadata.get(_ARGUMENT)
    return argument is not None and argument.is_positional and field.default == ()


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[type[Command]]) -> None:
    # "data build" is the command build of the group data.
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for request in commands:
        group, _, name = request.command.rpartition(" ")
        if group not in groups:
            described = " or ".join(other.help for other in commands if other.command.startswith(f"{group} "))
            kinds = groups[""].add_parser(group, help=described, description=f"{described.capitalize()}.")
            groups[group] = kinds.add_subparsers(required=True, metavar="COMMAND")
        description = " ".join((request.__doc__ or "").split())
        added = groups[group].add_parser(name, help=request.help, description=description)
        added.set_defaults(request=request)
        types = typing.get_type_hints(request)
        for field in dataclasses.fields(request):
            if _ARGUMENT in field.metadata:
                _add_argument(added, field, types[field.name])


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], annotation: Any) -> None:
    argument: _Argument = field.metadata[_ARGUMENT]
    kind, choices, is_many = _read_type(annotation)
    is_required = field.default is dataclasses.MISSING
    # The default of what is not given is the field's own.
    settings: dict[str, Any] = {"help": _help(argument, field.default).replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        settings["action"] = "store_true"
    else:
        settings |= {"type": kind, "metavar": argument.metavar, "choices": choices}
    if argument.is_positional:
        if is_many or not is_required:
            settings["nargs"] = ("+" if is_required else "*") if is_many else "?"
        parser.add_argument(field.name, **settings)
        return
    if is_many:
        settings["action"] = "append"
    name = argument.flag or "--" + field.name.replace("_", "-")
    parser.add_argument(name, dest=field.name, required=is_required, **settings)


def _read_type(annotation: Any) -> tuple[Any, tuple[str, ...] | None, bool]:
    """Return the type of one value, the values allowed (None for all), and whether there may be several."""
    parts = [part for part in typing.get_args(annotation) if part not in (type(None), ...)]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return str, tuple(parts), False
    if origin is tuple:
        return parts[0], None, True
    # X | None
    return _read_type(parts[0]) if parts else (annotation, None, False)


def _help(argument: _Argument, default: Any) -> str:
    if default is None:
        default = argument.unset
    # A switch is off, and a list empty, as everyone expects.
    if any(default is other for other in (dataclasses.MISSING, None, False)) or default in ("", ()):
        return argument.help
    return f"{argument.help} (default: {default})"
