"""The options of a checkpoint target, from keywords, URI query and environment, as one frozen value.

Each option comes from the first of these that has it: a keyword, the query of the URI, the environment
variable ``CLOUDCKPT_<OPTION>``. They are read and checked here once; the inside of the library never reads
the environment. :mod:`cloudckpt.backends.config.target` joins them to a URI.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

import pydantic
from pydantic import ByteSize, Field, SecretStr

from cloudckpt.backends.config.endpoint_url import fault_of, may_hold_secret
from cloudckpt.backends.config.keywords import check_known, is_secret, warn_of_variables
from cloudckpt.backends.config.undecoded import refuse_undecoded
from cloudckpt.backends.errors import ConfigurationError

ENVIRONMENT_PREFIX = "CLOUDCKPT_"

_MIB = 1 << 20

_NonEmpty = Annotated[str, Field(min_length=1)]


_ALLOWED: Mapping[str, str] = {
    "part_size": "a size of at least one byte, such as 64MiB",
    "concurrency": "a whole number of at least 1",
    "memory_limit": "a size of at least 1MiB, such as 256MiB",
    "metadata_limit": "a size of at least 1MiB, such as 1GiB",
    "endpoint_url": "an http:// or https:// URL with a host and without credentials or a query",
    "region": "a region's name, such as eu-central-1",
    "profile": "the name of a profile in the AWS configuration",
    "anon": "true or false",
    "requester_pays": "true or false",
    "project": "the name of a Google Cloud project",
    "token": "what gcsfs takes as its token, as text",
    "sse": "an encryption of S3, such as AES256 or aws:kms",
    "sse_kms_key_id": "the id or ARN of a KMS key",
    "storage_class": "a storage class, such as STANDARD_IA",
    "kms_key_name": "the resource name of a Cloud KMS key",
    "checksum": "auto, crc64nvme, crc32c or none",
    "timeout": "a number of seconds greater than 0",
    "retries": "a whole number of at least 0",
    "storage_options": "a dict of keywords for the fsspec file system, no credentials in its endpoint_url",
}


class _Sealer(pickle.Pickler):
    """A pickler that leaves classes and functions to the one around it, whose unpickler finds them."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.named: list[object] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, type | FunctionType):
            return None
        self.named.append(obj)
        return len(self.named) - 1


class _Unsealer(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, named: list[object]) -> None:
        super().__init__(stream)
        self._named = named

    def persistent_load(self, pid: int) -> object:
        return self._named[pid]


_Sealed = tuple[bytes, bytes, list[object]]


def _seal(value: object) -> _Sealed:
    """Mask a value on its way into a pickle, by a random pad as long as it and used once.

    So secrets don't show in a core dump, a log or a packet trace that has the pickle in it. It is no
    encryption: the pad lies beside what it masks, and anyone with the whole pickle has the secret.
    """
    stream = io.BytesIO()
    sealer = _Sealer(stream)
    sealer.dump(value)
    pad = os.urandom(stream.tell())
    return pad, _masked(stream.getvalue(), pad), sealer.named


def _unseal(pad: bytes, masked: bytes, named: list[object]) -> Any:
    return _Unsealer(io.BytesIO(_masked(masked, pad)), named).load()


