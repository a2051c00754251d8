"""Escape names for logs and terminals: object names, keys and server messages are untrusted.

A newline in a name would begin a line of its own in a log, an ANSI escape would steer a terminal, and a
bidirectional override would show a name in another order. All of these are escaped.
"""

from __future__ import annotations


def one_line(text: object) -> str:
    """Return the text with every character that is not printable escaped, newlines included.

    Args:
        text: a name, an error or another object with a ``str``.
    """
    plain = str(text)
    return plain if plain.isprintable() else "".join(map(_escaped, plain))


def lines(text: str) -> str:
    """Return the text with every character escaped that is neither printable nor a newline."""
    return "\n".join(map(one_line, text.split("\n")))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
