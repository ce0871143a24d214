"""Text on a terminal: numbers of things, and text of unknown origin with what would steer the terminal made visible."""

import unicodedata

# Characters that change the direction in which neighbours are shown; an attacker hides code behind them.
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Controls, and halves of characters, which no stream can encode.
_UNSEEN = ("Cc", "Cs")


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: 1 process, 2 processes, 1,200 tokens."""
    plural = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{number:,} {noun}{plural}"


def size_of(number: int) -> str:
    """Return a number of bytes in the largest unit that it reaches: 512 B, 1.5 KiB, 2.0 GiB."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"


def make_visible(text: str) -> str:
    """Return text with control characters (but newlines and tabs) and bidirectional controls as \\x1b or \\u202e."""
    return "".join(_escape(char) if _is_hidden(char) else char for char in text)


def make_line(text: str) -> str:
    """Return text as make_visible does, in one line: newlines and tabs are escaped as well."""
    return make_visible(text).replace("\n", "\\x0a").replace("\t", "\\x09")


def _is_hidden(char: str) -> bool:
    return char in _BIDIRECTIONAL or (char not in "\n\t" and unicodedata.category(char) in _UNSEEN)


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"
