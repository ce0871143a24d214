"""The letters that tensor names end with are those of the package's legend."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_sse

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "parallel", "megatron_sse", "tools")
LETTERS = re.findall(r"^    ([A-Za-z])  \S", megatron_sse.__doc__ or "", re.MULTILINE)
# A name in lower case that ends with dims, at least one of them in upper case: q_THK and hidden_T1d, but not BLOCK_K,
# HAVE_TE or A_log.
DIMENSIONED = re.compile(r"_*[a-z][a-z0-9_]*_([1-9A-Za-z]{0,5}[A-Z][1-9A-Za-z]{0,5})")


def names_in(source: str) -> Iterator[tuple[int, str]]:
    """Yield the names that a source binds or uses, with their lines."""
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(name := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), name


def unknown_letters(name: str) -> set[str]:
    """Return the letters of a name's dims that the legend lacks."""
    found = DIMENSIONED.fullmatch(name)
    return {letter for letter in found[1] if letter.isalpha()} - set(LETTERS) if found else set()


def test_legend_has_each_letter_once():
    assert len(LETTERS) > 20 and len(set(LETTERS)) == len(LETTERS)


@pytest.mark.parametrize("room", ROOMS)
def test_dims_are_letters_of_the_legend(room):
    wrong = {
        f"{path.relative_to(ROOT)}:{line}: {name} ends with {sorted(letters)}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, name in names_in(path.read_text())
        if (letters := unknown_letters(name))
    }
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("name", ["A_log", "BLOCK_K", "HAVE_TE", "_Scan", "fp32", "offsets_D1", "gates_4HR", "q1_THK"])
def test_names_that_pass(name):
    assert not unknown_letters(name)


@pytest.mark.parametrize(("name", "letter"), [("x_IT", "I"), ("_rows_TJ", "J"), ("hidden_Tz1", "z")])
def test_unknown_letters_are_found(name, letter):
    assert unknown_letters(name) == {letter}
