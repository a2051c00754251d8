"""The address of a checkpoint: a URI and its options, parsed once into one frozen value.

Spelling of names. In a URI with a protocol, ``?`` starts the options and ``#`` is refused. For object stores
and other fsspec protocols the rest is literal, as in the ``aws`` and ``gcloud`` command lines and in fsspec:
``%20`` is three characters of a key. In a ``file:`` URI percent escapes are read, as RFC 8089 has it. A
plain path without ``://`` is taken as it is, with any ``?``, ``#`` and ``%``; its canonical URI escapes
those three, and bytes that are no text in this locale.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self
from urllib.parse import unquote, unquote_to_bytes

import fsspec

from cloudckpt.backends.config import arn
from cloudckpt.backends.config.keywords import check_known
from cloudckpt.backends.config.options import Layers, Options, parse_query, where_credentials_belong
from cloudckpt.backends.config.undecoded import UTF8_LOCALE, has_undecoded, refuse_undecoded
from cloudckpt.backends.config.uri_hints import refuse_address
from cloudckpt.backends.errors import CheckpointError, ConfigurationError

_WITH_PROTOCOL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*):(?P<rest>/[^/].*|/?)", re.DOTALL)
_NO_SLASH = re.compile(r"(?P<protocol>s3|s3a|gs|gcs|file|memory):(?P<rest>[^/].*)", re.DOTALL | re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253}[A-Za-z0-9])?")
_ALIASES: Final = {"gcs": "gs", "s3a": "s3", "local": "file"}
_WITH_BUCKET: Final = ("s3", "gs")
_EXAMPLES: Final = {
    "s3": "s3://bucket/prefix",
    "gs": "gs://bucket/prefix",
    "file": "file:///absolute/path",
    "memory": "memory://name",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint, or the folder of a run, and the options with which to reach it."""

    uri: str
    """Canonical: no query, no trailing slash, no credentials. ``parse`` reads it back."""
    protocol: str
    """``s3``, ``gs``, ``file``, ``memory``, or any other protocol of fsspec."""
    bucket: str
    """Of ``s3`` and ``gs``; otherwise empty. An S3 access point's ARN, which botocore takes as a bucket."""
    path: str
    """``s3``, ``gs``: the key prefix. ``file``: the absolute path. Others: what fsspec calls the path."""
    options: Options
    layers: Layers = field(default_factory=Layers, repr=False, compare=False)
    typed: str = field(default="", repr=False, compare=False)
    """The path as it was given, where it is a plain one."""

    @classmethod
    def given(cls, taker: str, uri: str | os.PathLike[str] | Target, keywords: Mapping[str, Any]) -> Target:
        """Read what a class or function was called with, as ``parse`` does.

        Args:
            taker: its name, one of ``keywords.OWN``, whose own keywords are suggested for an unknown one.
            uri: as in ``parse``.
            keywords: those that are not its own.

        Raises:
            ConfigurationError: the URI can't be read, or an option can't be used.
        """
        if not isinstance(uri, Target):
            try:
                for name in keywords:
                    check_known(name, "keyword", Options.model_fields, taker)
            except ConfigurationError as error:
                raise error.located(uri=_Place.read(uri).uri) from None
        return cls.parse(uri, **keywords)

    @classmethod
    def parse(cls, uri: str | os.PathLike[str] | Target, /, **keywords: Any) -> Target:
        """Read a URI or a plain path, its query, the keywords and, once and here, the environment.

        A target that was parsed before is returned as it is: it has its options already.

        Raises:
            ConfigurationError: the URI can't be read, or an option can't be used.
        """
        if isinstance(uri, Target):
            if keywords:
                raise ConfigurationError(
                    f"a target has its options, and is given more: {', '.join(sorted(keywords))}", uri=uri.uri
                )
            return uri
        place = _Place.read(uri)
        try:
            layers = Layers.given(keywords, parse_query(place.query, place.protocol))
            return cls._joined(place, layers)
        except CheckpointError as error:
            error.located(uri=place.uri)
            raise

    def moved_to(self, uri: str | os.PathLike[str]) -> Self:
        """Return the target at another URI, with the keywords and environment that this one was made with.

        The query stays too while the protocol stays; what the new URI has in its query goes before it.
        """
        place = _Place.read(uri)
        inherited = self.layers.query if place.protocol == self.protocol else {}
        try:
            query = {**inherited, **parse_query(place.query, place.protocol)}
            return self._joined(place, replace(self.layers, query=query))
        except CheckpointError as error:
            error.located(uri=place.uri)
            raise

    def child(self, name: str) -> Self:
        """Return the target ``name`` below this one, with the same options."""
        segments = name.split("/")
        if any(segment in ("", ".", "..") for segment in segments):
            raise ConfigurationError(f"{name!r} is not a name below a checkpoint", uri=self.uri)
        spelt = _escaped(name) if self.protocol == "file" else name
        path = f"{self.path.rstrip('/')}/{name}" if self.path else name
        return replace(self, uri=f"{self.uri.removesuffix('/')}/{spelt}", path=path)

    def parted(self) -> tuple[Self, str]:
        """Return the target of the folder that this one lies in, with the same options, and its name there.

        Raises:
            ConfigurationError: it is a bucket, or the root of a file system.
        """
        folder, _, name = self.path.rpartition("/")
        if not name:
            raise ConfigurationError(
                "this names no file", uri=self.uri, hint="Write it like s3://bucket/model.safetensors"
            )
        spelt = _escaped(name) if self.protocol == "file" else name
        uri = self.uri.removesuffix(spelt)
        shorter = uri.removesuffix("/")
        # At the top of a file system both slashes of the protocol stay.
        uri = uri if shorter.endswith("/") else shorter
        return replace(self, uri=uri, path=folder or ("/" if self.protocol == "file" else "")), name

    @classmethod
    def _joined(cls, place: _Place, layers: Layers) -> Self:
        return cls(
            uri=place.uri,
            protocol=place.protocol,
            bucket=place.bucket,
            path=place.path if place.protocol in _EXAMPLES else _path_for_fsspec(place.protocol, place.uri),
            options=layers.joined(place.protocol),
            layers=layers,
            typed=place.typed,
        )


