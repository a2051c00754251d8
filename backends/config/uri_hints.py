"""URIs that are not spelt as one: console and HTTPS addresses of a bucket, lost slashes, a lost protocol."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)

_LOST_COLON: Final = re.compile(r"(?P<protocol>s3a?|gs|gcs)//+(?P<rest>[^/].*)", re.DOTALL | re.IGNORECASE)
_AMAZON: Final = r"amazonaws\.com(?:\.cn)?"
_S3_IN_PATH: Final = re.compile(rf"s3(?:[.-](?:dualstack\.|fips\.)?[a-z0-9-]+)?\.{_AMAZON}")
_S3_IN_HOST: Final = re.compile(rf"(?P<bucket>[a-z0-9][a-z0-9.-]*[a-z0-9])\.{_S3_IN_PATH.pattern}")
_S3_CONSOLE: Final = re.compile(r"(?:s3\.|[a-z0-9-]+\.)?console\.(?:aws\.amazon\.com|amazonaws\.cn)")
_S3_CONSOLE_PATH: Final = re.compile(r"/s3/(?:buckets|object|upload)/(?P<bucket>[^/]+)/?(?P<rest>.*)")
_GCS_IN_PATH: Final = frozenset(
    {"storage.googleapis.com", "storage.cloud.google.com", "commondatastorage.googleapis.com"}
)
_GCS_IN_HOST: Final = re.compile(r"(?P<bucket>[a-z0-9][a-z0-9._-]*[a-z0-9])\.storage\.googleapis\.com")
_GCS_CONSOLE: Final = re.compile(r"/storage/browser/(?:_details/)?(?P<rest>[^/].*)")
_LIKE_A_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


def refuse_address(text: str) -> None:
    """Make sure that a text is not the web address of a bucket, and has not lost its colon.

    Raises:
        ConfigurationError: it is; the hint has the URI that was probably meant.
    """
    text = text.strip()
    if (lost := _LOST_COLON.fullmatch(text)) is not None:
        meant = f"{lost['protocol'].lower()}://{_without_user(lost['rest'].partition('?')[0])}"
        raise ConfigurationError(
            "a colon is missing from a URI", uri=meant, hint=f"Write {meant}, or ./ before a folder's name"
        )
    meant_of_web = _of_web_address(text)
    if meant_of_web is not None:
        raise ConfigurationError(
            "this is a web address of a bucket, and not its URI",
            uri=meant_of_web,
            hint=f"Write {meant_of_web}; another server than the cloud's own goes in endpoint_url",
        )


def _of_web_address(text: str) -> str | None:
    """Return the URI of what a web address of S3 or GCS shows; None for any other address."""
    if not text.lower().startswith(("https://", "http://")):
        return None
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").lower()
    except ValueError:
        return None
    path = unquote(parts.path)
    meant: tuple[str, str] | None = None
    if (own := _S3_IN_PATH.fullmatch(host)) is not None:
        meant = "s3", path
    elif (own := _S3_IN_HOST.fullmatch(host)) is not None:
        meant = "s3", f"{own['bucket']}/{path}"
    elif _S3_CONSOLE.fullmatch(host) and (own := _S3_CONSOLE_PATH.fullmatch(path)) is not None:
        meant = "s3", f"{own['bucket']}/{parse_qs(parts.query).get('prefix', [own['rest']])[0]}"
    elif host in _GCS_IN_PATH:
        meant = "gs", path
    elif (own := _GCS_IN_HOST.fullmatch(host)) is not None:
        meant = "gs", f"{own['bucket']}/{path}"
    elif host == "console.cloud.google.com" and (own := _GCS_CONSOLE.fullmatch(path)) is not None:
        meant = "gs", own["rest"].partition(";")[0]
    if meant is None:
        return None
    protocol, rest = meant
    joined = "/".join(part for part in rest.split("/") if part)
    return f"{protocol}://{joined or 'bucket/prefix'}"


def is_like_a_bucket(path: str) -> bool:
    """Return True if a path, as it was typed, may be a bucket and a prefix without their protocol.

    It is relative, begins with a name that a bucket may have, and no file or folder has this name here.
    """
    first = path.partition("/")[0]
    return _LIKE_A_BUCKET.fullmatch(first) is not None and not os.path.lexists(first)


def advice(uri: str, otherwise: str) -> str:
    """Return what to do about a URI at which nothing is.

    Args:
        uri: canonical.
        otherwise: the advice, unless the URI is a folder that looks like a bucket whose protocol is missing.
    """
    try:
        here = Path.cwd()
    except OSError:  # the working directory was deleted
        return otherwise
    below = uri.removeprefix(f"file://{here}/")
    if uri == below or not is_like_a_bucket(below):
        return otherwise
    folder = here / below.partition("/")[0]
    return f"There is no folder {folder}. Did you mean s3://{below} or gs://{below}?"


def new_folder(typed: str) -> str | None:
    """Return the folder that writing to a relative path would make; None where it is no bucket in disguise.

    Args:
        typed: the path as it was given.
    """
    if "/" not in typed.strip("/") or not is_like_a_bucket(typed):
        return None
    try:
        return str(Path.cwd() / typed)
    except OSError:  # the working directory was deleted: there is no such folder to be made
        return None


def warn_of_new_folder(typed: str) -> None:
    """Log, once a process, that a relative path which looks like a bucket is a folder that will be made."""
    if (folder := new_folder(typed)) is not None:
        _say_new_folder(typed, folder)


@functools.cache
def _say_new_folder(typed: str, folder: str) -> None:
    message = "%s names no protocol and is taken for a new folder, %s: for a bucket write s3://%s or gs://%s"
    _log.warning(message, *map(one_line, (typed, folder, typed, typed)))


def _without_user(rest: str) -> str:
    first, slash, below = rest.partition("/")
    return f"{first.rpartition('@')[2]}{slash}{below}"
