"""Arguments of commands, of any kind."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sse.cli import COMMANDS
from megatron_sse.options import _ARGUMENT, Command, parse
from tests.fuzz.support import HUGE, TEXTS, answers, refused_in_a_line, run
from tests.training.support import small_run

WORDS = st.one_of(
    TEXTS,
    HUGE.map(str),
    st.floats().map(str),
    st.sampled_from(
        ["1,2", "1,,2", "nan", "inf", "1e400", "80GiB", "-5", "--", "-h", "perplexity", "mqar", "needle", "0x10"]
    ),
)


def flags(request: type[Command]) -> list[str]:
    """Return the names of a command's options."""
    arguments = [(field.name, field.metadata.get(_ARGUMENT)) for field in dataclasses.fields(request)]
    return [
        argument.flag or "--" + name.replace("_", "-")
        for name, argument in arguments
        if argument is not None and not argument.is_positional
    ]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Return a command with arguments of which most name its options."""
    request = draw(st.sampled_from(COMMANDS))
    words = draw(st.lists(st.one_of(WORDS, st.sampled_from(flags(request) or ["--x"])), max_size=6))
    return [*request.command.split(), *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("arguments")
    (made / "run.yaml").write_text(small_run(made).to_yaml())
    return made


def check(arguments: list[str]) -> None:
    request = parse(COMMANDS, arguments, "megatron-sse", "", "0")
    refused_in_a_line(request.check)


@given(command_lines())
def test_any_arguments(arguments: list[str]) -> None:
    """Arguments become a request that is checked, or are refused."""
    try:
        check(arguments)
    except SystemExit as end:
        assert end.code in (0, 2)


@given(st.data())
def test_any_option_of_plan(folder: Path, data: st.DataObject) -> None:
    options = data.draw(st.dictionaries(st.sampled_from(flags_of("plan")), WORDS, max_size=2))
    words = [word for name, value in options.items() for word in ([name] if name == "--search" else [name, value])]
    answers("plan", folder / "run.yaml", *words)


def flags_of(command: str) -> list[str]:
    return flags(next(request for request in COMMANDS if request.command == command))


@given(
    st.sampled_from(["inspect", "plot", "data inspect", "score", "convert", "generate", "inspect-states"]), WORDS, WORDS
)
def test_paths_of_any_kind(command: str, first: str, second: str) -> None:
    """Each path is refused, for none of them is a model, a run or a token file."""
    more = {"score": ["--checkpoint", first, "--input", second, "--output", "/dev/null/x"], "convert": [first, second]}
    more |= {"generate": [first, "--prompt", "a"], "inspect-states": [first, "--prompt", "a"]}
    answers(*command.split(), *more.get(command, [first]))


def test_the_help_of_all() -> None:
    for request in COMMANDS:
        assert run(*request.command.split(), "--help")[0] == 0