def _masked(data: bytes, pad: bytes) -> bytes:
    return (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(len(pad), "big")


class Options(pydantic.BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """Options of a store and of the transfers to and from it.

    Secrets (``token``, and all of ``storage_options``) never show in ``repr``. They do travel in a
    pickle, because another process cannot do without them: masked, so that they don't show in it either, but
    not encrypted. Anyone with the pickle has the secret.
    """

    part_size: Annotated[ByteSize, Field(ge=1)] | None = None
    """Bytes of one part of a multipart upload; without it, what suits how much there is to send."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Requests in flight, a rank."""
    memory_limit: Annotated[ByteSize, Field(ge=_MIB)] = ByteSize(256 * _MIB)
    """Ceiling on the bytes that a rank holds beyond the caller's tensors."""
    metadata_limit: Annotated[ByteSize, Field(ge=_MIB)] = ByteSize(1024 * _MIB)
    """Ceiling on the bytes of ``.metadata``, compared before they are read."""

    endpoint_url: _NonEmpty | None = None
    """Server to use instead of the cloud's own."""
    region: _NonEmpty | None = None
    profile: _NonEmpty | None = None
    anon: bool = False
    """Send unsigned requests."""
    requester_pays: bool = False
    """Accept the cost of requests to a requester-pays bucket."""
    project: _NonEmpty | None = None
    token: SecretStr | None = None
    """For gcsfs: the path of a key file, or the name of one of its methods."""

    sse: _NonEmpty | None = None
    sse_kms_key_id: _NonEmpty | None = None
    storage_class: _NonEmpty | None = None
    kms_key_name: _NonEmpty | None = None

    checksum: Literal["auto", "crc64nvme", "crc32c", "none"] = "auto"
    """What the store is asked to check on arrival."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds that a connection may stay silent; a request with its retries takes about five times that."""
    retries: Annotated[int, Field(ge=0)] = 10
    """Times that a request is sent again after a failure that may pass. With ten, a fifth of all requests
    failing loses one in fifty million."""
    storage_options: Annotated[dict[str, Any], Field(default_factory=dict, repr=False)]
    """Keywords for the fsspec file system of the URI."""

    @pydantic.field_validator("endpoint_url")
    @classmethod
    def _is_endpoint(cls, value: str | None) -> str | None:
        if value is not None and fault_of(value) is not None:
            raise ValueError("not an endpoint")
        return value

    @pydantic.field_validator("storage_options")
    @classmethod
    def _has_no_secret_where_it_would_show(cls, value: dict[str, Any]) -> dict[str, Any]:
        # An endpoint is named in errors, wherever it was given.
        client = value.get("client_kwargs")
        endpoints = [value.get("endpoint_url"), isinstance(client, dict) and client.get("endpoint_url")]
        if any(isinstance(endpoint, str) and may_hold_secret(endpoint) for endpoint in endpoints):
            raise ValueError("a secret in an endpoint")
        return value

    def reaches_as(self, other: Options) -> bool:
        """Return True if these options reach the same server as others, as the same user."""
        return all(getattr(self, name) == getattr(other, name) for name in _OF_REACHING)

    def __getstate__(self) -> dict[Any, Any]:
        return {"sealed": _seal(super().__getstate__())}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(_unseal(*state["sealed"]))


_OF_REACHING = (
    *("endpoint_url", "region", "profile", "anon", "requester_pays", "project", "token"),
    "storage_options",
)
_EVERYWHERE = frozenset(
    {"part_size", "concurrency", "memory_limit", "metadata_limit", "checksum", "timeout", "retries"}
)
_HONOURED: Mapping[str, frozenset[str]] = {
    "s3": _EVERYWHERE
    | {"endpoint_url", "region", "profile", "anon", "requester_pays", "storage_options"}
    | {"sse", "sse_kms_key_id", "storage_class"},
    "gs": _EVERYWHERE
    | {
        "endpoint_url",
        "project",
        "token",
        "anon",
        "storage_options",
        "storage_class",
        "kms_key_name",
    },
    # Time limits and retries are of requests, of which these two make none.
    "file": _EVERYWHERE,
    "memory": _EVERYWHERE,
}
_HONOURED_BY_OTHERS = _EVERYWHERE | {"storage_options"}
_CHECKSUMS: Mapping[str, frozenset[str]] = {
    "s3": frozenset({"auto", "crc64nvme", "crc32c", "none"}),
    "gs": frozenset({"auto", "crc32c", "none"}),
}
_CHECKSUMS_OF_OTHERS = frozenset({"auto", "none"})

_WHERE_CREDENTIALS_BELONG: Mapping[str, str] = {
    "s3": "Credentials belong in the AWS environment variables, in ~/.aws/credentials (option `profile`), "
    "in an instance role, or in the keyword storage_options",
    "gs": "Credentials belong in Application Default Credentials, or in the keyword token or storage_options",
}
_WHERE_OTHER_CREDENTIALS_BELONG = "Credentials belong in the keyword storage_options"


def uses_option(protocol: str, name: str) -> bool:
    """Return True if stores of a protocol use an option, or if there is no such option."""
    return name in _HONOURED.get(protocol, _HONOURED_BY_OTHERS) or name not in Options.model_fields


def where_credentials_belong(protocol: str) -> str:
    """Advice on where credentials for ``protocol`` go, for an error's hint."""
    return _WHERE_CREDENTIALS_BELONG.get(protocol, _WHERE_OTHER_CREDENTIALS_BELONG)


@dataclass(frozen=True, slots=True)
class Layers:
    """Options as given, by source, before they are joined. Kept so that ``reset`` can join them anew.

    A pickle of them is masked like one of ``Options``.
    """

    keywords: Mapping[str, Any] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unsealed_layers, _seal((self.keywords, self.query, self.environment))

    @classmethod
    def given(cls, keywords: Mapping[str, Any], query: Mapping[str, str]) -> Self:
        """Take keywords (None means not given) and query, and read the environment."""
        return cls(
            keywords={name: value for name, value in keywords.items() if value is not None},
            query=dict(query),
            environment=_read_environment(os.environ),
        )

    def joined(self, protocol: str) -> Options:
        """Join the layers into the options for a store of this protocol.

        Raises:
            ConfigurationError: an option is unknown, has a value that is not allowed, or was asked for by
                keyword or query and can't be honoured by the protocol. The environment speaks to all stores,
                so those that a protocol does not use do not apply.
        """
        for name in self.keywords:
            check_known(name, "keyword", Options.model_fields)
        asked = {**self.query, **self.keywords}
        honoured = _HONOURED.get(protocol, _HONOURED_BY_OTHERS)
        for name, value in asked.items():
            if name not in honoured and value != {}:
                raise ConfigurationError(
                    f"option {name!r} can't be honoured by {protocol}:// and would be ignored",
                    hint=f"Leave it out. {protocol}:// takes {_enumerate(sorted(honoured))}",
                )
        checksums = _CHECKSUMS.get(protocol, _CHECKSUMS_OF_OTHERS)
        if isinstance(checksum := asked.get("checksum"), str) and checksum in _CHECKSUMS["s3"] - checksums:
            raise ConfigurationError(
                f"option 'checksum' can't be {checksum!r} on {protocol}://, which does not check it",
                hint=f"Allowed: {_enumerate(sorted(checksums))}",
            )
        background = {
            name: value
            for name, value in self.environment.items()
            if name in honoured and not (name == "checksum" and value in _CHECKSUMS["s3"] - checksums)
        }
        for name, value in {**background, **asked}.items():
            refuse_undecoded(value, self._source(name))
        try:
            return Options.model_validate({**background, **asked})
        except pydantic.ValidationError as error:
            raise self._explained(error) from None  # pydantic's own text would show the value of a secret

    def _source(self, name: str) -> str:
        """Name an option by where it was given."""
        if name in self.keywords:
            return f"option {name!r}"
        if name in self.query:
            return f"option {name!r} in the query"
        return f"environment variable {ENVIRONMENT_PREFIX}{name.upper()}"

    def _explained(self, error: pydantic.ValidationError) -> ConfigurationError:
        name = str(error.errors(include_url=False, include_input=False)[0]["loc"][0])
        source, value = self._source(name), {**self.environment, **self.query, **self.keywords}[name]
        fault = fault_of(value) if name == "endpoint_url" and isinstance(value, str) and value else None
        if fault is not None:
            shown = "" if fault.secret else f"is {value!r}, which "
            return ConfigurationError(f"{source} {shown}{fault.what}", hint=fault.cure)
        shown = "has a value that" if name in ("token", "storage_options") else f"is {value!r}, which"
        return ConfigurationError(f"{source} {shown} is not allowed", hint=f"Allowed: {_ALLOWED[name]}")


def _unsealed_layers(pad: bytes, masked: bytes, named: list[object]) -> Layers:
    return Layers(*_unseal(pad, masked, named))


def parse_query(query: str, protocol: str) -> dict[str, str]:
    """Read the query of a URI (``part_size=64MiB&region=…``); percent escapes are read, a plus is a plus.

    Raises:
        ConfigurationError: an option is unknown, given twice, has no value, or is a credential.
    """
    options: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        raw_name, _, raw_value = item.partition("=")
        name, value = unquote(raw_name), unquote(raw_value)
        if is_secret(name):
            raise ConfigurationError(
                f"{name!r} is a credential, and credentials never go in a URI",
                hint=where_credentials_belong(protocol),
            )
        if name == "storage_options":
            raise ConfigurationError(
                "option 'storage_options' is a keyword only",
                hint="Pass it to the call, not in the URI",
            )
        check_known(name, "option in the query", Options.model_fields)
        if not value:
            raise ConfigurationError(
                f"option {name!r} in the query has no value",
                hint=f"Write {name}=VALUE. Allowed: {_ALLOWED[name]}",
            )
        if name in options:
            raise ConfigurationError(f"option {name!r} is given twice in the query", hint="Give it once")
        options[name] = value
    return options


def _read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    variables = {
        name: ENVIRONMENT_PREFIX + name.upper() for name in Options.model_fields if name != "storage_options"
    }
    warn_of_variables(environment, ENVIRONMENT_PREFIX, Options.model_fields)
    return {name: environment[variable] for name, variable in variables.items() if environment.get(variable)}


def _enumerate(names: Iterable[str]) -> str:
    return ", ".join(names)


def true_or_false(name: str, value: object) -> bool:
    """Take a switch that decides over data: only a real bool will do, for ``"false"`` is true.

    Raises:
        ConfigurationError: it is something else.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} is neither True nor False", hint=f"Pass {name} as a bool")
    return value
