"""Text with lone surrogates: what Python makes of bytes that it can't decode, as in a C locale.

Local paths may have them, for they have their bytes again as file names. URIs and options go to servers as
UTF-8, which has no surrogates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cloudckpt.backends.errors import ConfigurationError

UTF8_LOCALE = (
    "Run it in a UTF-8 locale, such as LC_ALL=C.UTF-8, or with PYTHONUTF8=1: "
    "in others Python can't decode what the command line and the environment hold"
)
"""Advice, for an error's hint."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def has_undecoded(text: str) -> bool:
    """Tell whether a text has lone surrogates."""
    return _SURROGATE.search(text) is not None


def refuse_undecoded(value: object, what: str, *, uri: str | None = None) -> None:
    """Refuse a text with lone surrogates, also as a key or value in a dict, a list or a tuple.

    Raises:
        ConfigurationError: there are some. It shows ``uri`` and not the value, which may be a secret.
    """
    if isinstance(value, str):
        if has_undecoded(value):
            raise ConfigurationError(f"{what} holds bytes that are no text", uri=uri, hint=UTF8_LOCALE)
    elif isinstance(value, Mapping):
        for name, one in value.items():
            refuse_undecoded(name, what, uri=uri)
            refuse_undecoded(one, what, uri=uri)
    elif isinstance(value, list | tuple):
        for one in value:
            refuse_undecoded(one, what, uri=uri)