def is_checkpoint_uri(uri: str | os.PathLike[str]) -> bool:
    """Tell whether ``uri`` names a place that a store can be opened for, options aside."""
    try:
        _Place.read(uri)
    except (ConfigurationError, TypeError):  # TypeError: not a path at all
        return False
    return True


def protocol_of(uri: str | os.PathLike[str]) -> str:
    """Return the protocol of a URI, regardless of its options.

    Raises:
        ConfigurationError: the URI can't be read.
    """
    return _Place.read(uri).protocol


@dataclass(frozen=True, slots=True)
class _Place:
    uri: str
    protocol: str
    bucket: str
    path: str
    query: str
    typed: str = ""

    @classmethod
    def read(cls, given: str | os.PathLike[str]) -> _Place:
        text = os.fsdecode(os.fspath(given))
        if not text.strip() or "\0" in text:
            what = "holds a NUL character" if text.strip() else "is empty"
            hint = f"Write it like {_EXAMPLES['s3']} or {_EXAMPLES['file']}"
            raise ConfigurationError(f"a checkpoint's URI {what}", hint=hint)
        match = _WITH_PROTOCOL.fullmatch(text)
        if match is None:
            _refuse_broken_protocol(text)
            refuse_address(text)
            # Not Path.expanduser, which raises for a user that is not there: it is a folder called so.
            return replace(cls._of_path(os.path.expanduser(text), query=""), typed=text)  # noqa: PTH111
        refuse_address(text)
        protocol = match["protocol"].lower()
        protocol = _ALIASES.get(protocol, protocol)
        rest, _, query = match["rest"].partition("?")
        _check_spelling(protocol, rest, query)
        if protocol == "file":
            return cls._of_file(rest, query)
        refuse_undecoded(rest + query, "a checkpoint's URI", uri=f"{protocol}://{rest}")
        rest = rest.removesuffix("/")
        if protocol in _WITH_BUCKET:
            return cls._of_bucket(protocol, rest, query)
        if not rest:
            hint = f"Write it like {_EXAMPLES['memory']}"
            raise ConfigurationError(f"{protocol}:// names nothing", uri=f"{protocol}://", hint=hint)
        return cls(f"{protocol}://{rest}", protocol, "", f"/{rest}", query)

    @classmethod
    def _of_file(cls, rest: str, query: str) -> _Place:
        host, slash, path = rest.partition("/")
        if not host and not slash:
            hint = f"Write it like {_EXAMPLES['file']}"
            raise ConfigurationError("file:// names no folder", uri="file://", hint=hint)
        if host not in ("", "localhost"):
            raise ConfigurationError(
                "a file URI holds an absolute path, so three slashes",
                uri=f"file://{rest}",
                hint=f"Write it like {_EXAMPLES['file']}, or give a plain path",
            )
        refuse_undecoded(query, "a checkpoint's URI", uri=f"file://{rest}")
        # By their bytes: what a path's bytes mean is up to the locale.
        return cls._of_path(os.fsdecode(unquote_to_bytes(_fsencoded(f"/{path}"))), query)

    @classmethod
    def _of_path(cls, path: str, query: str) -> _Place:
        # Not Path.resolve, which follows symbolic links: the URI keeps the name that the user knows.
        try:
            absolute = "/" + os.path.abspath(os.fsdecode(_fsencoded(path))).lstrip("/")  # noqa: PTH100
        except OSError as error:
            raise ConfigurationError(
                f"{path!r} is relative, and the working directory was deleted",
                hint="Give an absolute path, or start the job in a folder that stays",
            ) from error
        return cls(f"file://{_escaped(absolute)}", "file", "", absolute, query)

    @classmethod
    def _of_bucket(cls, protocol: str, rest: str, query: str) -> _Place:
        is_arn = protocol == "s3" and arn.is_arn(rest)
        bucket, prefix = arn.parted(rest) if is_arn else rest.split("/", 1) if "/" in rest else (rest, "")
        uri = f"{protocol}://{rest}"
        if not bucket:
            raise ConfigurationError(
                f"the bucket is missing from the {protocol} URI",
                uri=uri,
                hint=f"Write it like {_EXAMPLES[protocol]}",
            )
        if not is_arn and not _BUCKET.fullmatch(bucket):
            raise ConfigurationError(
                f"{bucket!r} is not a bucket's name",
                uri=uri,
                hint="It has letters, digits, dots, dashes, underscores; a server goes in endpoint_url",
            )
        if "" in prefix.split("/") and prefix:
            raise ConfigurationError(
                "a checkpoint's URI has two slashes together after the bucket",
                uri=uri,
                hint="Keys with an empty folder name are a mistake more often than not: leave one slash out",
            )
        return cls(uri, protocol, bucket, prefix, query)


def _escaped(path: str) -> str:
    """Spell a path for a URI: bytes that are no text in this locale are escaped, too."""
    spelt = path.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    if not has_undecoded(spelt):
        return spelt
    return "".join(f"%{os.fsencode(one)[0]:02X}" if has_undecoded(one) else one for one in spelt)


def _fsencoded(path: str) -> bytes:
    """Return a path's bytes.

    Raises:
        ConfigurationError: it has a character that the file system's encoding has not.
    """
    try:
        return os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"a path has a character that file names here, which are in {error.encoding}, can't have",
            uri=f"file://{path}",
            hint=UTF8_LOCALE,
        ) from error


def _known_protocols() -> set[str]:
    return {*fsspec.available_protocols(), *fsspec.registry, *_ALIASES, *_EXAMPLES}


def _check_spelling(protocol: str, rest: str, query: str) -> None:
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and (protocol in _WITH_BUCKET or ":" in user):
        raise ConfigurationError(
            "credentials never go in a URI",
            uri=f"{protocol}://{rest[len(user) + 1 :]}",
            hint=where_credentials_belong(protocol),
        )
    uri = f"{protocol}://{rest}"
    _check_protocol(protocol, uri)
    if "#" in rest + query:
        raise ConfigurationError(
            "a checkpoint's URI has no #fragment", uri=uri.partition("#")[0], hint="Leave out what follows #"
        )
    if (rest + query) != (rest + query).rstrip():
        raise ConfigurationError("a checkpoint's URI ends in white space", uri=uri, hint="Leave it out")
    if any(segment in (".", "..") for segment in unquote(rest).split("/")):
        raise ConfigurationError("a checkpoint's URI has no . or .. in it", uri=uri, hint="Write it out")


def _check_protocol(protocol: str, uri: str) -> None:
    known = _known_protocols()
    if protocol in known:
        return
    usual = difflib.get_close_matches(protocol, [*_EXAMPLES, *_ALIASES], n=1, cutoff=0.5)
    near = usual or difflib.get_close_matches(protocol, sorted(known), n=1, cutoff=0.7)
    hint = f"Did you mean {near[0]}://?" if near else f"Write it like {', '.join(_EXAMPLES.values())}"
    raise ConfigurationError(f"unknown protocol {protocol!r}", uri=uri, hint=hint)


def _refuse_broken_protocol(text: str) -> None:
    match = _ONE_SLASH.fullmatch(text.strip()) or _NO_SLASH.fullmatch(text.strip())
    if match is not None and match["protocol"].lower() in _known_protocols():
        protocol = match["protocol"].lower()
        rest = match["rest"].lstrip("/").partition("?")[0]
        right = f"{protocol}:///" if _ALIASES.get(protocol, protocol) == "file" else f"{protocol}://"
        raise ConfigurationError(
            f"{protocol}: is followed by two slashes in a URI",
            uri=text.partition("?")[0],
            hint=f"Write {right}{rest}, as text: a pathlib.Path drops a slash",
        )
    if arn.is_arn(text.strip()):
        arn.refuse_bare(text.strip())
    if "://" in text:
        raise ConfigurationError(
            "invalid URI scheme",
            hint=f"Write it like {', '.join(_EXAMPLES.values())}; chained URLs (a::b://) are not taken",
        )


def _path_for_fsspec(protocol: str, uri: str) -> str:
    try:
        cls = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigurationError(
            f"a library for {protocol}:// is not installed", uri=uri, hint=str(error)
        ) from error
    return str(cls._strip_protocol(uri))
